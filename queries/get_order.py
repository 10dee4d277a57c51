"""Get one order: the whole document from `order_view`. A 404 is never a lie."""

from datetime import datetime
from functools import partial
from time import monotonic, time
from typing import Final
from uuid import UUID

import msgspec
from msgspec import Struct

from queries.cache import Entry
from queries.read_side import ORDER_TAG, Absent, Behind, Connection, Found, Lookup, ReadSide

ORDER_VIEW: Final = "order_view"
APPEAR_WAIT_S: Final = 1.0  # for an order that is there and not in the read model yet


class Customer(Struct, frozen=True):
    """The buyer as known when the order was placed."""

    customer_id: UUID
    name: str
    email: str


class Line(Struct, frozen=True):
    """One line; name and price are the product's when it was ordered."""

    line_no: int
    sku: str
    location: str
    name: str
    quantity: int
    unit_price_cents: int
    line_total_cents: int


class Order(Struct, frozen=True):
    """The document, as it is sent."""

    order_id: UUID
    number: int
    status: str
    payment_status: str
    fulfillment_status: str
    return_status: str
    customer: Customer
    currency: str
    total_cents: int
    lines: list[Line]
    allowed_actions: list[str]
    external_reference: str | None
    version: int
    placed_at: datetime
    updated_at: datetime


# $1 uuid. At most one row, by the primary key. No locks.
GET_ORDER: Final = """
SELECT order_id, number, status, payment_status, fulfillment_status, return_status, customer,
       currency, total_cents, lines, allowed_actions, external_reference, version, placed_at,
       updated_at
FROM order_view
WHERE order_id = $1
"""

# $1 uuid, $2 the same as text. The write side's word on whether an order exists, and the
# transaction of its last event (null when that has left the outbox). At most one row, by primary
# key and by the outbox's index on aggregate and version. No locks.
FIND_ORDER: Final = """
SELECT customer_id,
       (SELECT event.xid::text::bigint
        FROM outbox AS event
        WHERE event.aggregate_id = $2 AND event.aggregate_version = orders.version
        LIMIT 1) AS xid
FROM orders
WHERE order_id = $1
"""


def order_key(order_id: UUID) -> str:
    """The cache key of an order. A canonical id, as it stands in a path, may follow ORDER_TAG."""
    return f"{ORDER_TAG}{order_id}"


async def get_order(
    read_side: ReadSide,
    order_id: UUID,
    *,
    customer_id: UUID | None = None,
    token_xid: int | None = None,
    wait_s: float = APPEAR_WAIT_S,
) -> Found | Absent | Behind:
    """The order's document, as fresh as the token asks if that comes true within `wait_s`.

    `customer_id` is the principal's, who is shown no other customer's order. An order that only
    the write side knows is waited for, token or not. What is parked is behind, token or not.

    Raises:
        ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
    """
    aggregate_id = str(order_id)
    lookup = Lookup(
        key=ORDER_TAG + aggregate_id,
        model=ORDER_VIEW,
        load=partial(load_order, order_id=order_id),
        concerns=aggregate_id.__eq__,
        order_id=order_id,
    )
    began_s = monotonic()
    found = await read_side.answer(lookup, token_xid=token_xid, wait_s=wait_s)
    if found is None:
        waited_s = monotonic() - began_s
        return await seek_order(read_side, lookup, order_id, customer_id, wait_s - waited_s)
    if customer_id is not None and found.entry.customer_id != customer_id:
        return Absent(found.waited_s)
    return found


async def seek_order(
    read_side: ReadSide, lookup: Lookup, order_id: UUID, customer_id: UUID | None, wait_s: float
) -> Found | Absent | Behind:
    """Ask the write side about an order that the read model lacks, and wait if it is there."""
    began_s = monotonic()
    async with read_side.connection() as connection:
        row = await connection.fetchrow(FIND_ORDER, order_id, str(order_id))
    if row is None or (customer_id is not None and row["customer_id"] != customer_id):
        return Absent()
    parked_at = read_side.freshness.parked_at(lookup.model, lookup.concerns)
    if parked_at is not None:
        return Behind(max(0.0, time() - parked_at), 0.0)
    found = await read_side.answer(lookup, token_xid=row["xid"], wait_s=wait_s)
    if found is None:
        return Behind(await read_side.lag_s(lookup.model), monotonic() - began_s)
    return found


async def load_order(connection: Connection, order_id: UUID) -> Entry | None:
    """The document as bytes, or None if the read model has no such order."""
    row = await connection.fetchrow(GET_ORDER, order_id)
    if row is None:
        return None
    order = Order(
        order_id=row["order_id"],
        number=row["number"],
        status=row["status"],
        payment_status=row["payment_status"],
        fulfillment_status=row["fulfillment_status"],
        return_status=row["return_status"],
        customer=_decode_customer(row["customer"]),
        currency=row["currency"],
        total_cents=row["total_cents"],
        lines=_decode_lines(row["lines"]),
        allowed_actions=row["allowed_actions"],
        external_reference=row["external_reference"],
        version=row["version"],
        placed_at=row["placed_at"],
        updated_at=row["updated_at"],
    )
    return Entry(_encode(order), version=order.version, customer_id=order.customer.customer_id)


_decode_customer: Final = msgspec.json.Decoder(Customer).decode
_decode_lines: Final = msgspec.json.Decoder(list[Line]).decode
_encode: Final = msgspec.json.Encoder().encode
