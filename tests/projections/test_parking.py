from contextlib import suppress
from uuid import UUID

import psycopg
import pytest

from projections import parking
from projections.audit import audit
from projections.catalogue import READ_MODELS
from projections.engine import Projector
from projections.order_list import ORDER_LIST
from projections.order_view import ORDER_VIEW
from projections.outbox import Connection, Outbox
from projections.parking import RepairError, list_parked, rederive, retry
from tests.projections.conftest import Pool, catch_up, differences, projecting, unapplied
from tests.projections.shop import Shop

# $1 order. What a bug in a writer, or a damaged disk, may leave.
POISON = """
UPDATE outbox
SET data = jsonb_set(data, '{total_cents}', '"a lot"')
WHERE aggregate_id = $1 AND type = $2
"""
CURE = """
UPDATE outbox
SET data = jsonb_set(data, '{total_cents}', (SELECT to_jsonb(total_cents) FROM orders
                                             WHERE order_id::text = $1))
WHERE aggregate_id = $1
"""


async def parked(reader: Connection) -> set[tuple[str, str]]:
    return {(each.read_model, each.aggregate_id) for each, _, _ in await list_parked(reader, None)}


async def poisoned(
    shop: Shop, projector: Projector, reader: Connection, *, type_: str = "order.placed"
) -> tuple[UUID, list[UUID]]:
    """Among ten orders one cannot be applied; returns it and the others."""
    await catch_up(projector)
    order_ids = await shop.place(10)
    bad = order_ids[6]
    if type_ == "order.cancelled":
        await shop.cancel(bad)
    await reader.execute(POISON, [str(bad), type_])
    return bad, [each for each in order_ids if each != bad]


async def test_what_cannot_be_applied_waits_and_the_others_go_on(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        bad, others = await poisoned(shop, projector, reader)
        applied = await catch_up(projector)
        await shop.cancel(others[0])
        await catch_up(projector)
    assert await parked(reader) == {("order_view", str(bad)), ("order_list", str(bad))}
    assert {each.aggregate_id for turn in applied for each in turn.parked} == {str(bad)}
    assert await unapplied(reader) == 0
    rows = await reader.execute("SELECT order_id FROM order_view")
    assert {order_id for (order_id,) in await rows.fetchall()} == set(others)
    assert await differences(reader) == []  # it knows what is parked


async def test_later_events_of_a_parked_aggregate_wait_in_order(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        bad, _ = await poisoned(shop, projector, reader)
        await catch_up(projector)
        await shop.cancel(bad)
        await catch_up(projector)
        await reader.execute(CURE, [str(bad)])
        for model in (ORDER_VIEW, ORDER_LIST):
            assert (await list_parked(reader, model.name))[0][2] == 2
            assert await retry(reader, Outbox(reader), model, str(bad)) is None
    assert await parked(reader) == set()
    rows = await reader.execute("SELECT status, version FROM order_list WHERE order_id = $1", [bad])
    assert await rows.fetchone() == ("cancelled", 2)
    assert await differences(reader) == []


async def test_an_event_in_the_middle_leaves_what_came_before(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        bad, _ = await poisoned(shop, projector, reader, type_="order.cancelled")
        await catch_up(projector)
    rows = await reader.execute("SELECT status FROM order_view WHERE order_id = $1", [bad])
    assert await rows.fetchone() == ("placed",)
    assert ("order_view", str(bad)) in await parked(reader)


async def test_a_retry_that_fails_again_leaves_it_parked(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        bad, _ = await poisoned(shop, projector, reader)
        await catch_up(projector)
        found = await retry(reader, Outbox(reader), ORDER_VIEW, str(bad))
    assert found is not None
    assert "a lot" in found.error
    ((_, attempts, queued),) = await list_parked(reader, "order_view")
    assert (attempts, queued) == (2, 1)


async def test_skipping_leaves_out_the_one_event(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        sku = shop.skus[0]
        await catch_up(projector)
        await shop.adjust(sku)
        await reader.execute(
            "UPDATE outbox SET data = jsonb_set(data, '{on_hand}', '\"x\"')"
            " WHERE aggregate_id = $1 AND aggregate_version = 2",
            [f"{sku}@main"],
        )
        await catch_up(projector)
        await shop.adjust(sku)
        await catch_up(projector)
        model = next(each for each in READ_MODELS if each.name == "stock_availability")
        assert await retry(reader, Outbox(reader), model, f"{sku}@main", skip_first=True) is None
    assert await parked(reader) == set()
    assert await differences(reader) == []  # the next event says the whole level


async def test_rederiving_takes_the_row_from_the_normalized_tables(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        bad, _ = await poisoned(shop, projector, reader)
        await catch_up(projector)
        await shop.cancel(bad)
        for model in (ORDER_VIEW, ORDER_LIST):
            await rederive(reader, model, str(bad))  # before the cancellation is projected
        await catch_up(projector)
    assert await parked(reader) == set()
    rows = await reader.execute("SELECT status, version FROM order_view WHERE order_id = $1", [bad])
    assert await rows.fetchone() == ("cancelled", 2)
    assert await differences(reader) == []


async def test_what_is_not_parked_cannot_be_retried(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool):
        with pytest.raises(RepairError, match="not parked"):
            await retry(reader, Outbox(reader), ORDER_VIEW, "no such order")


async def test_many_poisonous_events_are_all_found(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        order_ids = await shop.place(60)
        bad = order_ids[::7]
        for each in bad:
            await reader.execute(POISON, [str(each), "order.placed"])
        await catch_up(projector)
    assert await parked(reader) == {
        (model, str(each)) for each in bad for model in ("order_view", "order_list")
    }
    rows = await reader.execute("SELECT count(*) FROM order_view")
    assert await rows.fetchone() == (60 - len(bad),)


async def test_a_read_model_that_fails_as_a_whole_rests_and_the_others_go_on(
    shop: Shop, psycopg_pool: Pool, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("projections.engine.REST_S", 0.0)
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await reader.execute("ALTER TABLE order_list RENAME COLUMN skus TO items")
        await shop.place(5)
        await catch_up(projector)
        rows = await reader.execute("SELECT count(*) FROM order_view")
        assert await rows.fetchone() == (5,)
        assert await parked(reader) == set()
        await reader.execute("ALTER TABLE order_list RENAME COLUMN items TO skus")
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_events_that_all_fail_are_the_read_models_fault(
    shop: Shop, psycopg_pool: Pool, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "PARKED_PER_BATCH_MAX", 5)
    monkeypatch.setattr("projections.engine.REST_S", 0.0)
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        await reader.execute("ALTER TABLE order_list ADD CONSTRAINT wrong CHECK (total_cents < 0)")
        await shop.place(10)
        await catch_up(projector)
        assert await parked(reader) == set()
        await reader.execute("ALTER TABLE order_list DROP CONSTRAINT wrong")
        await catch_up(projector)
    assert await unapplied(reader) == 0
    assert await differences(reader) == []


async def test_an_event_that_alone_takes_too_long_is_parked(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
        order_ids = await shop.place(4)
        await reader.execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(5); RETURN new; END $$"
        )
        number = await reader.execute(
            "SELECT number FROM orders WHERE order_id = $1", [order_ids[1]]
        )
        row = await number.fetchone()
        assert row is not None
        await reader.execute(
            b"CREATE TRIGGER dawdle BEFORE INSERT ON order_view FOR EACH ROW"
            b" WHEN (new.number = %d) EXECUTE FUNCTION dawdle()" % row[0]
        )
        await project_in_haste(psycopg_pool)
    assert await parked(reader) == {("order_view", str(order_ids[1]))}
    assert await unapplied(reader) == 0


async def project_in_haste(pool: Pool) -> None:
    """Project with a short time limit until nothing is left, as the worker does."""
    async with (
        pool.connection() as connection,
        Projector(READ_MODELS, read=connection, outbox=Outbox(connection)) as projector,
    ):
        await connection.execute("SET statement_timeout = '150ms'")
        for _ in range(60):
            with suppress(psycopg.errors.QueryCanceled):
                await projector.project()


async def deaths(pool: Pool, times: int) -> None:
    """Let so many workers take up the work and die of it, or do it."""
    for _ in range(times):
        with suppress(psycopg.OperationalError):
            async with (
                pool.connection() as connection,
                Projector(READ_MODELS, read=connection, outbox=Outbox(connection)) as projector,
            ):
                await catch_up(projector)


async def test_an_event_that_kills_its_worker_is_found_and_parked(
    shop: Shop, psycopg_pool: Pool, reader: Connection
) -> None:
    async with projecting(psycopg_pool) as projector:
        await catch_up(projector)
    order_ids = await shop.place(10)
    await reader.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN new; END $$"
    )
    number = await reader.execute("SELECT number FROM orders WHERE order_id = $1", [order_ids[4]])
    row = await number.fetchone()
    assert row is not None
    await reader.execute(
        b"CREATE TRIGGER die BEFORE INSERT ON order_list FOR EACH ROW"
        b" WHEN (new.number = %d) EXECUTE FUNCTION die()" % row[0]
    )
    await deaths(psycopg_pool, 3)
    assert await parked(reader) == set()
    await deaths(psycopg_pool, 6)
    assert await parked(reader) == {("order_list", str(order_ids[4]))}
    assert await unapplied(reader) == 0
    assert await differences(reader) == []
    attempts = await reader.execute(
        "SELECT count(*) FROM projection_attempts WHERE started <> finished OR alone_id IS NOT NULL"
    )
    assert await attempts.fetchone() == (0,)
    compared = [n async for n, _ in audit(reader, ORDER_VIEW)]
    assert compared == [10]
