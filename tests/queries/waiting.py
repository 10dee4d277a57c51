"""Wait for what another task is about to do."""

import asyncio
from collections.abc import Callable


async def until(is_true: Callable[[], bool], *, within_s: float = 5.0) -> None:
    """Look every 2 ms.

    Raises:
        TimeoutError: it did not come true.
    """
    async with asyncio.timeout(within_s):
        while not is_true():  # noqa: ASYNC110 (whatever it is that comes true has no event)
            await asyncio.sleep(0.002)
