from uuid import UUID, uuid4

import msgspec

from commands.cancel_order import CancelOrder
from commands.command import Principal
from tests.commands.conftest import BACK_OFFICE, House, buy, violations


async def place(house: House) -> UUID:
    await house.product("pen", on_hand=5)
    answer = await house.submit(buy(await house.customer(), ("pen", 2), ("pen", 1)))
    return UUID(msgspec.json.decode(answer.body)["aggregate_id"])


async def test_cancelling_gives_the_stock_back(house: House) -> None:
    order_id = await place(house)
    answer = await house.submit(CancelOrder(order_id, "changed my mind"))
    assert msgspec.json.decode(answer.body)["version"] == 2
    assert await house.pool.fetchval("SELECT allocated FROM stock_levels") == 0
    assert await violations(house.pool) == []


async def test_a_cancelled_order_is_not_cancelled_again(house: House) -> None:
    order_id = await place(house)
    await house.submit(CancelOrder(order_id, "once"))
    again = await house.submit(CancelOrder(order_id, "twice"))
    assert msgspec.json.decode(again.body)["code"] == "invalid-transition"
    assert await violations(house.pool) == []


async def test_a_stale_version_is_refused(house: House) -> None:
    order_id = await place(house)
    stale = await house.submit(CancelOrder(order_id, "no"), expected_version=7)
    assert msgspec.json.decode(stale.body)["code"] == "precondition-failed"
    right = await house.submit(CancelOrder(order_id, "no"), expected_version=1)
    assert right.status == 201


async def test_an_order_of_somebody_else_does_not_exist(house: House) -> None:
    order_id = await place(house)
    grace = Principal(uuid4(), "storefront", frozenset(), uuid4(), 1000)
    foreign = await house.submit(CancelOrder(order_id, "no"), principal=grace)
    absent = await house.submit(CancelOrder(uuid4(), "no"), principal=BACK_OFFICE)
    for answer in (foreign, absent):
        assert msgspec.json.decode(answer.body)["code"] == "not-found"
