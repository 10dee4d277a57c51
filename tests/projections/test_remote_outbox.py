"""The read tables in another PostgreSQL: here in another database, which shares no table."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow

from app.pools import open_psycopg
from projections.catalogue import READ_MODELS
from projections.engine import Projector
from projections.order_view import ORDER_VIEW
from projections.rebuild import fill_missing
from projections.remote_outbox import RemoteOutbox
from tests.conftest import TEMPLATE
from tests.projections.conftest import Pool, catch_up
from tests.projections.shop import Shop
from tests.projections.test_engine import FINGERPRINT


@pytest.fixture
def read_url(
    admin: psycopg.Connection[TupleRow], pytestconfig: pytest.Config, postgres_url: str
) -> Generator[str]:
    """A second migrated database, for the read tables."""
    parts = urlsplit(postgres_url)
    name = f"{parts.path.removeprefix('/')}_read"
    database, template = sql.Identifier(name), sql.Identifier(pytestconfig.stash[TEMPLATE])
    admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(database, template))
    yield urlunsplit(parts._replace(path=f"/{name}"))
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@asynccontextmanager
async def projecting_from(write: Pool, read: Pool) -> AsyncGenerator[Projector]:
    async with write.connection() as outbox, read.connection() as tables:
        await fill_missing(tables, READ_MODELS)
        async with Projector(
            READ_MODELS, read=tables, outbox=RemoteOutbox(tables, outbox)
        ) as projector:
            yield projector


async def fingerprint(pool: Pool) -> tuple[object, ...] | None:
    async with pool.connection() as connection:
        return await (await connection.execute(FINGERPRINT)).fetchone()


async def test_read_tables_elsewhere_become_the_same(
    shop: Shop, psycopg_pool: Pool, read_url: str
) -> None:
    async with (
        open_psycopg(read_url, application_name="waybill-test", size=2) as read_pool,
        projecting_from(psycopg_pool, read_pool) as projector,
    ):
        await catch_up(projector)
        await shop.trade(1.0)
        for _ in range(30):
            projector.events_max = 40
            projector.told(await projector.project())
        await catch_up(projector)
        async with psycopg_pool.connection() as connection:
            await fill_missing(connection, READ_MODELS)
        rows = await fingerprint(psycopg_pool)
        assert rows is not None
        async with read_pool.connection() as connection:
            shown = await connection.execute("SELECT count(*) FROM order_view")
            assert await shown.fetchone() != (0,)
        # Stock that has not moved since is missing: these tables began empty, after the opening.
        assert (await fingerprint(read_pool) or ())[:2] == rows[:2]


async def test_what_cannot_be_applied_elsewhere_is_parked_there(
    shop: Shop, psycopg_pool: Pool, read_url: str
) -> None:
    async with (
        open_psycopg(read_url, application_name="waybill-test", size=2) as read_pool,
        projecting_from(psycopg_pool, read_pool) as projector,
    ):
        await catch_up(projector)
        bad, *others = await shop.place(4)
        async with psycopg_pool.connection() as connection:
            await connection.execute(
                "UPDATE outbox SET data = data - 'number' WHERE aggregate_id = $1", [str(bad)]
            )
        applied = await catch_up(projector)
        async with read_pool.connection() as connection:
            rows = await connection.execute("SELECT order_id FROM order_view")
            assert {order_id for (order_id,) in await rows.fetchall()} == set(others)
    parked = {(each.read_model, each.aggregate_id) for turn in applied for each in turn.parked}
    assert (ORDER_VIEW.name, str(bad)) in parked
