"""How a process reaches PostgreSQL and Redis: the caller sets the sizes, this file the timeouts."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import redis.asyncio
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

# A request waits a moment, not longer: a lock that is not free within half a second is refused to
# this one request, and a transaction that its client forgot is ended, because an open one holds
# back vacuum for the whole house.
REQUEST_TIMEOUTS = {
    "statement_timeout": "2s",
    "lock_timeout": "500ms",
    "idle_in_transaction_session_timeout": "5s",
}
TRANSACTION_TIMEOUT = "10s"
# PostgreSQL has transaction_timeout from 17 on; an older server refuses the unknown name.
TRANSACTION_TIMEOUT_SINCE = (17, 0)
SET_TRANSACTION_TIMEOUT = "SELECT set_config('transaction_timeout', $1, false)"

WORKER_TIMEOUTS = {
    "statement_timeout": "30s",
    "lock_timeout": "500ms",
    "idle_in_transaction_session_timeout": "5s",
}

CONNECT_TIMEOUT_S = 5
# Longer than any statement may take on the server, so it fires only when the server cannot answer.
COMMAND_TIMEOUT_S = 5.0
ACQUIRE_TIMEOUT_S = 5.0

REDIS_TIMEOUT_S = 1.0
REDIS_HEALTH_CHECK_S = 15
# Far above what one process uses; a leak shows as an error, not as an exhausted server.
REDIS_CONNECTIONS_MAX = 64


@asynccontextmanager
async def open_postgres(
    url: str, *, application_name: str, size: int
) -> AsyncGenerator["asyncpg.Pool[asyncpg.Record]"]:
    """Open an asyncpg pool for requests: at most `size` connections, made when first needed.

    It opens while the server is away (the health report says so), and each acquired connection
    has the session timeouts above. A released connection is not reset on the server, which saves
    a round trip: no caller may change session state (SET without LOCAL, LISTEN, session locks).

    Raises:
        OSError, asyncpg.PostgresError: by whoever acquires, when the server cannot be reached.
    """
    pool = asyncpg.create_pool(
        url,
        min_size=0,
        max_size=size,
        # Connections and their prepared statements stay: re-making them costs a request 5 ms.
        max_inactive_connection_lifetime=0,
        max_cached_statement_lifetime=0,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=COMMAND_TIMEOUT_S,
        # Just-in-time compilation costs more than any of our short statements takes.
        server_settings={
            "application_name": application_name,
            "jit": "off",
            "timezone": "UTC",
            **REQUEST_TIMEOUTS,
        },
        init=_limit_transactions,
        reset=_keep_session,
    )
    async with pool:
        yield pool


@asynccontextmanager
async def open_psycopg(
    url: str, *, application_name: str, size: int
) -> AsyncGenerator[AsyncConnectionPool[AsyncConnection[TupleRow]]]:
    """Open a psycopg pool for workers: at most `size` connections in autocommit, `$1` parameters.

    Transactions are opened by name (`async with connection.transaction()`). Opens while the server
    is away.

    Raises:
        psycopg_pool.PoolTimeout: by whoever waited `ACQUIRE_TIMEOUT_S` without a connection.
    """
    options = {"jit": "off", "timezone": "UTC", **WORKER_TIMEOUTS}
    arguments: dict[str, Any] = {
        "application_name": application_name,
        "autocommit": True,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "cursor_factory": AsyncRawCursor,
        "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
    }
    pool = AsyncConnectionPool[AsyncConnection[TupleRow]](
        url,
        kwargs=arguments,
        min_size=1,
        max_size=size,
        timeout=ACQUIRE_TIMEOUT_S,
        # How long the pool goes on trying in the background; the next caller starts it again.
        reconnect_timeout=10 * ACQUIRE_TIMEOUT_S,
        open=False,
    )
    async with pool:
        yield pool


@asynccontextmanager
async def open_redis(url: str) -> AsyncGenerator["redis.asyncio.Redis"]:
    """Open a Redis client with binary replies; every command ends within `REDIS_TIMEOUT_S`.

    A subscriber reads with `get_message(timeout=...)`: the socket's own time limit ends a listener
    that waits without one.

    Raises:
        redis.RedisError: by each command while the server is away. Nothing is lost with it.
    """
    client = redis.asyncio.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        decode_responses=False,
        max_connections=REDIS_CONNECTIONS_MAX,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        health_check_interval=REDIS_HEALTH_CHECK_S,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def _limit_transactions(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    if connection.get_server_version()[:2] >= TRANSACTION_TIMEOUT_SINCE:
        await connection.execute(SET_TRANSACTION_TIMEOUT, TRANSACTION_TIMEOUT)


async def _keep_session(_connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    # Called by the pool in place of RESET ALL; an open transaction has been rolled back before.
    return
