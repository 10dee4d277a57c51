"""Every connection has its time limits, and none of them waits for ever."""

import asyncio
import time

import asyncpg
import psycopg
import pytest
from psycopg_pool import PoolTimeout
from redis.exceptions import RedisError

from app import pools
from app.pools import open_postgres, open_psycopg, open_redis

NOWHERE = "postgresql://waybill@/waybill?host=/nowhere"

# Rows: one, of the session's limits.
READ_LIMITS = """
SELECT current_setting('statement_timeout'), current_setting('lock_timeout'),
       current_setting('idle_in_transaction_session_timeout'),
       current_setting('transaction_timeout', true), current_setting('application_name')
"""


async def test_requests_have_short_limits_that_survive_a_return_to_the_pool(
    postgres_url: str,
) -> None:
    async with open_postgres(postgres_url, application_name="waybill-queries", size=1) as pool:
        for _ in range(2):
            limits = await pool.fetchrow(READ_LIMITS)
            assert limits is not None
            assert tuple(limits)[:3] == ("2s", "500ms", "5s")
            assert limits[3] in ("10s", None)  # None: a server before 17
            assert limits[4] == "waybill-queries"


async def test_workers_have_longer_ones(postgres_url: str) -> None:
    async with (
        open_psycopg(postgres_url, application_name="waybill-worker", size=1) as pool,
        pool.connection() as connection,
    ):
        limits = await (await connection.execute(READ_LIMITS)).fetchone()
        assert limits is not None
        assert limits[:3] == ("30s", "500ms", "5s")
        assert limits[4] == "waybill-worker"
        assert connection.autocommit
        assert await (await connection.execute("SELECT $1::int", (7,))).fetchone() == (7,)


async def test_a_transaction_left_open_does_not_reach_the_next_caller(postgres_url: str) -> None:
    async with open_postgres(postgres_url, application_name="waybill-test", size=1) as pool:
        connection = await pool.acquire()
        await connection.execute("BEGIN")
        await pool.release(connection)
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()


async def test_pools_open_while_the_server_is_away_and_say_so_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "ACQUIRE_TIMEOUT_S", 0.2)
    async with open_postgres(NOWHERE, application_name="waybill-test", size=1) as pool:
        with pytest.raises(FileNotFoundError):
            await pool.fetchval("SELECT 1")
    async with open_psycopg(NOWHERE, application_name="waybill-test", size=1) as slow:
        with pytest.raises(PoolTimeout):
            async with slow.connection():
                pass


async def test_a_statement_is_ended_by_its_limit(postgres_url: str) -> None:
    async with open_postgres(postgres_url, application_name="waybill-test", size=1) as pool:
        began = time.monotonic()
        with pytest.raises(asyncpg.QueryCanceledError):
            await pool.fetchval("SELECT pg_sleep(10)")
        assert 1.5 < time.monotonic() - began < 4


async def test_a_lock_that_is_not_free_is_given_up_soon(postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as holder:
        holder.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        async with open_postgres(postgres_url, application_name="waybill-test", size=1) as pool:
            with pytest.raises(asyncpg.LockNotAvailableError):
                await pool.fetchval("SELECT count(*) FROM products")


async def test_a_redis_that_is_away_is_an_error_within_a_second(tmp_path: object) -> None:
    async with open_redis(f"unix://{tmp_path}/nowhere.sock") as client, asyncio.timeout(2):
        with pytest.raises(RedisError):
            await client.get("key")
