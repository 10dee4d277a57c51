"""Wake the workers after a commit: coalesced, one publish at a time, and never waited for.

Nothing depends on it. A wake-up that is lost costs the second until the worker looks by itself.
"""

import asyncio
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from queries.cache import WAKE_CHANNEL

INTERVAL_S: Final = 0.001  # not more than one publish per so long
REST_S: Final = 1.0  # Redis did not answer: for so long nobody asks it


class Waker:
    """`wake` notes that something was committed; `run` is the task that tells."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._committed = asyncio.Event()

    def wake(self) -> None:
        """Return at once."""
        self._committed.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        task = asyncio.current_task()
        assert task is not None
        # redis-py sends with asyncio.wait_for, which in Python 3.11 now and then swallows the
        # cancellation (CPython gh-86296); the task remembers it.
        while not task.cancelling():
            await self._committed.wait()
            self._committed.clear()
            try:
                await self._redis.publish(WAKE_CHANNEL, b"")  # pyright: ignore[reportUnknownMemberType]
                await asyncio.sleep(INTERVAL_S)
            except (RedisError, OSError, TimeoutError):
                await asyncio.sleep(REST_S)
