"""The snapshot cursor: what became visible in the outbox since a snapshot, put into `batch`.

A position is a `pg_snapshot`, not a number. The next batch is what is visible now and was not
visible then; nothing is lost, an aggregate's events never come in the wrong order, and nobody's
open transaction holds us up. docs/decisions/0002-snapshot-cursor.md has the reasons and the limits.

Where the outbox and the read tables are in one PostgreSQL, the batch is taken in one statement
there. Where they are not, its rows are copied through this process, never decoded; on one server
that was measured to cost four times as much (1.5 against 6 ms of CPU per 550 events).
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, LiteralString, TypeAlias

from msgspec import Struct, structs
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

Connection: TypeAlias = AsyncConnection[TupleRow]

# What the backlog of one target may list at a time: 100 bytes each in a temporary table, and one
# pass over all that is waiting for each list.
BACKLOG_MAX: Final = 500_000
# Lists kept at a time: read models that were rebuilt apart catch up apart.
BACKLOGS_MAX: Final = 8
PREPARE_THRESHOLD: Final = 5  # psycopg's own
LANES: Final = 16  # 0 to 15, as commands/outbox.py gives them out

# `toast_tuple_target`: a batch lives for milliseconds, so nothing is moved out of its rows.
MAKE_BATCH: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS batch (
    id                bigint NOT NULL,
    lane              smallint NOT NULL,
    aggregate         text NOT NULL,
    aggregate_id      text NOT NULL,
    aggregate_version integer NOT NULL,
    type              text NOT NULL,
    data              jsonb NOT NULL,
    actor             text NOT NULL,
    traceparent       text,
    occurred_at       timestamptz NOT NULL
) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS
"""

MAKE_BACKLOG: Final = """
CREATE TEMPORARY TABLE IF NOT EXISTS backlog (
    number bigint NOT NULL,
    id     bigint NOT NULL,
    lane   smallint NOT NULL,
    xid    xid8 NOT NULL,
    PRIMARY KEY (number, id)
)
"""

# Every statement here finds rows by their keys, whatever the statistics of a temporary table say;
# and planning the cursor anew for each batch takes longer than a small batch does.
PLAN_FOR_KEYS: Final = """
SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off;
SET enable_hashjoin = off;
SET enable_mergejoin = off
"""

RESET_SESSION: Final = """
RESET ALL;
DROP TABLE IF EXISTS pg_temp.batch, pg_temp.backlog
"""

# $1 base and $2 target snapshot (null: now), $3 smallint[] lanes, $4 rows at most, in no order.
# Two branches: what began after the base, and what was in flight then. One range over both would
# read everything that was committed while the oldest of them was open. Index: outbox_cursor.
# One row: the target. What it contains was committed, so a later snapshot sees it, too.
TAKE: Final = """
WITH cut AS MATERIALIZED (
    SELECT coalesce($2::pg_snapshot, pg_current_snapshot()) AS target
), fresh AS (
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM outbox
    WHERE lane = ANY ($3::smallint[])
      AND xid >= pg_snapshot_xmax($1::pg_snapshot)
      AND xid < pg_snapshot_xmax((SELECT target FROM cut))
      AND pg_visible_in_snapshot(xid, (SELECT target FROM cut))
    UNION ALL
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM outbox
    WHERE lane = ANY ($3::smallint[])
      AND xid = ANY (ARRAY(SELECT pg_snapshot_xip($1::pg_snapshot)))
      AND pg_visible_in_snapshot(xid, (SELECT target FROM cut))
    LIMIT $4::integer
), taken AS (
    INSERT INTO batch (id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                       traceparent, occurred_at)
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM fresh
)
SELECT target::text
FROM cut
"""

# $1 number of the list, $2 base, $3 target, $4 id after which it begins, $5 smallint[] all lanes,
# $6 rows at most. Lists the events between the snapshots with the smallest ids, and reads all that
# wait. One row: how many are listed, and the last id, or null.
LIST_BACKLOG: Final = """
WITH waiting AS (
    SELECT id, lane, xid
    FROM outbox
    WHERE lane = ANY ($5::smallint[])
      AND xid >= pg_snapshot_xmax($2::pg_snapshot)
      AND xid < pg_snapshot_xmax($3::pg_snapshot)
      AND pg_visible_in_snapshot(xid, $3::pg_snapshot)
    UNION ALL
    SELECT id, lane, xid
    FROM outbox
    WHERE lane = ANY ($5::smallint[])
      AND xid = ANY (ARRAY(SELECT pg_snapshot_xip($2::pg_snapshot)))
      AND pg_visible_in_snapshot(xid, $3::pg_snapshot)
), listed AS (
    INSERT INTO backlog (number, id, lane, xid)
    SELECT $1::bigint, id, lane, xid
    FROM waiting
    WHERE id > $4::bigint
    ORDER BY id
    LIMIT $6::integer
    RETURNING id
)
SELECT count(*), max(id)
FROM listed
"""

# $1 bigint[]: the lists still in use.
FORGET_BACKLOGS: Final = """
DELETE FROM backlog
WHERE number <> ALL ($1::bigint[])
"""

# $1 number of the list, $2 id after which the page begins, $3 smallint[] lanes, $4 rows at most.
TAKE_PAGE: Final = """
INSERT INTO batch (id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                   traceparent, occurred_at)
SELECT event.id, event.lane, event.aggregate, event.aggregate_id, event.aggregate_version,
       event.type, event.data, event.actor, event.traceparent, event.occurred_at
FROM (
    SELECT lane, xid, id
    FROM backlog
    WHERE number = $1::bigint AND id > $2::bigint AND lane = ANY ($3::smallint[])
    ORDER BY id
    LIMIT $4::integer
) AS page
JOIN outbox AS event USING (lane, xid, id)
"""

# $1 aggregate, $2 bigint[] ids of its events. Index: the unique one of each partition.
TAKE_EVENTS: Final = """
INSERT INTO batch (id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                   traceparent, occurred_at)
SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
       occurred_at
FROM outbox
WHERE aggregate_id = $1 AND id = ANY ($2::bigint[])
"""

EMPTY_BATCH: Final = """
DELETE FROM batch
"""

SYSTEM_IDENTIFIER: Final = """
SELECT system_identifier
FROM pg_control_system()
"""

# One row. For an empty batch the number is 0, the arrays are empty, and the rest is null. Then what
# readers must forget, as JSON arrays: orders as [id, version], their customers, and SKUs.
DESCRIBE_BATCH: Final = """
SELECT coalesce(sum(events), 0)::integer, max(last_id), min(oldest),
       coalesce(array_agg(type), '{}'),
       ARRAY(SELECT DISTINCT traceparent FROM batch WHERE traceparent IS NOT NULL),
       (SELECT '[' || coalesce(string_agg('["' || aggregate_id || '",' || version || ']', ','), '')
                   || ']'
        FROM (SELECT aggregate_id, max(aggregate_version) AS version
              FROM batch
              WHERE aggregate = 'order'
              GROUP BY aggregate_id) AS changed),
       (SELECT '[' || coalesce(string_agg('"' || customer_id || '"', ','), '') || ']'
        FROM (SELECT data ->> 'customer_id' AS customer_id
              FROM batch
              WHERE aggregate = 'order'
              GROUP BY 1) AS changed),
       (SELECT '[' || coalesce(string_agg('"' || sku || '"', ','), '') || ']'
        FROM (SELECT split_part(aggregate_id, '@', 1) AS sku
              FROM batch
              WHERE aggregate = 'stock'
              GROUP BY 1) AS changed)
FROM (
    SELECT type, count(*) AS events, max(id) AS last_id, min(occurred_at) AS oldest
    FROM batch
    GROUP BY type
) AS of_type
"""


class Position(Struct, frozen=True):
    """How far lanes of a read model are: all of `snapshot`, and `target` up to `last_id`."""

    snapshot: str
    target: str | None = None
    last_id: int = 0


class Changes(Struct, frozen=True):
    """What readers must forget; each is a JSON array."""

    orders: str  # of [id, version]
    customers: str  # of the ids of the orders' customers
    skus: str  # of those whose stock changed


class Batch(Struct, frozen=True):
    """What stands in the temporary table `batch`."""

    reaches: Position  # once it is applied
    events: int
    last_id: int
    oldest: datetime | None
    types: frozenset[str]
    traceparents: tuple[str, ...]  # W3C, of sampled requests, each once
    changes: Changes


class Backlog(Struct, frozen=True):
    """A list of what waits between two snapshots, by id; `until` is set where it is cut off."""

    number: int
    after: int
    until: int | None


class Outbox:
    """Reads the outbox of the PostgreSQL that has the read tables. Owns no transaction."""

    is_remote = False

    def __init__(self, read: Connection) -> None:
        self._read = read
        self._write = read  # where the outbox is
        self._backlogs: dict[tuple[str, str], Backlog] = {}
        self._lists = 0

    async def open(self) -> None:
        """Prepare the session for keys and batches; for anything else `close` it first."""
        await self._read.execute(MAKE_BATCH)
        await self._write.execute(MAKE_BACKLOG)
        for connection in {self._read, self._write}:
            await connection.execute(PLAN_FOR_KEYS)
            connection.prepare_threshold = 0

    async def close(self) -> None:
        """Leave the session as it was found."""
        for connection in {self._read, self._write}:
            connection.prepare_threshold = PREPARE_THRESHOLD
            await connection.execute(RESET_SESSION, prepare=False)

    async def system_identifier(self) -> int:
        """Which server's transaction ids the outbox has."""
        return int(await _value(self._write, SYSTEM_IDENTIFIER))

    async def take(
        self, at: Position, lanes: Sequence[int], *, target: str | None, events_max: int
    ) -> Batch:
        """Fill `batch` with the next events of these lanes, in no order.

        They reach to `target` (None: to now), or, where more than `events_max` wait, to an id on
        the way there; the position that comes with them says so.
        """
        if at.target is None:
            batch, target = await self.take_all(
                at.snapshot, lanes, target=target, events_max=events_max
            )
            if batch is not None:
                return batch
            at = Position(at.snapshot, target)
        return await self._take_page(at, lanes, events_max)

    async def take_all(
        self, base: str, lanes: Sequence[int], *, target: str | None, events_max: int
    ) -> tuple[Batch | None, str]:
        """Fill `batch` with everything between two snapshots, or, if it is too much, with nothing.

        Returns the batch and the target, which is this moment when none is given.
        """
        target = await self._fill(base, target, lanes, events_max + 1)
        batch = await self._describe(Position(target))
        if batch.events <= events_max:
            return batch, target
        await self.empty()
        return None, target

    async def take_events(self, aggregate_id: str, ids: Sequence[int]) -> None:
        """Fill `batch` with these events of one aggregate."""
        await self._read.execute(TAKE_EVENTS, [aggregate_id, list(ids)])

    async def empty(self) -> None:
        await self._read.execute(EMPTY_BATCH)

    def forget(self) -> None:
        """The transaction was rolled back, and with it what this object believed to be listed."""
        self._backlogs.clear()

    async def _fill(
        self, base: str, target: str | None, lanes: Sequence[int], rows_max: int
    ) -> str:
        return str(await _value(self._read, TAKE, [base, target, list(lanes), rows_max]))

    async def _fill_page(
        self, backlog: int, after: int, lanes: Sequence[int], rows_max: int
    ) -> None:
        await self._read.execute(TAKE_PAGE, [backlog, after, list(lanes), rows_max])

    async def _describe(self, reaches: Position) -> Batch:
        described = await self._read.execute(DESCRIBE_BATCH)
        row = await described.fetchone()
        assert row is not None
        events, last_id, oldest, types, traceparents, *changes = row
        return Batch(
            reaches,
            events,
            last_id or 0,
            oldest,
            frozenset(types),
            tuple(traceparents),
            Changes(*changes),
        )

    async def _take_page(self, at: Position, lanes: Sequence[int], events_max: int) -> Batch:
        assert at.target is not None
        backlog = await self._backlog(at.snapshot, at.target, at.last_id)
        await self._fill_page(backlog.number, at.last_id, lanes, events_max)
        batch = await self._describe(Position(at.target))
        if batch.events < events_max:
            if backlog.until is None:
                return batch
            reaches = Position(at.snapshot, at.target, backlog.until)
        else:
            reaches = Position(at.snapshot, at.target, batch.last_id)
        return structs.replace(batch, reaches=reaches)

    async def _backlog(self, base: str, target: str, after: int) -> Backlog:
        """The list of what waits between two snapshots beyond an id; made when there is none."""
        known = self._backlogs.get((base, target))
        if known is not None and known.after <= after and after != known.until:
            return known
        self._lists += 1
        arguments = [self._lists, base, target, after, list(range(LANES)), BACKLOG_MAX]
        listed = await self._write.execute(LIST_BACKLOG, arguments)
        row = await listed.fetchone()
        assert row is not None
        until = row[1] if row[0] == BACKLOG_MAX else None
        backlog = self._backlogs[base, target] = Backlog(self._lists, after, until)
        for oldest in list(self._backlogs)[:-BACKLOGS_MAX]:
            del self._backlogs[oldest]
        in_use = [each.number for each in self._backlogs.values()]
        await self._write.execute(FORGET_BACKLOGS, [in_use])
        return backlog


async def _value(connection: Connection, statement: LiteralString, arguments: Any = None) -> Any:
    cursor = await connection.execute(statement, arguments)
    row = await cursor.fetchone()
    assert row is not None
    return row[0]
