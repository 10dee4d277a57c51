"""Tell readers what was applied, or, when that was not possible, to forget what they hold."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from projections.engine import Applied
from queries import cache

# A Redis that needs longer is as good as none: events are projected meanwhile.
PUSH_TIMEOUT_S: Final = 0.5

REDIS_FAULTS: Final = (RedisError, OSError, TimeoutError)

log = structlog.get_logger(__name__)


class Push:
    """The worker's voice. `is_broken` from the first failure until a `reset` came through."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.is_broken = False

    async def publish(self, applied: Iterable[Applied]) -> bool:
        """Tell it all, in order. False when somebody may not have heard."""
        for each in applied:
            if each.batch is None:
                if not await self.reset():
                    return False
            elif not await self._try(cache.publish_changes(self._redis, message(each))):
                return False
        return True

    async def reset(self) -> bool:
        """Let readers forget everything they hold. False when somebody may not have heard."""
        return await self._try(cache.reset(self._redis))

    async def _try(self, told: Coroutine[None, None, None]) -> bool:
        try:
            async with asyncio.timeout(PUSH_TIMEOUT_S):
                await told
        except REDIS_FAULTS as error:
            if not self.is_broken:
                log.warning("push_failed", error=repr(error))
            self.is_broken = True
        else:
            if self.is_broken:
                log.info("push_resumed")
            self.is_broken = False
        return not self.is_broken


def message(applied: Applied) -> bytes:
    """What `queries.cache.publish_changes` sends.

    A page on the way to a target has changed rows, but its lanes do not stand anywhere new.
    """
    assert applied.batch is not None
    changes = applied.batch.changes
    arrived = applied.reaches.target is None
    return msgspec.json.encode(
        {
            "lanes": applied.lanes if arrived else (),
            "models": applied.models if arrived else (),
            "snapshot": applied.reaches.snapshot,
            "orders": msgspec.Raw(changes.orders.encode()),
            "customers": msgspec.Raw(changes.customers.encode()),
            "skus": msgspec.Raw(changes.skus.encode()),
            "parked": [
                (each.read_model, each.aggregate, each.aggregate_id) for each in applied.parked
            ],
        }
    )
