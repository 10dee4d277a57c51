"""Adjust stock: by a difference, or to a count if it is still what the client saw."""

from datetime import datetime
from typing import Annotated, Final

from asyncpg import Record
from msgspec import Meta

from commands import outbox
from commands.command import Batch, Command, Connection, Location, Outcome, Sku, Submission, Text
from commands.events import StockAdjusted
from commands.outbox import Cause
from commands.refusals import (
    Fault,
    Refusal,
    not_found,
    precondition_failed,
    stale_quantity,
    would_breach_commitments,
)
from commands.stock import Shelf, ShelfKey

ON_HAND_MAX: Final = 1_000_000_000  # units; stays in an integer column with room for every delta


class AdjustStock(Command, frozen=True):
    """Either `delta`, or `set_to` with `expected_on_hand` (compare and set). In units."""

    sku: Sku
    location: Location
    reason: Text
    delta: Annotated[int, Meta(ge=-ON_HAND_MAX, le=ON_HAND_MAX)] | None = None
    set_to: Annotated[int, Meta(ge=0, le=ON_HAND_MAX)] | None = None
    expected_on_hand: Annotated[int, Meta(ge=0, le=ON_HAND_MAX)] | None = None


async def adjust_stock_levels(
    batch: Batch[AdjustStock], *, connection: Connection, now: datetime
) -> list[Outcome]:
    """One outcome per command, in order. The transaction is the caller's.

    Refuses with validation, not-found, precondition-failed, stale-quantity,
    would-breach-commitments.
    """
    shelves = await lock_shelves(connection, batch)
    outcomes: list[Outcome] = [
        adjust_stock(each, shelves.get((each.command.sku, each.command.location)), now)
        for each in batch
    ]
    adjusted = [
        (event, Cause(submission.principal.owner, submission.traceparent))
        for submission, event in zip(batch, outcomes, strict=True)
        if isinstance(event, StockAdjusted)
    ]
    if adjusted:
        await write_levels(connection, [event for event, _ in adjusted], now)
        await outbox.append(connection, adjusted)
    return outcomes


def adjust_stock(
    submission: Submission[AdjustStock], shelf: Shelf | None, now: datetime
) -> StockAdjusted | Refusal:
    """Decide one adjustment; `shelf` is None for a product that is not sold here. No I/O."""
    command = submission.command
    if shelf is None:
        return not_found("product", command.sku)
    if submission.expected_version not in (None, shelf.version):
        return precondition_failed(expected=submission.expected_version or 0, current=shelf.version)
    delta = difference(command, shelf)
    if isinstance(delta, Refusal):
        return delta
    on_hand = shelf.on_hand + delta
    committed = shelf.allocated + shelf.reserved - shelf.backorder_limit
    if on_hand < max(0, committed):
        return would_breach_commitments(on_hand=on_hand, committed=max(0, committed))
    if on_hand > ON_HAND_MAX:
        return malformed("/delta", f"At most {ON_HAND_MAX} can be on hand.")
    shelf.on_hand = on_hand
    shelf.version += 1
    return StockAdjusted(
        version=shelf.version,
        occurred_at=now,
        sku=shelf.sku,
        location=shelf.location,
        on_hand=shelf.on_hand,
        allocated=shelf.allocated,
        reserved=shelf.reserved,
        available=shelf.available,
        delta=delta,
        reason=command.reason,
    )


def difference(command: AdjustStock, shelf: Shelf) -> int | Refusal:
    """What to add to on_hand, in units."""
    if command.delta is not None:
        if command.set_to is not None or command.expected_on_hand is not None:
            return malformed("/set_to", "Give delta, or set_to with expected_on_hand, not both.")
        return command.delta if command.delta else malformed("/delta", "A delta is not zero.")
    if command.set_to is None:
        return malformed("/delta", "Give delta, or set_to with expected_on_hand.")
    if command.expected_on_hand is None:
        return malformed("/expected_on_hand", "set_to needs the expected_on_hand it replaces.")
    if command.expected_on_hand != shelf.on_hand:
        return stale_quantity(expected=command.expected_on_hand, on_hand=shelf.on_hand)
    return command.set_to - shelf.on_hand


def malformed(pointer: str, detail: str) -> Refusal:
    return Refusal("validation", detail, (Fault(pointer, "invalid", detail),))


# $1, $2 text[]: the distinct (sku, location) of the batch, sorted. Locks the levels that exist, in
# that order. Rows: those levels.
LOCK_LEVELS: Final = """
SELECT level.sku, level.location, level.on_hand, level.allocated, level.reserved,
       level.safety_stock, level.backorder_limit, level.version
FROM unnest($1::text[], $2::text[]) AS asked (sku, location)
JOIN stock_levels AS level USING (sku, location)
ORDER BY level.sku, level.location
FOR UPDATE OF level
"""

# $1 text[]. Rows: the skus among them that are sold here. Locks nothing: products never leave.
KNOWN_PRODUCTS: Final = """
SELECT sku
FROM products
WHERE sku = ANY ($1::text[])
"""

# $1..$6 arrays, one element per adjustment: sku, location, on_hand after it, version after it,
# delta, reason. $7 time. The last adjustment of a level in the batch is its state; a new level is
# inserted, and if somebody else inserted it meanwhile, the primary key refuses the batch.
WRITE_ADJUSTMENTS: Final = """
WITH adjusted AS (
    SELECT *
    FROM unnest($1::text[], $2::text[], $3::integer[], $4::integer[], $5::integer[], $6::text[])
         AS t (sku, location, on_hand, version, delta, reason)
), final AS (
    SELECT DISTINCT ON (sku, location) sku, location, on_hand, version
    FROM adjusted
    ORDER BY sku, location, version DESC
), updated AS (
    UPDATE stock_levels AS level
    SET on_hand = final.on_hand, version = final.version, updated_at = $7
    FROM final
    WHERE level.sku = final.sku AND level.location = final.location
    RETURNING level.sku, level.location
), created AS (
    INSERT INTO stock_levels (sku, location, on_hand, allocated, reserved, version, updated_at)
    SELECT sku, location, on_hand, 0, 0, version, $7
    FROM final
    WHERE NOT EXISTS (SELECT FROM updated
                      WHERE updated.sku = final.sku AND updated.location = final.location)
)
INSERT INTO stock_movements (sku, location, kind, on_hand_delta, reason, occurred_at)
SELECT sku, location, 'adjusted', delta, reason, $7
FROM adjusted
"""


async def lock_shelves(connection: Connection, batch: Batch[AdjustStock]) -> dict[ShelfKey, Shelf]:
    """The locked levels; an empty shelf of version 0 where a known product has none yet."""
    wanted = sorted({(each.command.sku, each.command.location) for each in batch})
    rows: list[Record] = await connection.fetch(
        LOCK_LEVELS, [sku for sku, _ in wanted], [location for _, location in wanted]
    )
    shelves = {(row["sku"], row["location"]): Shelf.of(row) for row in rows}
    missing = [key for key in wanted if key not in shelves]
    if missing:
        rows = await connection.fetch(KNOWN_PRODUCTS, [sku for sku, _ in missing])
        known = {row["sku"] for row in rows}
        for sku, location in missing:
            if sku in known:
                shelves[sku, location] = Shelf(sku, location, 0, 0, 0, 0, 0, 0)
    return shelves


async def write_levels(
    connection: Connection, adjusted: list[StockAdjusted], now: datetime
) -> None:
    """The levels and their ledger rows."""
    await connection.execute(
        WRITE_ADJUSTMENTS,
        [event.sku for event in adjusted],
        [event.location for event in adjusted],
        [event.on_hand for event in adjusted],
        [event.version for event in adjusted],
        [event.delta for event in adjusted],
        [event.reason for event in adjusted],
        now,
    )
