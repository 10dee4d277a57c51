"""What cannot be applied: found by halving, parked with all later events of its aggregate.

The others go on. What is parked is one row that is behind, never a wrong one; it comes back when an
operator applies it again (`retry`), leaves the event out (`skip`), or takes the row from the
normalized tables (`rederive`).
"""

from collections.abc import Sequence
from typing import Final

import psycopg
from msgspec import Struct

from projections.checkpoints import hold
from projections.outbox import EMPTY_BATCH, Connection, Outbox
from projections.read_model import ReadModel

# More than that in one batch is not the events' fault: the read model rests, and nothing is parked.
PARKED_PER_BATCH_MAX: Final = 100
ERROR_CHARACTERS_MAX: Final = 1000
QUEUE_MAX: Final = 10_000  # events of one aggregate that are applied in one transaction

# SQLSTATE classes that say that a row cannot be taken: cardinality, data, constraint, check option,
# limits (an index entry that is too long), what a function raises, and a damaged page.
EVENT_FAULTS: Final = frozenset({"21", "22", "23", "44", "54", "P0", "XX"})
# Those that pass: connection, transaction state, conflicts between transactions, resources, locks,
# shutdown and cancelling, input and output.
PASSING_FAULTS: Final = frozenset({"08", "25", "40", "53", "55", "57", "58"})

KEEP_WHOLE_BATCH: Final = """
CREATE TEMPORARY TABLE whole_batch ON COMMIT DROP AS
SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
       occurred_at
FROM batch
"""

DROP_WHOLE_BATCH: Final = """
DROP TABLE whole_batch
"""

# $1 text[] aggregates, $2 bigint, one event of theirs, or null for all.
CHOOSE: Final = """
INSERT INTO batch (id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                   traceparent, occurred_at)
SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
       occurred_at
FROM whole_batch
WHERE aggregate_id = ANY ($1::text[])
  AND ($2::bigint IS NULL OR id = $2::bigint)
"""

# $1 text[] read models. One row: whether the batch has events of what is parked for one of them.
TOUCHES_PARKED: Final = """
SELECT EXISTS (
    SELECT
    FROM batch
    JOIN projection_parked AS parked USING (aggregate_id)
    WHERE parked.read_model = ANY ($1::text[])
)
"""

# $1 read model, $2 text[] types of events. Rows: the aggregates that it wants to hear of, in an
# order of no meaning but the same each time.
WANTED_AGGREGATES: Final = """
SELECT aggregate_id
FROM whole_batch
WHERE type = ANY ($2::text[])
  AND aggregate_id NOT IN (SELECT aggregate_id FROM projection_parked WHERE read_model = $1)
GROUP BY aggregate_id
ORDER BY aggregate_id
"""

# $1 aggregate, $2 text[] types. Rows: its events in order.
EVENTS_OF: Final = """
SELECT id, aggregate, lane
FROM whole_batch
WHERE aggregate_id = $1 AND type = ANY ($2::text[])
ORDER BY id
"""

# One row: the event in a batch of one.
ONLY_EVENT: Final = """
SELECT id, aggregate, aggregate_id, lane
FROM whole_batch
LIMIT 1
"""

# $1 read model, $2 aggregate, $3 its id, $4 lane, $5 event, $6 error, $7 attempts.
PARK: Final = """
INSERT INTO projection_parked (read_model, aggregate, aggregate_id, lane, event_id, error, attempts,
                               parked_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, now())
"""

# $1 read model, $2 text[] types. What is parked takes all later events along. Rows: none.
QUEUE: Final = """
INSERT INTO projection_parked_events (read_model, aggregate_id, event_id)
SELECT parked.read_model, parked.aggregate_id, whole_batch.id
FROM whole_batch
JOIN projection_parked AS parked USING (aggregate_id)
WHERE parked.read_model = $1 AND whole_batch.type = ANY ($2::text[])
  AND whole_batch.id >= parked.event_id
ON CONFLICT DO NOTHING
"""

# $1 read model, $2 aggregate. One row, or none when it is not parked.
READ_PARKED: Final = """
SELECT event_id, attempts
FROM projection_parked
WHERE read_model = $1 AND aggregate_id = $2
"""

# $1 read model, $2 aggregate, $3 rows at most. Rows: its queued events, in order.
READ_QUEUE: Final = """
SELECT event_id
FROM projection_parked_events
WHERE read_model = $1 AND aggregate_id = $2
ORDER BY event_id
LIMIT $3::integer
"""

# $1 read model, $2 aggregate, or null for all.
UNPARK: Final = """
WITH unqueued AS (
    DELETE FROM projection_parked_events
    WHERE read_model = $1 AND ($2::text IS NULL OR aggregate_id = $2::text)
)
DELETE FROM projection_parked
WHERE read_model = $1 AND ($2::text IS NULL OR aggregate_id = $2::text)
"""

# $1 read model, or null for all. Rows: what is parked, the oldest first, 1,000 at most.
LIST_PARKED: Final = """
SELECT parked.read_model, parked.aggregate, parked.aggregate_id, parked.event_id, parked.error,
       parked.attempts,
       (SELECT count(*)
        FROM projection_parked_events AS queued
        WHERE queued.read_model = parked.read_model
          AND queued.aggregate_id = parked.aggregate_id)
FROM projection_parked AS parked
WHERE $1::text IS NULL OR parked.read_model = $1::text
ORDER BY parked.parked_at, parked.read_model, parked.aggregate_id
LIMIT 1000
"""


class Parked(Struct, frozen=True):
    """An aggregate that waits because of one of its events."""

    read_model: str
    aggregate: str
    aggregate_id: str
    event_id: int
    error: str


class ReadModelFaultError(Exception):
    """So many events cannot be applied that it must be the read model."""


class RepairError(Exception):
    """What an operator asked for cannot be done; one line that says why."""


def is_event_fault(error: psycopg.Error) -> bool:
    """Whether the database refuses what an event says."""
    return (error.sqlstate or "")[:2] in EVENT_FAULTS


def is_passing(error: psycopg.Error) -> bool:
    """Whether the same batch may succeed later, as far as the database says."""
    return error.sqlstate is None or error.sqlstate[:2] in PASSING_FAULTS


async def touches_parked(read: Connection, models: Sequence[str]) -> bool:
    """Whether `batch` has events that must wait."""
    cursor = await read.execute(TOUCHES_PARKED, [list(models)])
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def keep_whole_batch(read: Connection) -> None:
    """Remember what is in `batch` for `apply_carefully`, until the transaction ends."""
    await read.execute(KEEP_WHOLE_BATCH)


async def drop_whole_batch(read: Connection) -> None:
    """Forget it before the transaction ends, when another one is to be kept."""
    await read.execute(DROP_WHOLE_BATCH)


async def apply_carefully(read: Connection, model: ReadModel, *, attempts: int = 1) -> list[Parked]:
    """Apply what can be applied of the whole batch to one read model, and park the rest.

    The transaction is the caller's, and `batch` is left in disorder. With k faulty aggregates among
    n it takes about 2 k log n tries.

    Raises:
        ReadModelFaultError: more than PARKED_PER_BATCH_MAX would be parked.
        psycopg.Error: a fault that is no event's.
    """
    types = list(model.events)
    await read.execute(QUEUE, [model.name, types])
    cursor = await read.execute(WANTED_AGGREGATES, [model.name, types])
    parts = [[aggregate_id for (aggregate_id,) in await cursor.fetchall()]]
    parked: list[Parked] = []
    while parts:
        part = parts.pop()
        if not part or await _fault_of(read, model, part) is None:
            continue
        if len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
            continue
        found = await _apply_one_by_one(read, model, part[0], attempts)
        if found is not None:
            parked.append(found)
        if len(parked) > PARKED_PER_BATCH_MAX:
            raise ReadModelFaultError(f"{model.name}: {parked[0].error}")
    if parked:
        await read.execute(QUEUE, [model.name, types])
    return parked


async def park_only_event(read: Connection, model: ReadModel, error: str) -> Parked:
    """Park the aggregate of the one event that the whole batch holds, untried."""
    cursor = await read.execute(ONLY_EVENT)
    row = await cursor.fetchone()
    assert row is not None
    event_id, aggregate, aggregate_id, lane = row
    await read.execute(PARK, [model.name, aggregate, aggregate_id, lane, event_id, error, 1])
    await read.execute(QUEUE, [model.name, list(model.events)])
    return Parked(model.name, aggregate, aggregate_id, event_id, error)


async def _apply_one_by_one(
    read: Connection, model: ReadModel, aggregate_id: str, attempts: int
) -> Parked | None:
    cursor = await read.execute(EVENTS_OF, [aggregate_id, list(model.events)])
    for event_id, aggregate, lane in await cursor.fetchall():
        fault = await _fault_of(read, model, [aggregate_id], event_id)
        if fault is not None:
            error = str(fault)[:ERROR_CHARACTERS_MAX]
            where = [model.name, aggregate, aggregate_id, lane, event_id, error, attempts]
            await read.execute(PARK, where)
            return Parked(model.name, aggregate, aggregate_id, event_id, error)
    return None


async def _fault_of(
    read: Connection, model: ReadModel, aggregates: list[str], event_id: int | None = None
) -> psycopg.Error | None:
    """Apply a part; what is wrong with it, or None when it is applied."""
    try:
        async with read.transaction():
            await read.execute(EMPTY_BATCH)
            await read.execute(CHOOSE, [aggregates, event_id])
            for statement in model.apply:
                await read.execute(statement)
    except psycopg.Error as error:
        if read.broken or not is_event_fault(error):
            raise
        return error
    return None


async def retry(
    read: Connection,
    outbox: Outbox,
    model: ReadModel,
    aggregate_id: str,
    *,
    skip_first: bool = False,
) -> Parked | None:
    """Apply what is queued for a parked aggregate, perhaps without the event that was at fault.

    Returns what it is parked for now, or None when it no longer is. Owns its transaction.

    Raises:
        RepairError: it is not parked, or more than QUEUE_MAX events wait.
    """
    await outbox.open()
    try:
        return await _retry(read, outbox, model, aggregate_id, skip_first=skip_first)
    finally:
        if not read.closed:
            await outbox.close()


async def _retry(
    read: Connection, outbox: Outbox, model: ReadModel, aggregate_id: str, *, skip_first: bool
) -> Parked | None:
    async with read.transaction():
        await hold(read, model.name)
        cursor = await read.execute(READ_PARKED, [model.name, aggregate_id])
        row = await cursor.fetchone()
        if row is None:
            raise RepairError(f"{aggregate_id} is not parked in {model.name}")
        event_id, attempts = row
        cursor = await read.execute(READ_QUEUE, [model.name, aggregate_id, QUEUE_MAX + 1])
        queue = [queued for (queued,) in await cursor.fetchall()]
        if len(queue) > QUEUE_MAX:
            raise RepairError(
                f"more than {QUEUE_MAX} events wait for {aggregate_id}: use `rederive`"
            )
        if skip_first:
            queue.remove(event_id)
        await outbox.take_events(aggregate_id, queue)
        await keep_whole_batch(read)
        await read.execute(UNPARK, [model.name, aggregate_id])
        found = await apply_carefully(read, model, attempts=attempts + 1)
    return found[0] if found else None


async def rederive(read: Connection, model: ReadModel, aggregate_id: str) -> None:
    """Take an aggregate's rows from the normalized tables; if it is parked, it no longer is.

    Events that the rows contain already are refused by their version when they come. Owns its
    transaction.
    """
    async with read.transaction():
        await hold(read, model.name)
        await read.execute(model.clear, [[aggregate_id]])
        await read.execute(model.bootstrap, [[aggregate_id]])
        await read.execute(UNPARK, [model.name, aggregate_id])


async def list_parked(read: Connection, model: str | None) -> list[tuple[Parked, int, int]]:
    """What is parked, of one read model or of all: with its attempts and its queued events."""
    cursor = await read.execute(LIST_PARKED, [model])
    return [
        (Parked(read_model, aggregate, aggregate_id, event_id, error), attempts, queued)
        for read_model, aggregate, aggregate_id, event_id, error, attempts, queued in (
            await cursor.fetchall()
        )
    ]
