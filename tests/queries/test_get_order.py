"""One order, through every tier, and never a false 404."""

import asyncio
from uuid import uuid4

import msgspec

from queries.get_order import ORDER_VIEW, get_order, order_key
from queries.read_side import Absent, Behind, Found, ReadSide
from tests.queries.conftest import Shop
from tests.queries.waiting import until


async def test_an_order_is_shown_whole(shop: Shop, read_side: ReadSide) -> None:
    customer_id = await shop.customer()
    order_id = await shop.place(customer_id)

    found = await get_order(read_side, order_id)

    assert isinstance(found, Found)
    assert found.entry.etag == '"v1"'
    assert found.lag_s is None
    order = msgspec.json.decode(found.entry.body)
    number = await shop.pool.fetchval("SELECT number FROM orders")
    placed_at = order.pop("placed_at")
    assert placed_at.endswith("Z")
    assert order.pop("updated_at") == placed_at
    assert order == {
        "order_id": str(order_id),
        "number": number,
        "status": "placed",
        "payment_status": "unpaid",
        "fulfillment_status": "unfulfilled",
        "return_status": "none",
        "customer": {"customer_id": str(customer_id), "name": "Ada", "email": "ada@example.com"},
        "currency": "EUR",
        "total_cents": 1000,
        "lines": [
            {
                "line_no": 1,
                "sku": "MUG",
                "location": "main",
                "name": "Mug",
                "quantity": 2,
                "unit_price_cents": 500,
                "line_total_cents": 1000,
            }
        ],
        "allowed_actions": ["cancel"],
        "external_reference": None,
        "version": 1,
    }


async def test_the_second_read_waits_for_nothing(shop: Shop, read_side: ReadSide) -> None:
    order_id = await shop.place()
    found = await get_order(read_side, order_id)
    assert isinstance(found, Found)

    assert read_side.cached(order_key(order_id), model=ORDER_VIEW) is found.entry
    assert read_side.loads == 1


async def test_another_process_finds_it_in_redis(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    order_id = await shop.place()
    first = await get_order(read_side, order_id)
    assert isinstance(first, Found)
    assert other.shared is not None
    shared = other.shared

    await asyncio.sleep(0.05)
    second = await get_order(other, order_id)

    assert isinstance(second, Found)
    assert second.entry.body == first.entry.body
    assert second.entry.customer_id == first.entry.customer_id
    assert (other.loads, shared.hits) == (0, 1)


async def test_what_does_not_exist_is_absent_at_once(shop: Shop, read_side: ReadSide) -> None:
    assert await get_order(read_side, uuid4(), wait_s=5) == Absent()


async def test_an_order_that_is_not_projected_yet_is_waited_for(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = uuid4()
    await shop.write(order_id, 1, await shop.customer())
    reading = asyncio.create_task(get_order(read_side, order_id, wait_s=5))
    await until(lambda: read_side.freshness.waiting == 1)
    assert not reading.done()

    await shop.announce(await shop.apply(order_id))

    found = await reading
    assert isinstance(found, Found)
    assert found.entry.version == 1
    assert found.lag_s is None
    assert found.waited_s > 0


async def test_it_is_waited_for_without_a_push_too(shop: Shop, read_side: ReadSide) -> None:
    order_id = uuid4()
    await shop.write(order_id, 1, await shop.customer())
    reading = asyncio.create_task(get_order(read_side, order_id, wait_s=5))
    await until(lambda: read_side.freshness.waiting == 1)

    await shop.apply(order_id)

    assert isinstance(await asyncio.wait_for(reading, 0.5), Found)


async def test_an_order_that_does_not_appear_in_time_is_behind_and_not_absent(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = uuid4()
    await shop.write(order_id, 1, await shop.customer())

    behind = await get_order(read_side, order_id, wait_s=0.1)

    assert isinstance(behind, Behind)
    assert behind.lag_s >= 0.1
    assert 0.1 <= behind.waited_s < 0.5


async def test_a_storefront_sees_no_foreign_order(shop: Shop, read_side: ReadSide) -> None:
    mine, theirs = await shop.customer(), await shop.customer()
    order_id = await shop.place(theirs)

    assert isinstance(await get_order(read_side, order_id, customer_id=mine), Absent)
    assert isinstance(await get_order(read_side, order_id, customer_id=theirs), Found)
    key = order_key(order_id)
    assert read_side.cached(key, model=ORDER_VIEW, customer_id=theirs) is not None
    assert read_side.cached(key, model=ORDER_VIEW, customer_id=mine) is None
    assert isinstance(await get_order(read_side, order_id, customer_id=mine), Absent)


async def test_the_owner_is_known_of_bytes_from_redis_too(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    mine, theirs = await shop.customer(), await shop.customer()
    order_id = await shop.place(theirs)
    await get_order(read_side, order_id)
    await asyncio.sleep(0.05)

    assert isinstance(await get_order(other, order_id, customer_id=mine), Absent)
    assert other.loads == 0


async def test_a_foreign_order_is_not_betrayed_by_waiting_for_it(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = uuid4()
    await shop.write(order_id, 1, await shop.customer())

    assert (
        await get_order(read_side, order_id, customer_id=await shop.customer(), wait_s=5)
        == Absent()
    )


async def test_a_token_waits_for_its_write(shop: Shop, read_side: ReadSide) -> None:
    order_id = await shop.place()
    await get_order(read_side, order_id)
    xid = await shop.write(order_id, 2, await shop.owner(order_id))
    key = order_key(order_id)
    assert read_side.cached(key, model=ORDER_VIEW) is not None
    assert read_side.cached(key, model=ORDER_VIEW, token_xid=xid) is None
    reading = asyncio.create_task(get_order(read_side, order_id, token_xid=xid, wait_s=5))
    await until(lambda: read_side.freshness.waiting == 1)

    await shop.announce(await shop.apply(order_id))

    found = await reading
    assert isinstance(found, Found)
    assert (found.entry.version, found.lag_s) == (2, None)
    await until(lambda: read_side.freshness.is_announced(ORDER_VIEW, xid))
    assert read_side.cached(key, model=ORDER_VIEW, token_xid=xid) is found.entry


async def test_a_token_that_cannot_be_waited_for_is_answered_with_the_lag(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    xid = await shop.write(order_id, 2, await shop.owner(order_id))

    found = await get_order(read_side, order_id, token_xid=xid, wait_s=0.1)

    assert isinstance(found, Found)
    assert found.entry.version == 1
    assert found.lag_s is not None
    assert 0.1 <= found.lag_s < 2


async def test_a_parked_order_is_behind_with_a_token_and_without(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    await get_order(read_side, order_id)
    xid = await shop.write(order_id, 2, await shop.owner(order_id))
    change = await shop.apply()  # the checkpoint passes the event, the row stays as it was
    await shop.park("order_view", "order", str(order_id))
    change.parked = [("order_view", "order", str(order_id))]
    await shop.announce(change)
    await until(lambda: read_side.freshness.is_announced(ORDER_VIEW, xid))

    assert read_side.cached(order_key(order_id), model=ORDER_VIEW) is None
    for token_xid in (None, xid):
        for _ in range(2):
            found = await get_order(read_side, order_id, token_xid=token_xid, wait_s=5)
            assert isinstance(found, Found)
            assert found.entry.version == 1
            assert found.lag_s is not None
    assert read_side.cached(order_key(order_id), model=ORDER_VIEW) is None

    await shop.pool.execute("DELETE FROM projection_parked")
    await shop.announce(await shop.apply(order_id))
    await until(lambda: not read_side.freshness.parked_at(ORDER_VIEW, lambda _: True))
    found = await get_order(read_side, order_id)
    assert isinstance(found, Found)
    assert (found.entry.version, found.lag_s) == (2, None)


async def test_an_order_that_was_parked_before_it_ever_appeared_is_behind(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = uuid4()
    await shop.write(order_id, 1, await shop.customer())
    await shop.park("order_view", "order", str(order_id))
    await shop.announce(await shop.apply())
    await until(lambda: read_side.freshness.parked_at(ORDER_VIEW, lambda _: True) is not None)

    behind = await get_order(read_side, order_id, wait_s=5)

    assert isinstance(behind, Behind)
    assert behind.waited_s < 1
