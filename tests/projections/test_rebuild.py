import asyncio

import psycopg
import pytest

from projections.audit import TooFarBehindError, audit
from projections.catalogue import READ_MODELS
from projections.checkpoints import HOLD
from projections.engine import Projector
from projections.order_list import ORDER_LIST
from projections.order_view import ORDER_VIEW
from projections.outbox import Connection, Outbox
from projections.parking import rederive
from projections.rebuild import fill, fill_missing, reanchor
from projections.stock_availability import STOCK_AVAILABILITY
from tests.projections.conftest import Pool, catch_up, differences, projecting, unapplied
from tests.projections.shop import Shop


async def test_read_models_that_never_were_are_filled_in_the_middle_of_writers(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    await shop.place(30)
    trading = asyncio.create_task(shop.trade(1.5))
    await asyncio.sleep(0.5)
    async with projecting(psycopg_pool) as projector:
        while not trading.done():
            await projector.project()
            await asyncio.sleep(0.01)
        await catch_up(projector)
    assert await trading > 50
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_a_rebuild_under_writers_loses_and_doubles_nothing(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(30)
        await catch_up(projector)
        await reader.execute("UPDATE order_list SET status = 'nonsense'")
        trading = asyncio.create_task(shop.trade(2.0))
        rebuilt = 0
        while not trading.done():
            await projector.project()
            if rebuilt < 3:
                for model in READ_MODELS:
                    assert await fill(reader, model, anew=True)
                rebuilt += 1
            await asyncio.sleep(0.02)
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_readers_see_the_old_rows_until_a_rebuild_is_done(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(5)
        await catch_up(projector)
        async with psycopg_pool.connection() as rebuilding, rebuilding.transaction():
            await fill(rebuilding, ORDER_VIEW, anew=True)
            rows = await reader.execute("SELECT count(*) FROM order_view")
            assert await rows.fetchone() == (5,)
            await shop.place(1)
            await projector.project()  # the other read models go on meanwhile
            rows = await reader.execute("SELECT count(*) FROM order_list")
            assert await rows.fetchone() == (6,)
        await catch_up(projector)
    assert await differences(reader) == []


async def test_a_read_model_is_filled_once(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    await shop.place(3)

    async def start() -> None:
        async with psycopg_pool.connection() as connection:
            await fill_missing(connection, READ_MODELS)

    await asyncio.gather(start(), start(), start())
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    assert await differences(reader) == []


async def test_newer_code_rebuilds_its_read_model_and_older_code_leaves_it_alone(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(3)
        await catch_up(projector)
        await reader.execute("UPDATE order_list SET skus = '{}'")
        await reader.execute(
            "UPDATE projection_models SET version = 0 WHERE read_model = 'order_list'"
        )
        await shop.place(1)
        await catch_up(projector)
        rows = await reader.execute("SELECT count(*) FROM order_list")
        assert await rows.fetchone() == (3,)  # of another version: not ours to move
        assert await fill_missing(reader, READ_MODELS) == ([ORDER_LIST], [])
        await catch_up(projector)
    assert await differences(reader) == []


async def test_the_audit_finds_a_planted_fault_and_repairs_it(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        changed, missing, *_ = await shop.place(5)
        await catch_up(projector)
    await reader.execute("UPDATE order_view SET total_cents = 1 WHERE order_id = $1", [changed])
    await reader.execute("DELETE FROM order_list WHERE order_id = $1", [missing])
    await reader.execute(
        "INSERT INTO stock_availability VALUES ('GHOST', 'main', 1, 0, 0, 1, 1, now())"
    )
    found = {
        (each.aggregate_id, each.shown is None, each.expected is None)
        for each in (await differences(reader))
    }
    assert found == {
        (str(changed), False, False),
        (str(missing), True, False),
        ("GHOST@main", False, True),
    }
    await rederive(reader, ORDER_VIEW, str(changed))
    await rederive(reader, ORDER_LIST, str(missing))
    await rederive(reader, STOCK_AVAILABILITY, "GHOST@main")
    assert await differences(reader) == []


async def test_audits_under_writers_raise_no_false_alarm(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await shop.place(30)
        await catch_up(projector)
        trading = asyncio.create_task(shop.trade(3.0))
        audits = alarms = 0
        while not trading.done():
            alarms += len(await differences(reader))
            audits += 1
            if audits % 3 == 0:
                await projector.project()
        await catch_up(projector)
    assert audits > 10
    assert alarms == 0


async def test_an_audit_that_has_nothing_to_compare_says_so(
    shop: Shop, psycopg_pool: Pool, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    await shop.place(5)
    monkeypatch.setattr("projections.audit.BEHIND_MAX", 3)
    with pytest.raises(TooFarBehindError):
        await differences(reader)


async def test_stretches_cover_everything_once(
    shop: Shop, psycopg_pool: Pool, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with projecting(psycopg_pool) as projector:
        placed = await shop.place(10)
        await catch_up(projector)
    for order_id in placed:
        await reader.execute(
            "UPDATE order_view SET currency = 'XXX' WHERE order_id = $1", [order_id]
        )
    monkeypatch.setattr("projections.audit.STRETCH_MAX", 3)
    found = [each async for _, differing in audit(reader, ORDER_VIEW) for each in differing]
    assert sorted(each.aggregate_id for each in found) == sorted(map(str, placed))


async def test_a_restored_copy_becomes_its_own_again(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    """As after a dump into a new server: other identifier, transaction ids of the future."""
    async with projecting(psycopg_pool) as projector:
        await shop.place(5)
        await catch_up(projector)
    await reader.execute("UPDATE outbox SET xid = '999999999999'")
    await reader.execute("UPDATE projection_models SET system_id = 1")
    await reader.execute("UPDATE projection_positions SET snapshot = '999:999999999999:'")
    assert await reanchor(reader)
    for model in READ_MODELS:
        assert await fill(reader, model, anew=True)
    assert not await reanchor(reader)
    async with projecting(psycopg_pool) as projector:
        await shop.place(1)
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_filling_waits_for_whoever_moves_the_lanes(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    async with psycopg_pool.connection() as holder:
        await holder.execute("BEGIN")
        await holder.execute(HOLD, ["order_view", [3, 4]])
        filling = asyncio.create_task(fill(reader, ORDER_VIEW, anew=True))
        await asyncio.sleep(0.7)
        assert not filling.done()
        await holder.execute("COMMIT")
        assert await filling


async def test_a_broken_connection_is_the_workers_business(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with psycopg_pool.connection() as connection:
        await fill_missing(connection, READ_MODELS)
        async with Projector(READ_MODELS, read=connection, outbox=Outbox(connection)) as projector:
            await catch_up(projector)
            await reader.execute("SELECT pg_terminate_backend($1)", [connection.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                await projector.project()
