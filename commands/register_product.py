"""Register products: a SKU can be ordered from now on, at this price."""

from datetime import datetime
from typing import Final

from asyncpg import Record

from commands import outbox
from commands.command import (
    Batch,
    Command,
    Connection,
    Currency,
    Outcome,
    Sku,
    Submission,
    Text,
    UnitPrice,
)
from commands.events import ProductRegistered
from commands.outbox import Cause
from commands.refusals import Refusal, duplicate


class RegisterProduct(Command, frozen=True):
    """Sell this."""

    sku: Sku
    name: Text
    price_cents: UnitPrice
    currency: Currency


async def register_products(
    batch: Batch[RegisterProduct], *, connection: Connection, now: datetime
) -> list[Outcome]:
    """One outcome per command, in order. The transaction is the caller's.

    Refuses with duplicate-sku.
    """
    rows: list[Record] = await connection.fetch(FIND_SKUS, [each.command.sku for each in batch])
    taken: set[str] = {row["sku"] for row in rows}
    outcomes: list[Outcome] = [register_product(each, taken, now) for each in batch]
    registered = [
        (event, Cause(submission.principal.owner, submission.traceparent))
        for submission, event in zip(batch, outcomes, strict=True)
        if isinstance(event, ProductRegistered)
    ]
    if registered:
        events = [event for event, _ in registered]
        await connection.execute(
            INSERT_PRODUCTS,
            [event.sku for event in events],
            [event.name for event in events],
            [event.price_cents for event in events],
            [event.currency for event in events],
            now,
        )
        await outbox.append(connection, registered)
    return outcomes


def register_product(
    submission: Submission[RegisterProduct], taken: set[str], now: datetime
) -> ProductRegistered | Refusal:
    """Decide one registration; `taken` learns of it. No I/O."""
    command = submission.command
    if command.sku in taken:
        return duplicate("sku", command.sku)
    taken.add(command.sku)
    return ProductRegistered(
        version=1,
        occurred_at=now,
        sku=command.sku,
        name=command.name,
        price_cents=command.price_cents,
        currency=command.currency,
    )


# $1 text[]. Rows: the skus among them that are taken. Locks nothing: the primary key has the last
# word, and a batch that it refuses is run again one by one.
FIND_SKUS: Final = """
SELECT sku
FROM products
WHERE sku = ANY ($1::text[])
"""

# $1..$4 arrays, one element per product; $5 the time.
INSERT_PRODUCTS: Final = """
INSERT INTO products (sku, name, price_cents, currency, version, registered_at, updated_at)
SELECT sku, name, price_cents, currency, 1, $5, $5
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[])
     AS t (sku, name, price_cents, currency)
"""
