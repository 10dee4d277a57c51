"""Stock levels: by sku, by location, page by page."""

from uuid import uuid4

import asyncpg
import msgspec
import pytest

from queries.cursor import CursorError
from queries.list_orders import ListOrders, list_orders
from queries.list_stock import STOCK_AVAILABILITY, ListStock, list_stock, stock_key
from queries.read_side import ReadSide
from tests.queries.conftest import Shop
from tests.queries.waiting import until

INSERT = """
INSERT INTO stock_availability (sku, location, on_hand, allocated, reserved, available, version,
                                updated_at)
SELECT sku, location, 9, 2, 1, 6, 4, '2026-03-01T12:00Z'
FROM unnest($1::text[]) AS sku, unnest($2::text[]) AS location
"""
SKUS = ["BAG", "CUP", "MUG", "PEN", "a.b", "a_b"]
LOCATIONS = ["east", "main", "west"]
ALL = [(sku, location) for sku in SKUS for location in LOCATIONS]


@pytest.fixture(autouse=True)
async def levels(shop: Shop) -> None:
    await shop.pool.execute(INSERT, SKUS, LOCATIONS)


async def page(read_side: ReadSide, query: ListStock) -> tuple[list[tuple[str, str]], str | None]:
    found = await list_stock(read_side, query)
    body = msgspec.json.decode(found.entry.body)
    assert body["meta"] == {"limit": query.limit, "next_cursor": found.entry.next_cursor}
    return [(each["sku"], each["location"]) for each in body["data"]], found.entry.next_cursor


async def walk(read_side: ReadSide, query: ListStock) -> list[tuple[str, str]]:
    walked: list[tuple[str, str]] = []
    while True:
        levels, next_cursor = await page(read_side, query)
        walked += levels
        if next_cursor is None:
            return walked
        query = msgspec.structs.replace(query, cursor=next_cursor)


async def test_a_level_says_what_there_is(read_side: ReadSide) -> None:
    found = await list_stock(read_side, ListStock(skus=("MUG",), location="main"))
    assert msgspec.json.decode(found.entry.body)["data"] == [
        {
            "sku": "MUG",
            "location": "main",
            "on_hand": 9,
            "allocated": 2,
            "reserved": 1,
            "available": 6,
            "version": 4,
            "updated_at": "2026-03-01T12:00:00Z",
        }
    ]


@pytest.mark.parametrize("limit", [1, 4, 100])
async def test_a_walk_shows_everything_once(read_side: ReadSide, limit: int) -> None:
    assert await walk(read_side, ListStock(limit=limit)) == ALL
    west = [each for each in ALL if each[1] == "west"]
    assert await walk(read_side, ListStock(limit=limit, location="west")) == west
    some = [each for each in ALL if each[0] in ("MUG", "a.b")]
    asked = ListStock(limit=limit, skus=("a.b", "MUG", "none", "MUG"))
    assert await walk(read_side, asked) == some


async def test_a_cursor_belongs_to_its_query(read_side: ReadSide) -> None:
    _, next_cursor = await page(read_side, ListStock(limit=1))
    for query in (
        ListStock(cursor=next_cursor, location="main"),
        ListStock(cursor=next_cursor, skus=("MUG",)),
        ListStock(cursor="AAAA"),
        ListStock(cursor="é"),
    ):
        with pytest.raises(CursorError):
            await page(read_side, query)


async def test_a_cursor_of_orders_is_none_of_stock(shop: Shop, read_side: ReadSide) -> None:
    for _ in range(2):
        await shop.place()
    orders = await list_orders(read_side, ListOrders(limit=1))
    with pytest.raises(CursorError):
        await page(read_side, ListStock(cursor=orders.entry.next_cursor))


def test_one_set_of_levels_has_one_key() -> None:
    assert stock_key(ListStock(skus=("B", "A", "B"))) == stock_key(ListStock(skus=("A", "B")))
    keys = [
        stock_key(query)
        for query in (
            ListStock(),
            ListStock(skus=("A",)),
            ListStock(skus=("A", "B")),
            ListStock(location="A"),
            ListStock(limit=5),
            ListStock(cursor="c"),
        )
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "parameters",
    [{"skus": ["A"] * 101}, {"skus": ["a,b"]}, {"location": "a:b"}, {"limit": "0"}, {"q": "x"}],
)
def test_a_parameter_that_means_nothing_is_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(parameters, ListStock, strict=False)


async def test_a_page_is_behind_when_one_of_its_levels_is_parked(
    shop: Shop, read_side: ReadSide
) -> None:
    mugs, pens, everything = ListStock(skus=("MUG",)), ListStock(skus=("PEN",)), ListStock()
    for query in (mugs, pens, everything):
        assert (await list_stock(read_side, query)).lag_s is None
    await shop.park(STOCK_AVAILABILITY, "stock", "MUG@main")
    await until(
        lambda: read_side.freshness.parked_at(STOCK_AVAILABILITY, lambda _: True) is not None
    )
    assert (await list_stock(read_side, mugs)).lag_s is not None
    assert (await list_stock(read_side, pens)).lag_s is None
    assert (await list_stock(read_side, everything)).lag_s is not None
    assert read_side.cached(stock_key(pens), model=STOCK_AVAILABILITY) is not None
    assert read_side.cached(stock_key(mugs), model=STOCK_AVAILABILITY) is None


async def test_a_token_waits_for_the_level(shop: Shop, read_side: ReadSide) -> None:
    token_xid = await shop.write(uuid4(), 1, await shop.customer())
    query = ListStock(skus=("MUG",))
    await list_stock(read_side, query)
    behind = await list_stock(read_side, query, token_xid=token_xid, wait_s=0.05)
    assert behind.lag_s is not None
    await shop.announce(await shop.apply(stock=("MUG", "main", 3, 5)))
    found = await list_stock(read_side, query, token_xid=token_xid, wait_s=5)
    assert found.lag_s is None
    assert b'"on_hand":3' in found.entry.body


async def test_the_order_of_pages_is_that_of_the_index(asyncpg_pool: asyncpg.Pool) -> None:
    """Code points: a locale's order would split a keyset page from its cursor."""
    collation = await asyncpg_pool.fetchval(
        "SELECT array_agg(sku ORDER BY sku) FROM stock_availability WHERE location = 'main'"
    )
    assert collation == SKUS
