"""Lists of orders: what is on them, in which order, and what finding it costs."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, cast, get_args
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from queries.cursor import CURSOR_CHARS_MAX, CursorError
from queries.list_orders import (
    END_OF_TIME,
    EPOCH,
    FIRST_ID,
    LIST_LARGEST,
    LIST_NEWEST,
    LIST_OLDEST,
    LIST_SMALLEST,
    FulfillmentStatus,
    ListOrders,
    PaymentStatus,
    Sort,
    Status,
    list_key,
    list_orders,
    load_orders,
)
from queries.read_side import Connection, ReadSide
from tests.queries.conftest import Shop
from tests.queries.waiting import until

SORTS: tuple[Sort, ...] = get_args(Sort)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SKUS = ("MUG", "CUP", "PEN", "BAG")

INSERT = """
INSERT INTO order_list (order_id, number, customer_id, customer_name, customer_email, currency,
                        status, payment_status, fulfillment_status, return_status, total_cents,
                        line_count, skus, external_reference, version, placed_at, updated_at)
SELECT order_id, number, customer_id, 'Ada', 'ada@example.com', 'EUR', status, payment_status,
       fulfillment_status, 'none', total_cents, array_length(string_to_array(skus, ','), 1),
       string_to_array(skus, ','), NULL, 1, placed_at, placed_at
FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::bigint[],
            $8::text[], $9::timestamptz[])
     AS t (order_id, number, customer_id, status, payment_status, fulfillment_status, total_cents,
           skus, placed_at)
"""


class Row(msgspec.Struct, frozen=True):
    order_id: UUID
    number: int
    customer_id: UUID
    status: Status
    payment_status: PaymentStatus
    fulfillment_status: FulfillmentStatus
    total_cents: int
    skus: tuple[str, ...]
    placed_at: datetime


def row(dice: random.Random, customers: Sequence[UUID], number: int) -> Row:
    """Few different times and totals, so that ties are many."""
    return Row(
        order_id=UUID(int=dice.getrandbits(128)),
        number=number,
        customer_id=dice.choice(customers),
        status=dice.choice(get_args(Status)),
        payment_status=dice.choice(get_args(PaymentStatus)),
        fulfillment_status=dice.choice(get_args(FulfillmentStatus)),
        total_cents=dice.randrange(12) * 100,
        skus=tuple(sorted(dice.sample(SKUS, dice.randint(1, 3)))),
        placed_at=NOON + timedelta(hours=dice.randrange(40), microseconds=dice.randrange(2)),
    )


async def insert(pool: asyncpg.Pool, rows: Sequence[Row]) -> None:
    await pool.execute(
        INSERT,
        [each.order_id for each in rows],
        [each.number for each in rows],
        [each.customer_id for each in rows],
        [each.status for each in rows],
        [each.payment_status for each in rows],
        [each.fulfillment_status for each in rows],
        [each.total_cents for each in rows],
        [",".join(each.skus) for each in rows],
        [each.placed_at for each in rows],
    )


def expected(rows: Sequence[Row], query: ListOrders) -> list[str]:
    """What the list should be, said in Python."""
    key: Callable[[Row], Any] = (
        (lambda each: (each.placed_at, each.order_id))
        if query.sort.endswith("placed_at")
        else (lambda each: (each.total_cents, each.order_id))
    )
    return [
        str(each.order_id)
        for each in sorted(rows, key=key, reverse=query.sort.startswith("-"))
        if query.status in (None, each.status)
        and query.payment_status in (None, each.payment_status)
        and query.fulfillment_status in (None, each.fulfillment_status)
        and query.customer_id in (None, each.customer_id)
        and (query.sku is None or query.sku in each.skus)
        and (query.placed_from is None or each.placed_at >= query.placed_from)
        and (query.placed_to is None or each.placed_at < query.placed_to)
    ]


async def page(read_side: ReadSide, query: ListOrders) -> tuple[list[str], str | None]:
    found = await list_orders(read_side, query)
    body = msgspec.json.decode(found.entry.body)
    assert body["meta"] == {"limit": query.limit, "next_cursor": found.entry.next_cursor}
    return [each["order_id"] for each in body["data"]], found.entry.next_cursor


async def walk(read_side: ReadSide, query: ListOrders) -> list[str]:
    """All pages, one after the other."""
    walked: list[str] = []
    while True:
        ids, next_cursor = await page(read_side, query)
        walked += ids
        if next_cursor is None:
            return walked
        assert len(ids) == query.limit
        query = msgspec.structs.replace(query, cursor=next_cursor)


async def test_a_row_says_what_the_order_is(shop: Shop, read_side: ReadSide) -> None:
    customer_id = await shop.customer()
    order_id = await shop.place(customer_id)
    found = await list_orders(read_side, ListOrders())
    (listed,) = msgspec.json.decode(found.entry.body)["data"]
    assert listed.pop("placed_at") == listed.pop("updated_at")
    assert listed.pop("number") >= 1001
    assert listed == {
        "order_id": str(order_id),
        "status": "placed",
        "payment_status": "unpaid",
        "fulfillment_status": "unfulfilled",
        "return_status": "none",
        "customer": {"customer_id": str(customer_id), "name": "Ada", "email": "ada@example.com"},
        "currency": "EUR",
        "total_cents": 1000,
        "line_count": 1,
        "external_reference": None,
        "version": 1,
    }


async def test_every_filter_and_sort_gives_what_it_says(shop: Shop, read_side: ReadSide) -> None:
    dice = random.Random(1)
    customers = [uuid4() for _ in range(5)]
    rows = [row(dice, customers, number) for number in range(400)]
    await insert(shop.pool, rows)

    def maybe(value: Any) -> Any:
        return value if dice.random() < 0.3 else None

    for number in range(80):
        query = ListOrders(
            status=maybe(dice.choice(get_args(Status))),
            payment_status=maybe(dice.choice(get_args(PaymentStatus))),
            fulfillment_status=maybe(dice.choice(get_args(FulfillmentStatus))),
            customer_id=maybe(dice.choice(customers)),
            sku=maybe(dice.choice(SKUS)),
            placed_from=maybe(NOON + timedelta(hours=dice.randrange(40))),
            placed_to=maybe(NOON + timedelta(hours=dice.randrange(40))),
            sort=SORTS[number % 4],
            limit=dice.choice((3, 7, 100)),
        )
        assert await walk(read_side, query) == expected(rows, query), query


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("status", ["placed", None])
async def test_a_walk_has_no_gaps_and_no_doubles_while_orders_come_in(
    shop: Shop, read_side: ReadSide, sort: Sort, status: Status | None
) -> None:
    dice = random.Random(2)
    customers = [uuid4()]
    first = [row(dice, customers, number) for number in range(300)]
    await insert(shop.pool, first)
    over = asyncio.Event()

    async def keep_inserting() -> int:
        number = 300
        while not over.is_set() and number < 3_000:
            await insert(shop.pool, [row(dice, customers, number + i) for i in range(5)])
            number += 5
            await asyncio.sleep(0.001)
        return number

    inserting = asyncio.create_task(keep_inserting())
    try:
        query = ListOrders(sort=sort, status=status, limit=7)
        walked = await walk(read_side, query)
    finally:
        over.set()
    assert await inserting > 300
    assert len(walked) == len(set(walked))
    there_from_the_start = set(expected(first, query))
    assert [each for each in walked if each in there_from_the_start] == expected(first, query)


QUERY = ListOrders(status="placed", limit=1)


async def cursor_of(shop: Shop, read_side: ReadSide, query: ListOrders) -> str:
    dice = random.Random(3)
    rows = [
        msgspec.structs.replace(row(dice, [uuid4()], number), status="placed")
        for number in range(3)
    ]
    await insert(shop.pool, rows)
    _, next_cursor = await page(read_side, query)
    assert next_cursor is not None
    return next_cursor


async def test_a_cursor_belongs_to_its_query(shop: Shop, read_side: ReadSide) -> None:
    next_cursor = await cursor_of(shop, read_side, QUERY)
    changes: list[dict[str, Any]] = [
        {"status": "confirmed"},
        {"payment_status": "paid"},
        {"fulfillment_status": "delivered"},
        {"customer_id": uuid4()},
        {"sku": "MUG"},
        {"placed_from": NOON},
        {"placed_to": NOON},
        {"sort": "placed_at"},
        {"sort": "-total_cents"},
    ]
    for change in changes:
        with pytest.raises(CursorError, match="belongs"):
            await page(read_side, msgspec.structs.replace(QUERY, cursor=next_cursor, **change))


async def test_a_cursor_belongs_to_its_customer(shop: Shop, read_side: ReadSide) -> None:
    query = ListOrders(status="placed", limit=1)
    next_cursor = await cursor_of(shop, read_side, query)
    with pytest.raises(CursorError, match="belongs"):
        await list_orders(
            read_side, msgspec.structs.replace(query, cursor=next_cursor), customer_id=uuid4()
        )


async def test_the_limit_may_change_from_page_to_page(shop: Shop, read_side: ReadSide) -> None:
    next_cursor = await cursor_of(shop, read_side, QUERY)
    rest = msgspec.structs.replace(QUERY, cursor=next_cursor, limit=50)
    assert len((await page(read_side, rest))[0]) == 2


@pytest.mark.parametrize("sort", SORTS)
async def test_a_bad_cursor_is_refused_and_never_an_error(
    shop: Shop, read_side: ReadSide, sort: Sort
) -> None:
    query = ListOrders(sort=sort, limit=1)
    next_cursor = await cursor_of(shop, read_side, query)
    dice = random.Random(4)
    bad = [
        "",
        "!",
        "é",
        "A",
        "AAAA",
        "x" * (CURSOR_CHARS_MAX + 1),
        next_cursor[:-1],
        next_cursor * 2,
    ]
    bad += ["".join(dice.choices("ABCabc012-_", k=dice.randint(1, 60))) for _ in range(100)]
    for position in range(len(next_cursor)):
        bad.append(next_cursor[:position] + dice.choice("ABab09-_") + next_cursor[position + 1 :])
    refused = 0
    for each in bad:
        try:
            await page(read_side, msgspec.structs.replace(query, cursor=each))
        except CursorError:
            refused += 1
    # What is left has another sort key or id, which is a place in the list like any other.
    assert refused >= len(bad) - len(next_cursor)


async def test_a_storefront_lists_its_own_orders(shop: Shop, read_side: ReadSide) -> None:
    mine, theirs = await shop.customer(), await shop.customer()
    order_id = await shop.place(mine)
    await shop.place(theirs)

    async def listed(query: ListOrders) -> list[str]:
        found = await list_orders(read_side, query, customer_id=mine)
        return [each["order_id"] for each in msgspec.json.decode(found.entry.body)["data"]]

    for _ in range(2):
        assert await listed(ListOrders()) == [str(order_id)]
        assert await listed(ListOrders(customer_id=mine)) == [str(order_id)]
        assert await listed(ListOrders(customer_id=theirs)) == []
    entry = read_side.cached(
        list_key(ListOrders(), customer_id=mine), model="order_list", customer_id=mine
    )
    assert entry is not None
    everybodys, foreign = ListOrders(), ListOrders(customer_id=theirs)
    await list_orders(read_side, everybodys)
    await list_orders(read_side, foreign)
    for query in (everybodys, foreign):
        entry = read_side.cached(
            list_key(query, customer_id=mine), model="order_list", customer_id=mine
        )
        assert entry is None or str(order_id).encode() in entry.body
        assert read_side.cached(list_key(query), model="order_list", customer_id=mine) is None


def test_one_set_of_rows_has_one_key() -> None:
    as_utc = ListOrders(status="placed", placed_from=NOON, sku="MUG")
    elsewhere = datetime.fromisoformat("2026-03-01T14:00:00+02:00")
    parameters = {"sku": "MUG", "placed_from": elsewhere.isoformat(), "status": "placed"}
    assert list_key(msgspec.convert(parameters, ListOrders, strict=False)) == list_key(as_utc)
    customer_id = uuid4()
    assert list_key(ListOrders(customer_id=customer_id)) == list_key(
        ListOrders(), customer_id=customer_id
    )
    assert list_key(ListOrders(placed_from=EPOCH - timedelta(days=9))) == list_key(ListOrders())


def test_different_rows_have_different_keys() -> None:
    one, two = uuid4(), uuid4()
    keys = [
        list_key(ListOrders()),
        list_key(ListOrders(limit=21)),
        list_key(ListOrders(cursor="a")),
        list_key(ListOrders(status="placed")),
        list_key(ListOrders(customer_id=one)),
        list_key(ListOrders(customer_id=two)),
        list_key(ListOrders(customer_id=two), customer_id=one),
        list_key(ListOrders(sku="None")),
        *(list_key(ListOrders(sort=sort)) for sort in SORTS[1:]),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "parameters",
    [
        {"limit": "0"},
        {"limit": "101"},
        {"status": "paid"},
        {"sort": "number"},
        {"customer_id": "me"},
        {"sku": "a:b"},
        {"placed_from": "2026-03-01T00:00:00"},
        {"page": "2"},
    ],
)
def test_a_parameter_that_means_nothing_is_refused(parameters: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(parameters, ListOrders, strict=False)


async def test_times_at_the_edge_of_the_calendar_are_no_error(
    shop: Shop, read_side: ReadSide
) -> None:
    await shop.place()
    first = datetime.fromisoformat("0001-01-01T00:00:00+14:00")
    last = datetime.fromisoformat("9999-12-31T23:59:59-14:00")
    for sort in SORTS:
        whole = ListOrders(placed_from=first, placed_to=last, sort=sort)
        assert len((await page(read_side, whole))[0]) == 1
        assert (await page(read_side, ListOrders(placed_from=last, sort=sort)))[0] == []
        assert (await page(read_side, ListOrders(placed_to=first, sort=sort)))[0] == []


async def test_while_an_order_is_parked_every_list_says_that_it_is_behind(
    shop: Shop, read_side: ReadSide
) -> None:
    await shop.place()
    assert (await list_orders(read_side, ListOrders())).lag_s is None
    parked = str(uuid4())
    await shop.park("order_list", "order", parked)
    change = await shop.apply()
    change.parked = [("order_list", "order", parked)]
    pushes = read_side.freshness.pushes
    await shop.announce(change)
    await until(lambda: read_side.freshness.pushes > pushes)
    for _ in range(2):
        assert (await list_orders(read_side, ListOrders())).lag_s is not None
        assert read_side.cached(list_key(ListOrders()), model="order_list") is None
    await shop.pool.execute("DELETE FROM projection_parked")
    await until(lambda: read_side.freshness.parked_at("order_list", lambda _: True) is None)
    assert (await list_orders(read_side, ListOrders())).lag_s is None


# 40 thousand orders of a year, one every 13 minutes. Statuses go with age, customers and skus are
# many and few: customer 0 has a fortieth of all orders, sku 0 a seventh.
SEED = """
INSERT INTO order_list (order_id, number, customer_id, customer_name, customer_email, currency,
                        status, payment_status, fulfillment_status, return_status, total_cents,
                        line_count, skus, version, placed_at, updated_at)
SELECT md5(n::text)::uuid, n,
       md5('customer ' || CASE WHEN n % 40 = 0 THEN 0 ELSE 1 + n % 1999 END)::uuid,
       'Ada', 'ada@example.com', 'EUR',
       CASE WHEN n % 20 = 0 THEN 'cancelled' WHEN n % 5001 = 0 THEN 'expired' WHEN n > 39600
            THEN 'placed' WHEN n > 39000 THEN 'confirmed' ELSE 'completed' END,
       CASE WHEN n % 20 = 0 THEN 'voided' WHEN n > 39600 THEN 'unpaid' ELSE 'paid' END,
       CASE WHEN n % 20 = 0 OR n > 39300 THEN 'unfulfilled' WHEN n > 39000
            THEN 'partially_fulfilled' ELSE 'delivered' END,
       'none', 100 + (n::bigint * 7919) % 50000, 1,
       ARRAY['SKU-' || floor(500 * power((n::bigint * 104729 % 40000) / 40000.0, 3))],
       1, $1::timestamptz + n * interval '13 minutes', $1 + n * interval '13 minutes'
FROM generate_series(1, 40000) AS n
"""
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY_200 = START + timedelta(days=200)


class Recorder:
    """A connection that explains each statement before it runs it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.pages = 0

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        explained = await self._connection.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement, *arguments
        )
        plan = msgspec.json.decode(explained)[0]["Plan"]
        self.pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        return await self._connection.fetch(statement, *arguments)


FILTERS: list[dict[str, Any]] = [
    {},
    {"status": "completed"},
    {"status": "placed"},
    {"status": "cancelled"},
    {"status": "expired"},
    {"status": "draft"},
    {"payment_status": "unpaid"},
    {"payment_status": "voided"},
    {"fulfillment_status": "partially_fulfilled"},
    {"status": "confirmed", "payment_status": "paid"},
    {"customer": "0"},
    {"customer": "7"},
    {"customer": "0", "status": "cancelled"},
    {"customer": "0", "sku": "SKU-0"},
    {"sku": "SKU-0"},
    {"sku": "SKU-400"},
    {"sku": "SKU-400", "status": "placed"},
    {"placed_from": DAY_200, "placed_to": DAY_200 + timedelta(days=1)},
    {"placed_to": START + timedelta(days=20)},
    *({"customer": str(number)} for number in range(20)),
]


async def test_no_list_reads_much_more_than_it_shows(asyncpg_pool: asyncpg.Pool) -> None:
    """Counted in pages of 8 KB, which no busy machine can blur. The table has 40,000 rows."""
    await asyncpg_pool.execute(SEED, START)
    await asyncpg_pool.execute("VACUUM ANALYZE order_list")
    costs: dict[str, int] = {}
    async with asyncpg_pool.acquire() as connection:
        recorder = Recorder(connection)
        for filters in FILTERS:
            for sort in SORTS:
                wanted = dict(filters)
                customer = wanted.pop("customer", None)
                owner = customer and await connection.fetchval(
                    "SELECT md5('customer ' || $1::text)::uuid", customer
                )
                query = ListOrders(sort=sort, **wanted)
                for place, after in (("first", None), ("deep", middle(sort))):
                    await load_orders(
                        cast("Connection", recorder),
                        query=query,
                        owner=owner,
                        after=after,
                        filters="",
                    )
                    costs[f"{filters} {sort} {place}"] = recorder.pages
        statuses, rest = ("placed", None, None), (END_OF_TIME, EPOCH, FIRST_ID, 21)
        await recorder.fetch(LIST_OLDEST, *statuses, None, None, *rest)
        what_the_plain_statement_reads = recorder.pages
        plans = await connection.fetchrow(
            "SELECT sum(generic_plans) AS general, sum(custom_plans) AS custom"
            " FROM pg_prepared_statements WHERE statement = ANY ($1::text[])",
            [LIST_NEWEST, LIST_OLDEST, LIST_LARGEST, LIST_SMALLEST],
        )
    by_time = {name: pages for name, pages in costs.items() if "placed_at " in name}
    by_total = {name: pages for name, pages in costs.items() if "total_cents " in name}
    assert {name: pages for name, pages in by_time.items() if pages > 600} == {}
    assert {name: pages for name, pages in by_total.items() if pages > 5_000} == {}
    assert median(costs.values()) < 60
    assert what_the_plain_statement_reads > 1_000
    assert plans is not None
    assert plans["general"] == 0
    assert plans["custom"] > 200


def middle(sort: Sort) -> Any:
    key = DAY_200 if sort.endswith("placed_at") else 25_000
    return key, UUID(int=0)
