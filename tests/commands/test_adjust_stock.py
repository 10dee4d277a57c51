import asyncio

import msgspec
import pytest

from commands.adjust_stock import AdjustStock
from tests.commands.conftest import House, buy, violations


async def code_of(house: House, command: AdjustStock) -> str:
    answer = await house.submit(command)
    return str(msgspec.json.decode(answer.body).get("code", answer.status))


async def test_a_delta_is_added_and_a_count_replaces_what_the_client_saw(house: House) -> None:
    await house.product("pen", on_hand=5)
    assert await code_of(house, AdjustStock("pen", "main", "found", delta=2)) == "201"
    stale = AdjustStock("pen", "main", "count", set_to=4, expected_on_hand=5)
    assert await code_of(house, stale) == "stale-quantity"
    right = AdjustStock("pen", "main", "count", set_to=4, expected_on_hand=7)
    assert await code_of(house, right) == "201"
    assert await house.pool.fetchval("SELECT on_hand FROM stock_levels") == 4
    assert await violations(house.pool) == []


async def test_what_is_promised_cannot_be_taken_away(house: House) -> None:
    await house.product("pen", on_hand=5)
    await house.submit(buy(await house.customer(), ("pen", 3)))
    lost = AdjustStock("pen", "main", "lost", delta=-3)
    assert await code_of(house, lost) == "would-breach-commitments"
    assert await code_of(house, AdjustStock("pen", "main", "lost", delta=-2)) == "201"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (AdjustStock("none", "main", "x", delta=1), "not-found"),
        (AdjustStock("pen", "main", "x"), "validation"),
        (AdjustStock("pen", "main", "x", delta=0), "validation"),
        (AdjustStock("pen", "main", "x", delta=1, set_to=1), "validation"),
        (AdjustStock("pen", "main", "x", set_to=1), "validation"),
        (AdjustStock("pen", "attic", "x", delta=-1), "would-breach-commitments"),
    ],
)
async def test_refusals_change_nothing(house: House, command: AdjustStock, code: str) -> None:
    await house.product("pen", on_hand=5)
    assert await code_of(house, command) == code
    assert await house.pool.fetchval("SELECT array_agg(on_hand) FROM stock_levels") == [5]


async def test_two_processes_create_one_shelf(house: House, other_house: House) -> None:
    await house.product("pen")
    answers = await asyncio.gather(
        *(
            (house, other_house)[number % 2].submit(AdjustStock("pen", "attic", "x", delta=1))
            for number in range(20)
        )
    )
    assert {answer.status for answer in answers} == {201}
    assert await house.pool.fetchval("SELECT on_hand FROM stock_levels") == 20
    assert await violations(house.pool) == []
