"""The wake-up: a subscription that the web processes publish to after each commit."""

import asyncio
from contextlib import suppress
from typing import Any, Final, cast

import structlog
from redis.asyncio import Redis

from queries.cache import WAKE_CHANNEL
from workers.push import REDIS_FAULTS

PING_S: Final = 1.0  # a silent connection is asked whether it lives; no answer is a break
RECONNECT_S: Final = 0.5

log = structlog.get_logger(__name__)


class Wake:
    """Whether something was committed. `is_connected` says whether we would hear of it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._called = asyncio.Event()
        self.is_connected = False

    def call(self) -> None:
        """End the wait, now or the next one."""
        self._called.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a call; False when there was none in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._called.wait()
        was_called = self._called.is_set()
        self._called.clear()
        return was_called

    async def listen(self) -> None:
        """Hear calls until cancelled, whatever becomes of Redis."""
        while not _is_cancelled():
            try:
                await self._hear()
            except REDIS_FAULTS as error:
                if self.is_connected:
                    log.warning("wake_up_lost", error=repr(error))
            self.is_connected = False
            await asyncio.sleep(RECONNECT_S)

    async def _hear(self) -> None:
        """Return when the connection breaks, or is silent on a ping."""
        async with self._redis.pubsub() as calls:  # pyright: ignore[reportUnknownMemberType]
            await calls.subscribe(WAKE_CHANNEL)  # pyright: ignore[reportUnknownMemberType]
            is_asked = False
            while not _is_cancelled():
                message = await calls.get_message(timeout=PING_S)  # pyright: ignore[reportUnknownVariableType]
                heard = cast("dict[str, Any] | None", message)
                if heard is None:
                    if is_asked:
                        return
                    await calls.ping()  # pyright: ignore[reportUnknownMemberType]
                    is_asked = True
                    continue
                is_asked = False
                if heard["type"] != "pong":
                    # Also when the subscription was made, perhaps anew: calls may have been missed.
                    self.is_connected = True
                    self.call()


def _is_cancelled() -> bool:
    """As in queries/freshness.py: redis-py may have swallowed the cancellation of this task."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
