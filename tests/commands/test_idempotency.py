import asyncio
from uuid import UUID

import msgspec

from commands.cancel_order import CancelOrder
from tests.commands.conftest import BACK_OFFICE, House, buy, violations


async def test_fifty_at_once_with_one_key_are_one_order(house: House, other_house: House) -> None:
    await house.product("pen", on_hand=1000)
    command = buy(await house.customer(), ("pen", 1))
    answers = await asyncio.gather(
        *((house, other_house)[number % 2].submit(command, key="once") for number in range(50))
    )
    assert len({(each.status, each.body, each.etag, each.xid) for each in answers}) == 1
    assert sum(not each.replayed for each in answers) == 1
    assert await house.pool.fetchval("SELECT count(*) FROM orders") == 1
    assert await violations(house.pool) == []


async def test_the_same_key_with_another_body_is_refused(house: House) -> None:
    await house.product("pen", on_hand=10)
    ada = await house.customer()
    first = await house.submit(buy(ada, ("pen", 1)), key="once")
    other = await house.submit(buy(ada, ("pen", 2)), key="once")
    assert first.status == 201
    assert msgspec.json.decode(other.body)["code"] == "idempotency-key-reused"
    assert await house.pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_the_same_key_with_another_command_is_refused(house: House) -> None:
    await house.product("pen", on_hand=10)
    placed = await house.submit(buy(await house.customer(), ("pen", 1)), key="once")
    order_id = msgspec.json.decode(placed.body)["aggregate_id"]
    cancelled = await house.submit(CancelOrder(UUID(order_id), "no"), key="once")
    assert msgspec.json.decode(cancelled.body)["code"] == "idempotency-key-reused"


async def test_two_of_one_key_and_different_bodies_in_one_batch(house: House) -> None:
    await house.product("pen", on_hand=10)
    ada = await house.customer()
    answers = await asyncio.gather(
        house.submit(buy(ada, ("pen", 1)), key="once"),
        house.submit(buy(ada, ("pen", 2)), key="once"),
    )
    assert sorted(each.status for each in answers) == [201, 409]


async def test_a_refusal_is_replayed_too(house: House) -> None:
    await house.product("pen")
    command = buy(await house.customer(), ("pen", 1))
    first = await house.submit(command, key="once")
    await house.product("ink", on_hand=1)
    again = await house.submit(command, key="once")
    assert (first.status, first.body) == (again.status, again.body)
    assert again.replayed


async def test_keys_of_two_owners_do_not_meet(house: House) -> None:
    await house.product("pen", on_hand=10)
    command = buy(await house.customer(), ("pen", 1))
    shop = msgspec.structs.replace(BACK_OFFICE, owner="shop")
    one = await house.submit(command, key="same")
    two = await house.submit(command, key="same", principal=shop)
    assert one.body != two.body
