"""Place orders: price the lines, take the stock, announce. One batch, one transaction."""

from datetime import datetime
from itertools import chain
from typing import Annotated, Final
from uuid import UUID

from msgspec import Meta, Struct
from uuid_utils.compat import uuid7

from commands import order_rules, outbox
from commands.command import (
    DEFAULT_LOCATION,
    Batch,
    Cents,
    Command,
    Connection,
    Currency,
    Location,
    Outcome,
    Quantity,
    Sku,
    Submission,
    Text,
)
from commands.events import Buyer, Line, OrderPlaced, StockAllocated
from commands.outbox import Cause
from commands.refusals import (
    Refusal,
    currency_mismatch,
    duplicate,
    insufficient_stock,
    total_mismatch,
    unknown_customer,
    unknown_products,
)
from commands.stock import Shelf, Shelves, attributed, write_moves


class OrderedLine(Struct, frozen=True, forbid_unknown_fields=True):
    """So many units of one product, from one location."""

    sku: Sku
    quantity: Quantity
    location: Location = DEFAULT_LOCATION


class PlaceOrder(Command, frozen=True):
    """Order these lines for this customer, at today's prices."""

    customer_id: UUID
    currency: Currency
    lines: Annotated[tuple[OrderedLine, ...], Meta(min_length=1, max_length=100)]
    expected_total_cents: Cents | None = None  # the client's own sum; a difference is refused
    external_reference: Text | None = None  # the client's own name for it, unique


class Numbered(Struct, frozen=True):
    """A row of NUMBER_ORDERS: the order's number, and its customer, unless that is unknown."""

    number: int
    name: str | None
    email: str | None


class Product(Struct, frozen=True):
    """A product as priced now."""

    name: str
    price_cents: int
    currency: str


class Shop(Struct):
    """What a batch is decided on; shelves and references change with each decision."""

    products: dict[str, Product]
    shelves: Shelves
    taken_references: set[str]


async def place_orders(
    batch: Batch[PlaceOrder], *, connection: Connection, now: datetime
) -> list[Outcome]:
    """One outcome per command, in order. The transaction is the caller's.

    Refuses with unknown-customer, unknown-product, currency-mismatch, total-mismatch,
    insufficient-stock, duplicate-external-reference.
    """
    rows = await connection.fetch(NUMBER_ORDERS, [each.command.customer_id for each in batch])
    shop = await load_shop(connection, batch)
    outcomes: list[Outcome] = [
        place_order(submission, Numbered(*row), shop, now)
        for submission, row in zip(batch, rows, strict=True)
    ]
    placed = [
        (event, Cause(submission.principal.owner, submission.traceparent))
        for submission, event in zip(batch, outcomes, strict=True)
        if isinstance(event, OrderPlaced)
    ]
    if placed:
        orders = [event for event, _ in placed]
        await write_orders(connection, orders)
        taken = await write_moves(connection, shop.shelves, now, StockAllocated)
        causes = {event.order_id: cause for event, cause in placed}
        await outbox.append(connection, [*placed, *attributed(taken, causes)])
    return outcomes


def place_order(
    submission: Submission[PlaceOrder], buyer: Numbered, shop: Shop, now: datetime
) -> OrderPlaced | Refusal:
    """Decide one order on the shelves as the orders before it left them. No I/O, no clock."""
    command = submission.command
    acts_for = submission.principal.customer_id
    if buyer.name is None or buyer.email is None or acts_for not in (None, command.customer_id):
        return unknown_customer(command.customer_id)
    if command.external_reference in shop.taken_references:
        return duplicate("external_reference", str(command.external_reference))
    lines = price_lines(command, shop.products)
    if isinstance(lines, Refusal):
        return lines
    total_cents = sum(line.line_total_cents for line in lines)
    if command.expected_total_cents not in (None, total_cents):
        return total_mismatch(
            expected_cents=command.expected_total_cents or 0, total_cents=total_cents
        )
    order_id = uuid7()
    short = shop.shelves.allocate(
        order_id, [(each.sku, each.location, each.quantity) for each in lines]
    )
    if short:
        return insufficient_stock(
            [
                (index, line.sku, line.location, line.quantity, short[line.sku, line.location])
                for index, line in enumerate(lines)
                if (line.sku, line.location) in short
            ]
        )
    if command.external_reference is not None:
        shop.taken_references.add(command.external_reference)
    return OrderPlaced(
        version=1,
        occurred_at=now,
        order_id=order_id,
        customer_id=command.customer_id,
        status="placed",
        payment_status="unpaid",
        fulfillment_status="unfulfilled",
        return_status="none",
        allowed_actions=order_rules.allowed_actions("placed"),
        total_cents=total_cents,
        number=buyer.number,
        customer=Buyer(command.customer_id, buyer.name, buyer.email),
        currency=command.currency,
        external_reference=command.external_reference,
        lines=lines,
    )


def price_lines(command: PlaceOrder, products: dict[str, Product]) -> tuple[Line, ...] | Refusal:
    """The lines at today's prices."""
    lines: list[Line] = []
    missing: list[tuple[int, str]] = []
    for index, line in enumerate(command.lines):
        product = products.get(line.sku)
        if product is None:
            missing.append((index, line.sku))
            continue
        if product.currency != command.currency:
            return currency_mismatch(
                index, sku=line.sku, asked=command.currency, priced=product.currency
            )
        lines.append(
            Line(
                index + 1,
                line.sku,
                line.location,
                product.name,
                line.quantity,
                product.price_cents,
                line.quantity * product.price_cents,
            )
        )
    return unknown_products(missing) if missing else tuple(lines)


# $1 uuid[], one per command. Rows: one per command, in order: its order's number and its customer
# (nulls when unknown). Numbers come from a sequence: no lock, gaps where an order is refused.
NUMBER_ORDERS: Final = """
SELECT nextval('order_number') AS number, customer.name, customer.email
FROM unnest($1::uuid[]) WITH ORDINALITY AS asked (customer_id, position)
LEFT JOIN customers AS customer USING (customer_id)
ORDER BY asked.position
"""

# $1, $2 text[]: the distinct (sku, location) of the batch, sorted. Locks each level in that order.
# Rows: one per level that exists; products without one come from LOAD_PRODUCTS.
LOCK_SHELVES: Final = """
SELECT level.sku, level.location, level.on_hand, level.allocated, level.reserved,
       level.safety_stock, level.backorder_limit, level.version,
       product.name, product.price_cents, product.currency
FROM unnest($1::text[], $2::text[]) AS asked (sku, location)
JOIN stock_levels AS level USING (sku, location)
JOIN products AS product USING (sku)
ORDER BY level.sku, level.location
FOR UPDATE OF level
"""

# $1 text[]: skus that no level was found for. Locks nothing.
LOAD_PRODUCTS: Final = """
SELECT sku, name, price_cents, currency
FROM products
WHERE sku = ANY ($1::text[])
"""

# $1 text[]: the references asked for. Locks nothing: the unique index has the last word.
FIND_REFERENCES: Final = """
SELECT external_reference
FROM orders
WHERE external_reference = ANY ($1::text[])
"""


async def load_shop(connection: Connection, batch: Batch[PlaceOrder]) -> Shop:
    """Lock the shelves that the batch wants, and read the prices."""
    wanted = sorted({(line.sku, line.location) for each in batch for line in each.command.lines})
    rows = await connection.fetch(
        LOCK_SHELVES, [sku for sku, _ in wanted], [location for _, location in wanted]
    )
    products = {
        row["sku"]: Product(row["name"], row["price_cents"], row["currency"]) for row in rows
    }
    shelves = Shelves(Shelf.of(row) for row in rows)
    unpriced = {sku for sku, _ in wanted} - products.keys()
    if unpriced:
        found = await connection.fetch(LOAD_PRODUCTS, list(unpriced))
        products |= {
            row["sku"]: Product(row["name"], row["price_cents"], row["currency"]) for row in found
        }
    references = [
        each.command.external_reference for each in batch if each.command.external_reference
    ]
    taken: set[str] = set()
    if references:
        taken = {
            row["external_reference"] for row in await connection.fetch(FIND_REFERENCES, references)
        }
    return Shop(products, shelves, taken)


# $1..$5, $7 arrays, one element per order; $6 the allowed actions of a new order; $8..$14 arrays,
# one element per line; $15 the time.
WRITE_ORDERS: Final = """
WITH placed AS (
    INSERT INTO orders (order_id, number, customer_id, currency, status, payment_status,
                        fulfillment_status, return_status, allowed_actions, total_cents,
                        external_reference, version, placed_at, updated_at)
    SELECT order_id, number, customer_id, currency, 'placed', 'unpaid', 'unfulfilled', 'none',
           $6::text[], total_cents, external_reference, 1, $15, $15
    FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::bigint[], $7::text[])
         AS t (order_id, number, customer_id, currency, total_cents, external_reference)
)
INSERT INTO order_lines (order_id, line_no, sku, location, name, quantity, unit_price_cents,
                         line_total_cents)
SELECT order_id, line_no, sku, location, name, quantity, unit_price_cents,
       quantity * unit_price_cents
FROM unnest($8::uuid[], $9::smallint[], $10::text[], $11::text[], $12::text[], $13::integer[],
            $14::bigint[])
     AS t (order_id, line_no, sku, location, name, quantity, unit_price_cents)
"""


async def write_orders(connection: Connection, orders: list[OrderPlaced]) -> None:
    """The order rows and their lines, in one statement."""
    lines = list(chain.from_iterable(order.lines for order in orders))
    await connection.execute(
        WRITE_ORDERS,
        [order.order_id for order in orders],
        [order.number for order in orders],
        [order.customer_id for order in orders],
        [order.currency for order in orders],
        [order.total_cents for order in orders],
        orders[0].allowed_actions,
        [order.external_reference for order in orders],
        [order.order_id for order in orders for _ in order.lines],
        [line.line_no for line in lines],
        [line.sku for line in lines],
        [line.location for line in lines],
        [line.name for line in lines],
        [line.quantity for line in lines],
        [line.unit_price_cents for line in lines],
        orders[0].occurred_at,
    )
