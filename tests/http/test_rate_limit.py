"""The rate limit over HTTP: two processes, one database."""

import asyncio
from collections import Counter

import asyncpg

from app.settings import Settings
from app.web import Web
from tests.http.conftest import NewKey, client_of

QUOTA = 40


async def test_two_processes_never_admit_more_than_the_limit(
    settings: Settings, new_key: NewKey, asyncpg_pool: asyncpg.Pool
) -> None:
    key = await new_key(["stock:read"], requests_per_minute=QUOTA)
    one, other = Web(settings), Web(settings)
    async with one.running(), other.running():
        await no_minute_ends(asyncpg_pool)
        clients = [client_of(one, key), client_of(other, key)]
        answers = await asyncio.gather(
            *(client.get("/v1/stock") for _ in range(100) for client in clients)
        )
        for client in clients:
            await client.http.aclose()
    assert Counter(answer.status_code for answer in answers) == {200: QUOTA, 429: 200 - QUOTA}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["ratelimit-policy"] == f'"default";q={QUOTA};w=60'
    assert refused.headers["ratelimit"].startswith('"default";r=0;t=')
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["violated-policies"] == ["default"]


async def no_minute_ends(pool: asyncpg.Pool) -> None:
    """Wait for the next window if this one has less than 5 s to go."""
    second = await pool.fetchval("SELECT extract(second FROM clock_timestamp())::float8")
    if second > 55:
        await asyncio.sleep(60 - second)


async def test_what_is_left_is_told(web: Web, new_key: NewKey, asyncpg_pool: asyncpg.Pool) -> None:
    client = client_of(web, await new_key(requests_per_minute=100))
    await no_minute_ends(asyncpg_pool)
    async with client.http:
        told = [(await client.get("/v1/stock")).headers["ratelimit"] for _ in range(30)]
    left = [int(each.split(";")[1].removeprefix("r=")) for each in told]
    assert left == list(range(99, 69, -1))


async def test_two_keys_of_an_owner_do_not_share(web: Web, new_key: NewKey) -> None:
    clients = [client_of(web, await new_key(requests_per_minute=1)) for _ in range(2)]
    for client in clients:
        async with client.http:
            assert (await client.get("/v1/stock")).status_code == 200
