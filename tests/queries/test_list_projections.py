"""How far each read model is, as operators see it."""

from typing import Any
from uuid import uuid4

import msgspec
import pytest

from queries.lag import Lag
from queries.list_projections import STOPPED_S, judge, list_projections
from queries.read_side import ReadSide
from tests.queries.conftest import MODELS, Shop

BEGIN_PAGING = """
INSERT INTO projection_positions (read_models, lanes, snapshot, target, last_id, published,
                                  moved_at)
SELECT ARRAY[$1::text], ARRAY[$2::smallint], snapshot, pg_current_snapshot(), 1, published,
       now() - interval '9 s'
FROM projection_positions
"""


async def listed(read_side: ReadSide) -> dict[str, dict[str, Any]]:
    found = await list_projections(read_side)
    return {each["read_model"]: each for each in msgspec.json.decode(found.entry.body)["data"]}


async def test_read_models_without_work_are_current(shop: Shop, read_side: ReadSide) -> None:
    projections = await listed(read_side)
    assert sorted(projections) == sorted(MODELS)
    assert projections["order_list"] == {
        "read_model": "order_list",
        "version": 1,
        "state": "current",
        "lag_s": 0.0,
        "lag_events": 0,
        "parked_count": 0,
        "parked": [],
    }


async def test_what_is_not_applied_is_counted_and_timed(shop: Shop, read_side: ReadSide) -> None:
    customer_id = await shop.customer()
    for _ in range(3):
        await shop.write(uuid4(), 1, customer_id)
    await shop.pool.execute("UPDATE outbox SET occurred_at = occurred_at - interval '4 s'")
    for projection in (await listed(read_side)).values():
        assert (projection["state"], projection["lag_events"]) == ("behind", 3)
        assert 4 <= projection["lag_s"] < 6
    await shop.announce(await shop.apply())
    for projection in (await listed(read_side)).values():
        assert (projection["state"], projection["lag_events"]) == ("current", 0)


async def test_an_event_that_was_in_flight_at_the_checkpoint_is_counted_once(
    shop: Shop, read_side: ReadSide
) -> None:
    customer_id = await shop.customer()
    async with shop.pool.acquire() as stranger:
        transaction = stranger.transaction()
        await transaction.start()
        await stranger.execute(
            "INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data,"
            " actor, occurred_at) VALUES (0, 'order', 'x', 1, 'order.placed', '{}', 'test', now())"
        )
        await shop.write(uuid4(), 1, customer_id)
        await shop.announce(await shop.apply())
        assert (await listed(read_side))["order_view"]["lag_events"] == 0
        await transaction.commit()
    await shop.write(uuid4(), 1, customer_id)
    assert (await listed(read_side))["order_view"]["lag_events"] == 2


async def test_while_a_batch_is_paged_the_lag_is_that_of_its_snapshot(
    shop: Shop, read_side: ReadSide
) -> None:
    await shop.write(uuid4(), 1, await shop.customer())
    await shop.pool.execute(BEGIN_PAGING, "order_view", 0)
    assert 9 <= (await listed(read_side))["order_view"]["lag_s"] < 11


async def test_what_is_parked_is_shown_with_its_error(shop: Shop, read_side: ReadSide) -> None:
    for number in range(3):
        await shop.park("order_list", "order", f"order {number}")
    projections = await listed(read_side)
    assert projections["order_view"]["state"] == "current"
    parked = projections["order_list"]
    assert (parked["state"], parked["parked_count"]) == ("parked", 3)
    assert parked["parked"][0].pop("parked_at")
    assert parked["parked"][0] == {
        "aggregate": "order",
        "aggregate_id": "order 0",
        "event_id": 1,
        "attempts": 3,
        "error": "no",
    }


LONG, SHORT = STOPPED_S + 1, STOPPED_S - 1


@pytest.mark.parametrize(
    ("lag_s", "still_s", "is_behind", "is_parked", "state"),
    [
        (0.0, SHORT, False, False, "current"),
        (0.0, LONG, False, False, "current"),
        (SHORT, SHORT, True, False, "behind"),
        (SHORT, LONG, True, False, "behind"),  # idle for long, and an event has just come
        (LONG, SHORT, True, False, "behind"),  # much to do, and it is being done
        (LONG, LONG, True, False, "stopped"),
        (SHORT, SHORT, True, True, "parked"),
        (LONG, LONG, True, True, "stopped"),
        (0.0, LONG, False, True, "parked"),
    ],
)
def test_the_worst_is_told(
    lag_s: float, still_s: float, is_behind: bool, is_parked: bool, state: str
) -> None:
    lag = Lag("x", version=1, lag_s=lag_s, lag_events=int(is_behind), lanes_behind=(0,))
    assert judge(lag, still_s=still_s, is_parked=is_parked) == state


async def test_a_lane_that_does_not_move_is_noticed(shop: Shop, read_side: ReadSide) -> None:
    known = read_side.freshness
    assert known.still_s("order_view", [3]) > 0
    assert known.still_s("order_view", []) == 0
    assert known.still_s("unknown", [3]) == 0
    await shop.apply()
    await known.wait_for("order_view", 2**60, 0.1)
    assert known.still_s("order_view", range(16)) < 0.2
