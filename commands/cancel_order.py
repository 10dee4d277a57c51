"""Cancel orders: check the state, give the stock back, announce. One batch, one transaction."""

from datetime import datetime
from typing import Final
from uuid import UUID

from asyncpg import Record
from msgspec import Struct

from commands import order_rules, outbox
from commands.command import Batch, Command, Connection, Outcome, Submission, Text
from commands.events import OrderCancelled, StockReleased
from commands.outbox import Cause
from commands.refusals import Refusal, invalid_transition, not_found, precondition_failed
from commands.stock import Shelf, Shelves, attributed, write_moves


class CancelOrder(Command, frozen=True):
    """Call the whole order off."""

    order_id: UUID
    reason: Text


class Order(Struct):
    """A locked order, as far as cancelling needs it."""

    order_id: UUID
    customer_id: UUID
    status: str
    payment_status: str
    fulfillment_status: str
    return_status: str
    total_cents: int
    version: int
    lines: list[tuple[str, str, int]] = []  # (sku, location, units)


async def cancel_orders(
    batch: Batch[CancelOrder], *, connection: Connection, now: datetime
) -> list[Outcome]:
    """One outcome per command, in order. The transaction is the caller's.

    Refuses with not-found, precondition-failed, invalid-transition.
    """
    orders = await load_orders(connection, sorted({each.command.order_id for each in batch}))
    shelves = await lock_shelves(connection, list(orders))
    outcomes: list[Outcome] = [
        cancel_order(each, orders.get(each.command.order_id), shelves, now) for each in batch
    ]
    cancelled = [
        (event, Cause(submission.principal.owner, submission.traceparent))
        for submission, event in zip(batch, outcomes, strict=True)
        if isinstance(event, OrderCancelled)
    ]
    if cancelled:
        await write_orders(connection, [event for event, _ in cancelled], now)
        released = await write_moves(connection, shelves, now, StockReleased)
        causes = {event.order_id: cause for event, cause in cancelled}
        await outbox.append(connection, [*cancelled, *attributed(released, causes)])
    return outcomes


def cancel_order(
    submission: Submission[CancelOrder], order: Order | None, shelves: Shelves, now: datetime
) -> OrderCancelled | Refusal:
    """Decide one cancellation; an order of somebody else's customer does not exist. No I/O."""
    command = submission.command
    acts_for = submission.principal.customer_id
    if order is None or acts_for not in (None, order.customer_id):
        return not_found("order", command.order_id)
    if submission.expected_version not in (None, order.version):
        return precondition_failed(expected=submission.expected_version or 0, current=order.version)
    if "cancel" not in order_rules.allowed_actions(order.status):
        return invalid_transition(action="cancel", status=order.status)
    shelves.release(order.order_id, order.lines)
    order.status = "cancelled"
    order.version += 1
    return OrderCancelled(
        version=order.version,
        occurred_at=now,
        order_id=order.order_id,
        customer_id=order.customer_id,
        status=order.status,
        payment_status=order.payment_status,
        fulfillment_status=order.fulfillment_status,
        return_status=order.return_status,
        allowed_actions=order_rules.allowed_actions(order.status),
        total_cents=order.total_cents,
        reason=command.reason,
    )


# $1 uuid[], distinct and sorted. Locks each order in that order. Rows: one per order that exists.
LOCK_ORDERS: Final = """
SELECT order_id, customer_id, status, payment_status, fulfillment_status, return_status,
       total_cents, version
FROM orders
WHERE order_id = ANY ($1::uuid[])
ORDER BY order_id
FOR UPDATE
"""

# $1 uuid[]: orders locked before. Rows: their lines, up to 100 each.
LOAD_LINES: Final = """
SELECT order_id, sku, location, quantity
FROM order_lines
WHERE order_id = ANY ($1::uuid[])
"""

# $1 uuid[]: orders locked before. Locks the levels of their lines, in (sku, location) order.
LOCK_LEVELS: Final = """
SELECT sku, location, on_hand, allocated, reserved, safety_stock, backorder_limit, version
FROM stock_levels
WHERE (sku, location) IN (SELECT sku, location FROM order_lines WHERE order_id = ANY ($1::uuid[]))
ORDER BY sku, location
FOR UPDATE
"""

# $1..$3 arrays, one element per order: order, version, reason. $4 allowed actions, $5 time.
WRITE_CANCELLATIONS: Final = """
UPDATE orders AS o
SET status = 'cancelled', version = t.version, cancel_reason = t.reason,
    allowed_actions = $4::text[], updated_at = $5
FROM unnest($1::uuid[], $2::integer[], $3::text[]) AS t (order_id, version, reason)
WHERE o.order_id = t.order_id
"""


async def load_orders(connection: Connection, order_ids: list[UUID]) -> dict[UUID, Order]:
    """Lock the orders and read their lines."""
    rows: list[Record] = await connection.fetch(LOCK_ORDERS, order_ids)
    orders = {row["order_id"]: Order(*row) for row in rows}
    for line in await connection.fetch(LOAD_LINES, list(orders)):
        orders[line["order_id"]].lines.append((line["sku"], line["location"], line["quantity"]))
    return orders


async def lock_shelves(connection: Connection, order_ids: list[UUID]) -> Shelves:
    rows: list[Record] = await connection.fetch(LOCK_LEVELS, order_ids)
    return Shelves(Shelf.of(row) for row in rows)


async def write_orders(
    connection: Connection, cancelled: list[OrderCancelled], now: datetime
) -> None:
    """The order rows; each was decided once in this batch, so each stands here once."""
    await connection.execute(
        WRITE_CANCELLATIONS,
        [event.order_id for event in cancelled],
        [event.version for event in cancelled],
        [event.reason for event in cancelled],
        cancelled[0].allowed_actions,
        now,
    )
