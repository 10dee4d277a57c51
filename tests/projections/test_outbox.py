import asyncio
import json
from itertools import pairwise
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest

from commands.place_order import OrderedLine, PlaceOrder
from projections import outbox as outbox_module
from projections.outbox import LANES, TAKE, TAKE_EVENTS, Connection, Outbox, Position
from tests.projections.conftest import Pool, catch_up, differences, projecting, unapplied
from tests.projections.shop import Shop

# 200 thousand events of orders long projected, as one big shop would leave them in a few minutes.
FILL_OUTBOX = """
INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                    occurred_at)
SELECT n % 16, 'order', 'order-' || n, 1, 'order.placed', '{"total_cents": 1}', 'somebody', now()
FROM generate_series(1, 200000) AS n
"""


async def plan_of(connection: Connection, statement: Any, *arguments: Any) -> str:
    """The plan as the projector's session makes it, with its costs and its buffers."""
    await connection.execute("BEGIN")
    try:
        explained = await connection.execute(
            b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement.encode(), arguments
        )
        row = await explained.fetchone()
        assert row is not None
        return json.dumps(row[0])
    finally:
        await connection.rollback()


@pytest.fixture
async def full(psycopg_pool: Pool, shop: Shop) -> str:
    """An outbox with a past; returns the snapshot up to which it is projected."""
    async with psycopg_pool.connection() as connection:
        await connection.execute(FILL_OUTBOX)
        await connection.execute("ANALYZE outbox")
        row = await (await connection.execute("SELECT pg_current_snapshot()::text")).fetchone()
        assert row is not None
        return str(row[0])


async def test_a_batch_costs_the_same_however_long_the_past_is(
    full: str, shop: Shop, psycopg_pool: Pool
) -> None:
    await shop.place(10)
    async with psycopg_pool.connection() as connection:
        outbox = Outbox(connection)
        await outbox.open()
        plan = await plan_of(connection, TAKE, full, None, list(range(LANES)), 1001)
        await outbox.close()
    assert "Seq Scan" not in plan.replace('"Relation Name": "fresh"', "")
    assert "outbox_0_lane_xid_id_idx" in plan
    top = json.loads(plan)[0]["Plan"]
    # Each of the two branches looks into each lane of each partition; a row is a few pages.
    assert top["Shared Hit Blocks"] + top["Shared Read Blocks"] < 1_500


async def test_the_events_of_an_aggregate_are_found_by_its_name(
    full: str, shop: Shop, psycopg_pool: Pool
) -> None:
    async with psycopg_pool.connection() as connection:
        outbox = Outbox(connection)
        await outbox.open()
        plan = await plan_of(connection, TAKE_EVENTS, "order-4711", [4711])
        await outbox.close()
    assert "outbox_0_version" in plan
    assert "Seq Scan" not in plan


async def test_in_flight_transactions_of_long_ago_do_not_make_the_batch_dear(
    full: str, shop: Shop, psycopg_pool: Pool
) -> None:
    """One open writer holds xmin back; what was committed since must not be read again."""
    async with psycopg_pool.connection() as stranger, psycopg_pool.connection() as connection:
        await stranger.execute("BEGIN")
        await stranger.execute("SELECT pg_current_xact_id()")
        await connection.execute(FILL_OUTBOX.replace("'order-'", "'other-'"))
        row = await (await connection.execute("SELECT pg_current_snapshot()::text")).fetchone()
        assert row is not None
        await shop.place(10)
        outbox = Outbox(connection)
        await outbox.open()
        plan = await plan_of(connection, TAKE, row[0], None, list(range(LANES)), 1001)
        await outbox.close()
        await stranger.rollback()
    top = json.loads(plan)[0]["Plan"]
    assert top["Shared Hit Blocks"] + top["Shared Read Blocks"] < 2_000


async def test_a_strangers_open_transaction_stalls_nothing(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with psycopg_pool.connection() as stranger, projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await stranger.execute("BEGIN")
        await stranger.execute(
            "INSERT INTO customers VALUES ($1, 'x', 'x', 1, now(), now())", [uuid4()]
        )
        waits: list[float] = []
        for _ in range(10):
            began = monotonic()
            (order_id,) = await shop.place(1)
            await projector.project()
            seen = await reader.execute("SELECT FROM order_view WHERE order_id = $1", [order_id])
            assert len(await seen.fetchall()) == 1
            waits.append(monotonic() - began)
        assert max(waits) < 1.0
        await stranger.execute("COMMIT")
        await projector.project(move_anyway=True)
    assert await unapplied(reader) == 0


async def test_what_was_in_flight_comes_when_it_is_committed(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        sku = shop.skus.pop()
        order = PlaceOrder(shop.customers[0], "EUR", (OrderedLine(sku, 1),))
        slow = asyncio.create_task(shop.run([order], pauses_s=(0, 0.4)))
        await asyncio.sleep(0.2)
        await shop.place(3)
        await catch_up(projector)
        (placed,) = await slow
        seen = await reader.execute("SELECT FROM order_view WHERE order_id = $1", [placed.order_id])
        assert await seen.fetchall() == []
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_a_backlog_that_is_too_long_to_list_is_listed_in_parts(
    shop: Shop, psycopg_pool: Pool, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "BACKLOG_MAX", 70)
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        for _ in range(10):
            await shop.place(15)
        for _ in range(40):
            projector.events_max = 20
            await projector.project()
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_pages_come_in_the_order_of_ids(shop: Shop, psycopg_pool: Pool) -> None:
    await shop.place(50)
    async with psycopg_pool.connection() as connection:
        outbox = Outbox(connection)
        await outbox.open()
        at, lanes, pages = Position("3:3:"), list(range(LANES)), list[tuple[int, int]]()
        while at.target is not None or not pages:
            async with connection.transaction():
                batch = await outbox.take(at, lanes, target=None, events_max=10)
                row = await (
                    await connection.execute("SELECT min(id), max(id) FROM batch")
                ).fetchone()
                if row is not None and batch.events:
                    pages.append((row[0], row[1]))
                at = batch.reaches
        await outbox.close()
    assert len(pages) > 5
    assert all(before[1] < after[0] for before, after in pairwise(pages))
