import asyncio

from app.pools import open_postgres, open_redis
from queries.read_side import ReadSide

STARTS = 60


async def test_a_read_side_stops_whenever_it_is_told_to(postgres_url: str, redis_url: str) -> None:
    """Libraries swallow a cancellation now and then: without a second look 6 % of these hang."""
    async with (
        open_postgres(postgres_url, application_name="test", size=4) as pool,
        open_redis(redis_url) as redis,
    ):
        for start in range(STARTS):
            async with asyncio.timeout(10):
                async with ReadSide(pool, redis):
                    await asyncio.sleep(0.001 * (start % 7))
