"""A shop on a fresh database, and what projects it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from projections.audit import Difference, audit
from projections.catalogue import READ_MODELS
from projections.engine import Applied, Projector
from projections.outbox import Connection, Outbox
from projections.read_model import ReadModel
from projections.rebuild import fill_missing
from tests.projections.shop import Shop

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


@pytest.fixture
async def shop(asyncpg_pool: "asyncpg.Pool[asyncpg.Record]") -> Shop:
    shop = Shop(asyncpg_pool)
    await shop.open()
    return shop


@pytest.fixture
async def reader(psycopg_pool: Pool) -> AsyncGenerator[Connection]:
    """A connection to look at the database with."""
    async with psycopg_pool.connection() as connection:
        yield connection


@asynccontextmanager
async def projecting(
    pool: Pool, models: Sequence[ReadModel] = READ_MODELS
) -> AsyncGenerator[Projector]:
    """A projector on a connection of its own; the read models are filled if they never were."""
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(pool.connection())
        await fill_missing(connection, models)
        yield await stack.enter_async_context(
            Projector(models, read=connection, outbox=Outbox(connection))
        )


async def catch_up(projector: Projector) -> list[Applied]:
    """Project until nothing is left, as the worker does."""
    applied: list[Applied] = []
    for _ in range(100_000):
        turn = await projector.project()
        projector.told(turn)
        applied += turn
        if not projector.has_more:
            return applied
    raise AssertionError("it never ends")


async def differences(
    connection: Connection, models: Sequence[ReadModel] = READ_MODELS
) -> list[Difference]:
    """What the audit finds."""
    return [
        each
        for model in models
        async for _, differing in audit(connection, model)
        for each in differing
    ]


async def unapplied(connection: Connection) -> int:
    """Events that some read model does not contain."""
    cursor = await connection.execute(
        """
        SELECT count(*)
        FROM outbox
        JOIN projection_checkpoints AS checkpoint USING (lane)
        WHERE NOT pg_visible_in_snapshot(outbox.xid, checkpoint.snapshot)
        """
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
