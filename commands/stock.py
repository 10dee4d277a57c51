"""Shelves: the stock levels that a batch has locked, how they change, and how they are written.

The rule of the house: on_hand - allocated - reserved never falls below -backorder_limit, and what
an order may take leaves the safety stock alone. Every change has a row in the ledger.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, TypeVar
from uuid import UUID

from asyncpg import Record
from msgspec import Struct

from commands.command import Connection
from commands.events import Share, StockAllocated, StockReleased
from commands.outbox import Cause

ShelfKey = tuple[str, str]  # (sku, location)


class Shelf(Struct):
    """One locked stock level, in units. `moves` are the shares taken or given back since."""

    sku: str
    location: str
    on_hand: int
    allocated: int
    reserved: int
    safety_stock: int
    backorder_limit: int
    version: int
    moves: list[Share] = []

    @classmethod
    def of(cls, row: Record) -> "Shelf":
        return cls(*row[:8])

    @property
    def available(self) -> int:
        """What orders may still take; never below zero in what is shown."""
        free = self.on_hand - self.allocated - self.reserved
        return max(0, free - self.safety_stock + self.backorder_limit)


class Shelves:
    """The shelves of one batch, by (sku, location)."""

    def __init__(self, shelves: Iterable[Shelf]) -> None:
        self._shelves = {(shelf.sku, shelf.location): shelf for shelf in shelves}

    def allocate(
        self, order_id: UUID, lines: Sequence[tuple[str, str, int]]
    ) -> dict[ShelfKey, int]:
        """Take all `lines` (sku, location, units) or nothing; returns what there is where short.

        Lines that share a shelf are added up first, so two of them cannot pass one by one.
        """
        wanted: dict[ShelfKey, int] = {}
        for sku, location, quantity in lines:
            wanted[sku, location] = wanted.get((sku, location), 0) + quantity
        short: dict[ShelfKey, int] = {}
        for key, quantity in wanted.items():
            shelf = self._shelves.get(key)
            available = shelf.available if shelf is not None else 0
            if available < quantity:
                short[key] = available
        if not short:
            for key, quantity in wanted.items():
                shelf = self._shelves[key]
                shelf.allocated += quantity
                shelf.moves.append(Share(order_id, quantity))
        return short

    def release(self, order_id: UUID, lines: Sequence[tuple[str, str, int]]) -> None:
        """Give back what `lines` (sku, location, units) had taken."""
        for sku, location, quantity in lines:
            shelf = self._shelves[sku, location]
            shelf.allocated -= quantity
            shelf.moves.append(Share(order_id, quantity))

    def moved(self) -> list[Shelf]:
        return [shelf for shelf in self._shelves.values() if shelf.moves]


# $1..$4 arrays, one element per shelf: sku, location, allocated, version. The rows are locked.
# $5..$8 arrays, one element per movement: sku, location, signed units, order. $9 kind, $10 time.
MOVE_ALLOCATIONS: Final = """
WITH moved AS (
    UPDATE stock_levels AS level
    SET allocated = t.allocated, version = t.version, updated_at = $10
    FROM unnest($1::text[], $2::text[], $3::integer[], $4::integer[])
         AS t (sku, location, allocated, version)
    WHERE level.sku = t.sku AND level.location = t.location
)
INSERT INTO stock_movements (sku, location, kind, allocated_delta, order_id, occurred_at)
SELECT sku, location, $9, units, order_id, $10
FROM unnest($5::text[], $6::text[], $7::integer[], $8::uuid[]) AS t (sku, location, units, order_id)
"""


E = TypeVar("E", StockAllocated, StockReleased)


async def write_moves(
    connection: Connection, shelves: Shelves, now: datetime, announce: type[E]
) -> list[E]:
    """Write what `allocate` took or `release` gave back: levels and ledger. One event per shelf."""
    moved = shelves.moved()
    for shelf in moved:
        shelf.version += 1
    moves = [(shelf, share) for shelf in moved for share in shelf.moves]
    sign, kind = (1, "allocated") if announce is StockAllocated else (-1, "released")
    await connection.execute(
        MOVE_ALLOCATIONS,
        [shelf.sku for shelf in moved],
        [shelf.location for shelf in moved],
        [shelf.allocated for shelf in moved],
        [shelf.version for shelf in moved],
        [shelf.sku for shelf, _ in moves],
        [shelf.location for shelf, _ in moves],
        [sign * share.quantity for _, share in moves],
        [share.order_id for _, share in moves],
        kind,
        now,
    )
    return [
        announce(
            version=shelf.version,
            occurred_at=now,
            sku=shelf.sku,
            location=shelf.location,
            on_hand=shelf.on_hand,
            allocated=shelf.allocated,
            reserved=shelf.reserved,
            available=shelf.available,
            shares=tuple(shelf.moves),
        )
        for shelf in moved
    ]


def attributed(events: Sequence[E], causes: Mapping[UUID, Cause]) -> list[tuple[E, Cause]]:
    """Each event with the cause of one of its orders: a traced one, if there is any."""
    return [
        (event, max((causes[share.order_id] for share in event.shares), key=_traced))
        for event in events
    ]


def _traced(cause: Cause) -> bool:
    return cause.traceparent is not None
