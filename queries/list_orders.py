"""List orders: filters, four sorts and keyset pages over `order_list`."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Final, Literal, TypeAlias, assert_never
from uuid import UUID

import msgspec
from asyncpg import Record
from msgspec import Meta, Struct

from queries import cursor
from queries.cache import Entry
from queries.read_side import CUSTOMER_TAG, ORDERS_TAG, Connection, Found, Lookup, ReadSide

ORDER_LIST: Final = "order_list"

Status: TypeAlias = Literal["draft", "placed", "confirmed", "completed", "expired", "cancelled"]
PaymentStatus: TypeAlias = Literal[
    "unpaid",
    "authorized",
    "partially_paid",
    "paid",
    "overpaid",
    "partially_refunded",
    "refunded",
    "voided",
]
FulfillmentStatus: TypeAlias = Literal[
    "unfulfilled", "partially_fulfilled", "fulfilled", "delivered"
]
Sort: TypeAlias = Literal["-placed_at", "placed_at", "-total_cents", "total_cents"]


class ListOrders(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked. All filters must hold; `placed_to` is exclusive."""

    status: Status | None = None
    payment_status: PaymentStatus | None = None
    fulfillment_status: FulfillmentStatus | None = None
    customer_id: UUID | None = None
    sku: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    placed_from: Annotated[datetime, Meta(tz=True)] | None = None
    placed_to: Annotated[datetime, Meta(tz=True)] | None = None
    sort: Sort = "-placed_at"
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    cursor: str | None = None


class Customer(Struct, frozen=True):
    """The buyer as known when the order was placed."""

    customer_id: UUID
    name: str
    email: str


class ListedOrder(Struct, frozen=True):
    """One row of the list."""

    order_id: UUID
    number: int
    status: str
    payment_status: str
    fulfillment_status: str
    return_status: str
    customer: Customer
    currency: str
    total_cents: int
    line_count: int
    external_reference: str | None
    version: int
    placed_at: datetime
    updated_at: datetime


class Page(Struct, frozen=True):
    """Where this page stands."""

    limit: int
    next_cursor: str | None


class OrderPage(Struct, frozen=True):
    """The answer."""

    data: list[ListedOrder]
    meta: Page


class Position(cursor.Cursor, frozen=True):
    """The last row of a page: microseconds since 1970 or cents, and the order's id."""

    sort_key: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    order_id: Annotated[bytes, Meta(min_length=16, max_length=16)]


EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
END_OF_TIME: Final = datetime(9999, 1, 1, tzinfo=UTC)
FIRST_ID: Final = UUID(int=0)
LAST_ID: Final = UUID(int=2**128 - 1)
MOST_CENTS: Final = 2**63 - 1
MICROSECOND: Final = timedelta(microseconds=1)

# The four sorts. $1..$3 text: status, payment status, fulfillment status. $4 uuid: customer. $5
# text: sku. Null: not asked. Then the bounds of `placed_at` that the sort key leaves open; the key
# after which the page begins (excluded; no other bound of its columns may stand beside it, because
# PostgreSQL begins an index scan at one of them, perhaps the far one); the number of rows, at most
# 101. No locks. PostgreSQL plans these anew for their values, in 0.1 ms, so the index is the best
# for what is asked: a general plan would have to walk a third of the table, as far as its estimate
# goes, and is not chosen. That is why no range of times stands here that might seem narrow.
LIST_NEWEST: Final = """
SELECT order_id, number, status, payment_status, fulfillment_status, return_status, customer_id,
       customer_name, customer_email, currency, total_cents, line_count, external_reference,
       version, placed_at, updated_at
FROM order_list
WHERE ($1::text IS NULL OR status = $1)
  AND ($2::text IS NULL OR payment_status = $2)
  AND ($3::text IS NULL OR fulfillment_status = $3)
  AND ($4::uuid IS NULL OR customer_id = $4)
  AND ($5::text IS NULL OR skus @> ARRAY[$5])
  AND placed_at >= $6
  AND (placed_at, order_id) < ($7::timestamptz, $8::uuid)
ORDER BY placed_at DESC, order_id DESC
LIMIT $9
"""
LIST_OLDEST: Final = """
SELECT order_id, number, status, payment_status, fulfillment_status, return_status, customer_id,
       customer_name, customer_email, currency, total_cents, line_count, external_reference,
       version, placed_at, updated_at
FROM order_list
WHERE ($1::text IS NULL OR status = $1)
  AND ($2::text IS NULL OR payment_status = $2)
  AND ($3::text IS NULL OR fulfillment_status = $3)
  AND ($4::uuid IS NULL OR customer_id = $4)
  AND ($5::text IS NULL OR skus @> ARRAY[$5])
  AND placed_at < $6
  AND (placed_at, order_id) > ($7::timestamptz, $8::uuid)
ORDER BY placed_at, order_id
LIMIT $9
"""
LIST_LARGEST: Final = """
SELECT order_id, number, status, payment_status, fulfillment_status, return_status, customer_id,
       customer_name, customer_email, currency, total_cents, line_count, external_reference,
       version, placed_at, updated_at
FROM order_list
WHERE ($1::text IS NULL OR status = $1)
  AND ($2::text IS NULL OR payment_status = $2)
  AND ($3::text IS NULL OR fulfillment_status = $3)
  AND ($4::uuid IS NULL OR customer_id = $4)
  AND ($5::text IS NULL OR skus @> ARRAY[$5])
  AND ($6::timestamptz IS NULL OR placed_at >= $6)
  AND ($7::timestamptz IS NULL OR placed_at < $7)
  AND (total_cents, order_id) < ($8::bigint, $9::uuid)
ORDER BY total_cents DESC, order_id DESC
LIMIT $10
"""
LIST_SMALLEST: Final = """
SELECT order_id, number, status, payment_status, fulfillment_status, return_status, customer_id,
       customer_name, customer_email, currency, total_cents, line_count, external_reference,
       version, placed_at, updated_at
FROM order_list
WHERE ($1::text IS NULL OR status = $1)
  AND ($2::text IS NULL OR payment_status = $2)
  AND ($3::text IS NULL OR fulfillment_status = $3)
  AND ($4::uuid IS NULL OR customer_id = $4)
  AND ($5::text IS NULL OR skus @> ARRAY[$5])
  AND ($6::timestamptz IS NULL OR placed_at >= $6)
  AND ($7::timestamptz IS NULL OR placed_at < $7)
  AND (total_cents, order_id) > ($8::bigint, $9::uuid)
ORDER BY total_cents, order_id
LIMIT $10
"""

# By time and any of the three statuses alone: $1..$3 text, at least one not null; $4..$7 as above.
# Statuses go with age, so a filter on the time index may have to pass the whole table (100 ms).
# Instead each combination of statuses that exists (a dozen or two, found by skipping along the
# index on statuses, time and id) gives its first rows, already in order: 0.2 ms for every filter.
LIST_NEWEST_BY_STATUS: Final = """
WITH RECURSIVE combination AS (
    (SELECT status, payment_status, fulfillment_status
     FROM order_list
     ORDER BY status, payment_status, fulfillment_status
     LIMIT 1)
    UNION ALL
    SELECT following.status, following.payment_status, following.fulfillment_status
    FROM combination
    CROSS JOIN LATERAL (
        SELECT status, payment_status, fulfillment_status
        FROM order_list
        WHERE (status, payment_status, fulfillment_status)
              > (combination.status, combination.payment_status, combination.fulfillment_status)
        ORDER BY status, payment_status, fulfillment_status
        LIMIT 1
    ) AS following
)
SELECT page.order_id, page.number, page.status, page.payment_status, page.fulfillment_status,
       page.return_status, page.customer_id, page.customer_name, page.customer_email,
       page.currency, page.total_cents, page.line_count, page.external_reference, page.version,
       page.placed_at, page.updated_at
FROM combination
CROSS JOIN LATERAL (
    SELECT order_id, number, status, payment_status, fulfillment_status, return_status,
           customer_id, customer_name, customer_email, currency, total_cents, line_count,
           external_reference, version, placed_at, updated_at
    FROM order_list
    WHERE status = combination.status
      AND payment_status = combination.payment_status
      AND fulfillment_status = combination.fulfillment_status
      AND placed_at >= $4
      AND (placed_at, order_id) < ($5::timestamptz, $6::uuid)
    ORDER BY placed_at DESC, order_id DESC
    LIMIT $7
) AS page
WHERE ($1::text IS NULL OR combination.status = $1)
  AND ($2::text IS NULL OR combination.payment_status = $2)
  AND ($3::text IS NULL OR combination.fulfillment_status = $3)
ORDER BY page.placed_at DESC, page.order_id DESC
LIMIT $7
"""
LIST_OLDEST_BY_STATUS: Final = """
WITH RECURSIVE combination AS (
    (SELECT status, payment_status, fulfillment_status
     FROM order_list
     ORDER BY status, payment_status, fulfillment_status
     LIMIT 1)
    UNION ALL
    SELECT following.status, following.payment_status, following.fulfillment_status
    FROM combination
    CROSS JOIN LATERAL (
        SELECT status, payment_status, fulfillment_status
        FROM order_list
        WHERE (status, payment_status, fulfillment_status)
              > (combination.status, combination.payment_status, combination.fulfillment_status)
        ORDER BY status, payment_status, fulfillment_status
        LIMIT 1
    ) AS following
)
SELECT page.order_id, page.number, page.status, page.payment_status, page.fulfillment_status,
       page.return_status, page.customer_id, page.customer_name, page.customer_email,
       page.currency, page.total_cents, page.line_count, page.external_reference, page.version,
       page.placed_at, page.updated_at
FROM combination
CROSS JOIN LATERAL (
    SELECT order_id, number, status, payment_status, fulfillment_status, return_status,
           customer_id, customer_name, customer_email, currency, total_cents, line_count,
           external_reference, version, placed_at, updated_at
    FROM order_list
    WHERE status = combination.status
      AND payment_status = combination.payment_status
      AND fulfillment_status = combination.fulfillment_status
      AND placed_at < $4
      AND (placed_at, order_id) > ($5::timestamptz, $6::uuid)
    ORDER BY placed_at, order_id
    LIMIT $7
) AS page
WHERE ($1::text IS NULL OR combination.status = $1)
  AND ($2::text IS NULL OR combination.payment_status = $2)
  AND ($3::text IS NULL OR combination.fulfillment_status = $3)
ORDER BY page.placed_at, page.order_id
LIMIT $7
"""


def list_key(query: ListOrders, *, customer_id: UUID | None = None) -> str:
    """The cache key: one per set of rows asked for, however it was written."""
    return f"{_filters(query, customer_id)}:{query.limit}:{query.cursor or ''}"


async def list_orders(
    read_side: ReadSide,
    query: ListOrders,
    *,
    customer_id: UUID | None = None,
    token_xid: int | None = None,
    wait_s: float = 0.0,
) -> Found:
    """One page, as fresh as the token asks if that comes true within `wait_s`.

    `customer_id` is the principal's, who sees no other customer's orders: asking for another's
    gives an empty page. While any order is parked, every list says that it is behind.

    Raises:
        CursorError: malformed, or of another query.
        ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
    """
    if customer_id is not None and query.customer_id not in (None, customer_id):
        return Found(_page(query, [], ""))
    owner = customer_id or query.customer_id
    filters = _filters(query, customer_id)
    after = None
    if query.cursor is not None:
        after = _key(query, cursor.decode(query.cursor, Position, query=filters))
    lookup = Lookup(
        key=list_key(query, customer_id=customer_id),
        model=ORDER_LIST,
        load=partial(load_orders, query=query, owner=owner, after=after, filters=filters),
        concerns=_any_order,
        tags=(ORDERS_TAG if owner is None else f"{CUSTOMER_TAG}{owner}",),
        customer_id=owner,
    )
    found = await read_side.answer(lookup, token_xid=token_xid, wait_s=wait_s)
    assert found is not None  # a page may be empty, but there is one
    return found


SortKey: TypeAlias = tuple[datetime | int, UUID]


async def load_orders(
    connection: Connection,
    *,
    query: ListOrders,
    owner: UUID | None,
    after: SortKey | None,
    filters: str,
) -> Entry:
    """One page as bytes; one row more is read, which tells whether there is a next one."""
    fetch = connection.fetch
    start, end = _span(query)
    span = (start if query.placed_from else None, end if query.placed_to else None)
    statuses = (query.status, query.payment_status, query.fulfillment_status)
    wanted = (*statuses, owner, query.sku)
    rows_max = query.limit + 1
    by_status = any(statuses) and owner is None and query.sku is None
    match query.sort:
        case "-placed_at" if by_status:
            key = after or (end, FIRST_ID)
            rows = await fetch(LIST_NEWEST_BY_STATUS, *statuses, start, *key, rows_max)
        case "placed_at" if by_status:
            key = after or (start, FIRST_ID)
            rows = await fetch(LIST_OLDEST_BY_STATUS, *statuses, end, *key, rows_max)
        case "-placed_at":
            key = after or (end, FIRST_ID)
            rows = await fetch(LIST_NEWEST, *wanted, start, *key, rows_max)
        case "placed_at":
            key = after or (start, FIRST_ID)
            rows = await fetch(LIST_OLDEST, *wanted, end, *key, rows_max)
        case "-total_cents":
            key = after or (MOST_CENTS, LAST_ID)
            rows = await fetch(LIST_LARGEST, *wanted, *span, *key, rows_max)
        case "total_cents":
            key = after or (-1, FIRST_ID)
            rows = await fetch(LIST_SMALLEST, *wanted, *span, *key, rows_max)
        case _:
            assert_never(query.sort)
    return _page(query, rows, filters)


def _page(query: ListOrders, rows: Sequence[Record], filters: str) -> Entry:
    next_cursor = None
    if len(rows) > query.limit:
        last = rows[query.limit - 1]
        sort_key = (
            (last["placed_at"] - EPOCH) // MICROSECOND
            if query.sort in ("-placed_at", "placed_at")
            else last["total_cents"]
        )
        position = Position(cursor.fingerprint(filters), sort_key, last["order_id"].bytes)
        next_cursor = cursor.encode(position)
    page = OrderPage([_listed(row) for row in rows[: query.limit]], Page(query.limit, next_cursor))
    return Entry(_encode(page), next_cursor=next_cursor)


def _listed(row: Record) -> ListedOrder:
    return ListedOrder(
        order_id=row["order_id"],
        number=row["number"],
        status=row["status"],
        payment_status=row["payment_status"],
        fulfillment_status=row["fulfillment_status"],
        return_status=row["return_status"],
        customer=Customer(row["customer_id"], row["customer_name"], row["customer_email"]),
        currency=row["currency"],
        total_cents=row["total_cents"],
        line_count=row["line_count"],
        external_reference=row["external_reference"],
        version=row["version"],
        placed_at=row["placed_at"],
        updated_at=row["updated_at"],
    )


def _key(query: ListOrders, position: Position) -> SortKey:
    order_id = UUID(bytes=position.order_id)
    if query.sort in ("-total_cents", "total_cents"):
        return position.sort_key, order_id
    try:
        return EPOCH + position.sort_key * MICROSECOND, order_id
    except OverflowError as error:
        raise cursor.CursorError("the cursor is malformed") from error


def _filters(query: ListOrders, customer_id: UUID | None) -> str:
    """What a cursor belongs to. Only the times, which come last, can contain a colon."""
    if customer_id is None or query.customer_id in (None, customer_id):
        owner = customer_id or query.customer_id or ""
    else:
        owner = "nobody"
    start, end = _span(query)
    return (
        f"orders:{query.sort}:{query.status or ''}:{query.payment_status or ''}"
        f":{query.fulfillment_status or ''}:{owner}:{query.sku or ''}"
        f":{start.isoformat()}:{end.isoformat()}"
    )


def _span(query: ListOrders) -> tuple[datetime, datetime]:
    """The times asked for, in UTC and within what PostgreSQL and Python both can say."""
    start = EPOCH if query.placed_from is None else max(query.placed_from, EPOCH)
    end = END_OF_TIME if query.placed_to is None else min(query.placed_to, END_OF_TIME)
    return min(start, END_OF_TIME).astimezone(UTC), max(end, EPOCH).astimezone(UTC)


def _any_order(_order_id: str) -> bool:
    return True  # a parked order may belong on any page


_encode: Final = msgspec.json.Encoder().encode
