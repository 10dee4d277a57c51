"""List stock levels, by (sku, location), over `stock_availability`."""

from datetime import datetime
from functools import partial
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from queries import cursor
from queries.cache import Entry
from queries.read_side import SKU_TAG, STOCK_TAG, Connection, Found, Lookup, ReadSide

STOCK_AVAILABILITY: Final = "stock_availability"

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class ListStock(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked. Without skus: all of them."""

    skus: Annotated[tuple[Name, ...], Meta(max_length=100)] = ()
    location: Name | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    cursor: str | None = None


class StockLevel(Struct, frozen=True):
    """One level, in units."""

    sku: str
    location: str
    on_hand: int
    allocated: int
    reserved: int
    available: int  # what an order may still take
    version: int
    updated_at: datetime


class Page(Struct, frozen=True):
    """Where this page stands."""

    limit: int
    next_cursor: str | None


class StockPage(Struct, frozen=True):
    """The answer."""

    data: list[StockLevel]
    meta: Page


class Position(cursor.Cursor, frozen=True):
    """The last row of a page."""

    sku: Name
    location: Name


BEFORE_ALL: Final = ("", "")

# $1 text[]: skus, each once. $2 text: location, or null. $3, $4 text: the sku and location after
# which the page begins. $5 rows at most. Walks the primary key once per sku. No locks.
LIST_STOCK_OF_SKUS: Final = """
SELECT sku, location, on_hand, allocated, reserved, available, version, updated_at
FROM stock_availability
WHERE sku = ANY ($1::text[])
  AND ($2::text IS NULL OR location = $2)
  AND (sku, location) > ($3, $4)
ORDER BY sku, location
LIMIT $5
"""

# $1 text: location, or null. $2, $3 text: the sku and location after which the page begins. $4 rows
# at most. Walks the primary key; a location with few skus costs a walk over all of them. No locks.
LIST_STOCK: Final = """
SELECT sku, location, on_hand, allocated, reserved, available, version, updated_at
FROM stock_availability
WHERE ($1::text IS NULL OR location = $1)
  AND (sku, location) > ($2, $3)
ORDER BY sku, location
LIMIT $4
"""


def stock_key(query: ListStock) -> str:
    """The cache key: one per set of levels asked for, however it was written."""
    return f"{_filters(query)}:{query.limit}:{query.cursor or ''}"


async def list_stock(
    read_side: ReadSide, query: ListStock, *, token_xid: int | None = None, wait_s: float = 0.0
) -> Found:
    """One page, as fresh as the token asks if that comes true within `wait_s`.

    While a level that belongs on the page is parked, it says that it is behind.

    Raises:
        CursorError: malformed, or of another query.
        ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
    """
    filters = _filters(query)
    after = BEFORE_ALL
    if query.cursor is not None:
        position = cursor.decode(query.cursor, Position, query=filters)
        after = (position.sku, position.location)
    skus = frozenset(query.skus)
    lookup = Lookup(
        key=stock_key(query),
        model=STOCK_AVAILABILITY,
        load=partial(load_stock, query=query, after=after, filters=filters),
        concerns=partial(_concerns, skus),
        tags=tuple(f"{SKU_TAG}{sku}" for sku in sorted(skus)) or (STOCK_TAG,),
    )
    found = await read_side.answer(lookup, token_xid=token_xid, wait_s=wait_s)
    assert found is not None  # a page may be empty, but there is one
    return found


async def load_stock(
    connection: Connection, *, query: ListStock, after: tuple[str, str], filters: str
) -> Entry:
    """One page as bytes; one row more is read, which tells whether there is a next one."""
    rows_max = query.limit + 1
    if query.skus:
        skus = sorted(set(query.skus))
        rows = await connection.fetch(LIST_STOCK_OF_SKUS, skus, query.location, *after, rows_max)
    else:
        rows = await connection.fetch(LIST_STOCK, query.location, *after, rows_max)
    next_cursor = None
    if len(rows) > query.limit:
        last = rows[query.limit - 1]
        next_cursor = cursor.encode(
            Position(cursor.fingerprint(filters), last["sku"], last["location"])
        )
    page = StockPage(
        [StockLevel(*row) for row in rows[: query.limit]], Page(query.limit, next_cursor)
    )
    return Entry(_encode(page), next_cursor=next_cursor)


def _filters(query: ListStock) -> str:
    """What a cursor belongs to. No part can contain a comma or a colon."""
    return f"stock:{','.join(sorted(set(query.skus)))}:{query.location or ''}"


def _concerns(skus: frozenset[str], aggregate_id: str) -> bool:
    """Whether a level, `<sku>@<location>`, may belong on the page."""
    return not skus or aggregate_id.partition("@")[0] in skus


_encode: Final = msgspec.json.Encoder().encode
