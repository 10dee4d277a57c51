import asyncio
import random
from contextlib import suppress

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from commands.register_customer import RegisterCustomer
from projections.audit import audit
from projections.catalogue import READ_MODELS
from projections.checkpoints import HOLD, ForeignCheckpointError
from projections.engine import EVENTS_MAX, Projector, UnknownEventError
from projections.outbox import Connection, Outbox
from tests.projections.conftest import Pool, catch_up, differences, projecting, unapplied
from tests.projections.shop import Shop

# What makes a turn whole again: each read table's content as one value.
FINGERPRINT = """
SELECT (SELECT md5(string_agg(order_view::text, '' ORDER BY order_id)) FROM order_view),
       (SELECT md5(string_agg(order_list::text, '' ORDER BY order_id)) FROM order_list),
       (SELECT md5(string_agg(stock_availability::text, '' ORDER BY sku, location))
        FROM stock_availability)
"""


async def test_what_was_written_is_in_every_read_model(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        first, second = await shop.place(2)
        await shop.cancel(first)
        applied = await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []
    rows = await reader.execute("SELECT order_id, status, version FROM order_view")
    assert set(await rows.fetchall()) == {(first, "cancelled", 2), (second, "placed", 1)}
    assert {model for each in applied for model in each.models} == {
        model.name for model in READ_MODELS
    }


async def test_an_order_that_is_placed_and_cancelled_in_one_batch_is_cancelled(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        (order_id,) = await shop.place(1)
        await shop.cancel(order_id)
        applied = await projector.project()
    assert [each.batch.events for each in applied if each.batch] == [6]
    rows = await reader.execute("SELECT status FROM order_list WHERE order_id = $1", [order_id])
    assert await rows.fetchone() == ("cancelled",)
    assert await differences(reader) == []


async def test_readers_are_told_which_orders_customers_and_skus_changed(
    shop: Shop, psycopg_pool: Pool
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        placed = await shop.run([shop.order(lines=1)])
        (applied,) = await projector.project()
    assert applied.batch is not None
    assert applied.batch.changes.orders == f'[["{placed[0].order_id}",1]]'
    assert applied.batch.changes.customers == f'["{placed[0].customer_id}"]'
    assert applied.batch.changes.skus == f'["{placed[0].lines[0].sku}"]'
    assert applied.lanes == tuple(range(16))


async def test_lanes_without_events_move_too(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(1)
        await catch_up(projector)
    rows = await reader.execute("SELECT count(DISTINCT snapshot::text) FROM projection_checkpoints")
    assert await rows.fetchone() == (1,)


async def test_a_token_without_events_becomes_visible_when_something_was_committed(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        row = await (await reader.execute("SELECT pg_current_xact_id()::text")).fetchone()
        assert await projector.project() == []
        assert await projector.project(move_anyway=True) != []
    visible = await reader.execute(
        "SELECT bool_and(pg_visible_in_snapshot($1::xid8, snapshot)) FROM projection_checkpoints",
        row,
    )
    assert await visible.fetchone() == (True,)


async def test_a_look_tells_whether_there_is_anything_to_do(shop: Shop, psycopg_pool: Pool) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(1)
        await catch_up(projector)
        await projector.mark_published()
        assert not await projector.is_behind()
        await shop.place(1)
        assert await projector.is_behind()


async def test_delivering_everything_again_changes_nothing(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.trade(0.5)
        await catch_up(projector)
        before = await (await reader.execute(FINGERPRINT)).fetchone()
        await reader.execute("UPDATE projection_positions SET snapshot = '3:3:'")
        applied = await catch_up(projector)
        after = await (await reader.execute(FINGERPRINT)).fetchone()
    assert sum(each.batch.events for each in applied if each.batch) > 100
    assert before == after
    assert await differences(reader) == []


async def test_a_backlog_is_applied_page_by_page_within_one_snapshot(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        for _ in range(5):
            await shop.place(20)
        projector.events_max = 30
        turns = 0
        while (await projector.project()) or projector.has_more:
            projector.events_max = 30
            turns += 1
            await shop.place(1)
            if turns == 3:
                rows = await reader.execute(
                    "SELECT count(DISTINCT target::text), min(last_id) > 0"
                    " FROM projection_checkpoints"
                )
                assert await rows.fetchone() == (1, True)
            if turns > 20:
                break
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_a_backlog_of_exactly_so_many_pages_comes_to_its_end(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await shop.run([RegisterCustomer(f"{n}@example.com", "Somebody") for n in range(20)])
        for _ in range(4):
            projector.events_max = 10
            await projector.project()
        assert await unapplied(reader) == 0
        await projector.project()
        assert not projector.has_more


async def test_a_new_worker_goes_on_in_the_middle_of_a_backlog(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    await shop.place(60)
    for _ in range(6):
        async with projecting(psycopg_pool) as projector:
            await projector.project()
            projector.events_max = 15
            await projector.project()
    async with projecting(psycopg_pool) as projector:
        applied = await catch_up(projector)
    assert sum(each.batch.events for each in applied if each.batch and not each.is_again) < 60
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_what_an_earlier_worker_may_not_have_told_is_told_again(
    shop: Shop, psycopg_pool: Pool
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        (order_id,) = await shop.place(1)
        await projector.project()  # and dies before it tells
    async with projecting(psycopg_pool) as projector:
        again = await catch_up(projector)
        assert [str(order_id) in each.batch.changes.orders for each in again if each.batch] == [
            True
        ]
        assert all(each.is_again for each in again)
    async with projecting(psycopg_pool) as projector:
        assert await catch_up(projector) == []


async def test_too_much_to_tell_again_is_told_as_such(shop: Shop, psycopg_pool: Pool) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        projector.announcing = False
        await shop.place(600)
        await shop.place(600)
        while await projector.project() or projector.has_more:
            pass
    async with projecting(psycopg_pool) as projector:
        again = await catch_up(projector)
    assert any(each.batch is None for each in again)


async def test_read_models_that_were_apart_move_together_again(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await shop.place(3)
        async with psycopg_pool.connection() as holder, holder.transaction():
            await holder.execute(HOLD, ["order_list", [0, 1, 2, 3, 4]])
            await projector.project()
            apart = await reader.execute(
                "SELECT count(DISTINCT snapshot::text) FROM projection_checkpoints"
            )
            assert await apart.fetchone() == (2,)
        await shop.place(3)
        await projector.project()
    together = await reader.execute(
        "SELECT count(DISTINCT snapshot::text) FROM projection_checkpoints"
    )
    assert await together.fetchone() == (1,)
    assert await differences(reader) == []


async def test_an_event_that_is_too_new_stops_the_worker_and_is_not_skipped(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await shop.place(1)
        await reader.execute("UPDATE outbox SET type = 'order.teleported' WHERE type LIKE 'order%'")
        with pytest.raises(UnknownEventError, match=r"order\.teleported"):
            await projector.project()
        assert await unapplied(reader) > 0
        await reader.execute("UPDATE outbox SET type = 'order.placed' WHERE type LIKE 'order%'")
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_checkpoints_of_another_server_are_refused(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    await reader.execute("UPDATE projection_models SET system_id = 42")
    with pytest.raises(ForeignCheckpointError, match="42"):
        async with projecting(psycopg_pool):
            pass


async def test_a_batch_that_takes_too_long_is_made_smaller(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await shop.place(30)
        await reader.execute("ALTER TABLE order_view ADD CHECK (pg_sleep(0.004) IS NOT NULL)")
        async with (
            psycopg_pool.connection() as connection,
            Projector(READ_MODELS, read=connection, outbox=Outbox(connection)) as hasty,
        ):
            await hasty.project()
            await connection.execute("SET statement_timeout = '60ms'")
            for _ in range(40):
                with suppress(psycopg.errors.QueryCanceled):
                    await hasty.project()
                if hasty.events_max < EVENTS_MAX and await unapplied(reader) == 0:
                    break
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def run_until(pool: Pool, is_over: asyncio.Event, backends: set[int]) -> None:
    """What a worker does, without its wake-up: project, and begin anew when the connection dies."""
    while not is_over.is_set():
        with suppress(psycopg.Error, PoolTimeout):
            async with (
                pool.connection() as connection,
                Projector(READ_MODELS, read=connection, outbox=Outbox(connection)) as projector,
            ):
                backend = connection.info.backend_pid
                backends.add(backend)
                try:
                    while not is_over.is_set():
                        projector.told(await projector.project())
                        await asyncio.sleep(0.002)
                finally:
                    backends.discard(backend)


@pytest.mark.parametrize("engines", [2, 4])
async def test_engines_that_are_killed_at_any_moment_leave_nothing_wrong(
    shop: Shop, psycopg_pool: Pool, reader: Connection, engines: int
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    is_over, backends, kills = asyncio.Event(), set[int](), 0
    running = [
        asyncio.create_task(run_until(psycopg_pool, is_over, backends)) for _ in range(engines)
    ]
    trading = asyncio.create_task(shop.trade(4.0))
    chance = random.Random(engines)
    while not trading.done():
        await asyncio.sleep(chance.uniform(0.05, 0.15))
        if backends:
            await reader.execute("SELECT pg_terminate_backend($1)", [chance.choice([*backends])])
            kills += 1
    transactions = await trading
    is_over.set()
    await asyncio.gather(*running)
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    assert kills > 20
    assert transactions > 100
    assert await unapplied(reader) == 0
    assert await differences(reader) == []
    parked = await reader.execute("SELECT count(*) FROM projection_parked")
    assert await parked.fetchone() == (0,)


async def test_the_audit_sees_every_aggregate(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(20)
        await catch_up(projector)
    compared = [
        counts[-1]
        for model in READ_MODELS
        if (counts := [n async for n, _ in audit(reader, model)])
    ]
    assert compared == [20, 20, 10]
