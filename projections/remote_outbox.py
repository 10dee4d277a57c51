"""The snapshot cursor where the read tables are in another PostgreSQL than the outbox.

The outbox is read there, and the rows are copied into `batch` here as they come, in PostgreSQL's
binary format: this process does not look into them.
"""

from collections.abc import Sequence
from typing import Final, LiteralString

from projections.outbox import Connection, Outbox

# COPY takes no parameters, so they are settings of the session: $1 base, $2 target or null (now),
# $3 smallint[] lanes, $4 rows at most, $5 number of the list, $6 id after which the page begins,
# $7 aggregate, $8 bigint[] ids. One row: the target.
SET_CUT: Final = """
SELECT set_config('waybill.target', coalesce($2::text, pg_current_snapshot()::text), false),
       set_config('waybill.base', $1::text, false),
       set_config('waybill.lanes', $3::smallint[]::text, false),
       set_config('waybill.rows_max', $4::integer::text, false),
       set_config('waybill.backlog', $5::bigint::text, false),
       set_config('waybill.after', $6::bigint::text, false),
       set_config('waybill.aggregate_id', $7::text, false),
       set_config('waybill.ids', $8::bigint[]::text, false)
"""

# As TAKE in projections/outbox.py.
COPY_NEW: Final = """
COPY (
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM outbox
    WHERE lane = ANY (current_setting('waybill.lanes')::smallint[])
      AND xid >= pg_snapshot_xmax(current_setting('waybill.base')::pg_snapshot)
      AND xid < pg_snapshot_xmax(current_setting('waybill.target')::pg_snapshot)
      AND pg_visible_in_snapshot(xid, (SELECT current_setting('waybill.target')::pg_snapshot))
    UNION ALL
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM outbox
    WHERE lane = ANY (current_setting('waybill.lanes')::smallint[])
      AND xid = ANY (ARRAY(
              SELECT pg_snapshot_xip(current_setting('waybill.base')::pg_snapshot)))
      AND pg_visible_in_snapshot(xid, (SELECT current_setting('waybill.target')::pg_snapshot))
    LIMIT current_setting('waybill.rows_max')::integer
) TO STDOUT (FORMAT binary)
"""

# As TAKE_PAGE.
COPY_PAGE: Final = """
COPY (
    SELECT event.id, event.lane, event.aggregate, event.aggregate_id, event.aggregate_version,
           event.type, event.data, event.actor, event.traceparent, event.occurred_at
    FROM (
        SELECT lane, xid, id
        FROM backlog
        WHERE number = current_setting('waybill.backlog')::bigint
          AND id > current_setting('waybill.after')::bigint
          AND lane = ANY (current_setting('waybill.lanes')::smallint[])
        ORDER BY id
        LIMIT current_setting('waybill.rows_max')::integer
    ) AS page
    JOIN outbox AS event USING (lane, xid, id)
) TO STDOUT (FORMAT binary)
"""

# As TAKE_EVENTS.
COPY_EVENTS: Final = """
COPY (
    SELECT id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
           occurred_at
    FROM outbox
    WHERE aggregate_id = current_setting('waybill.aggregate_id')
      AND id = ANY (current_setting('waybill.ids')::bigint[])
) TO STDOUT (FORMAT binary)
"""

COPY_INTO_BATCH: Final = """
COPY batch (id, lane, aggregate, aggregate_id, aggregate_version, type, data, actor, traceparent,
            occurred_at)
FROM STDIN (FORMAT binary)
"""


class RemoteOutbox(Outbox):
    """Reads an outbox through the connection `write`, in autocommit, into `batch` on `read`."""

    is_remote = True

    def __init__(self, read: Connection, write: Connection) -> None:
        super().__init__(read)
        self._write = write

    async def take_events(self, aggregate_id: str, ids: Sequence[int]) -> None:
        await self._set_cut(aggregate_id=aggregate_id, ids=ids)
        await self._ship(COPY_EVENTS)

    async def _fill(
        self, base: str, target: str | None, lanes: Sequence[int], rows_max: int
    ) -> str:
        cut = await self._set_cut(base=base, target=target, lanes=lanes, rows_max=rows_max)
        await self._ship(COPY_NEW)
        return cut

    async def _fill_page(
        self, backlog: int, after: int, lanes: Sequence[int], rows_max: int
    ) -> None:
        await self._set_cut(backlog=backlog, after=after, lanes=lanes, rows_max=rows_max)
        await self._ship(COPY_PAGE)

    async def _set_cut(
        self,
        *,
        base: str = "",
        target: str | None = None,
        lanes: Sequence[int] | None = None,
        rows_max: int = 0,
        backlog: int = 0,
        after: int = 0,
        aggregate_id: str = "",
        ids: Sequence[int] | None = None,
    ) -> str:
        values = [
            base,
            target,
            list(lanes or ()),
            rows_max,
            backlog,
            after,
            aggregate_id,
            list(ids or ()),
        ]
        cut = await self._write.execute(SET_CUT, values)
        row = await cut.fetchone()
        assert row is not None
        return str(row[0])

    async def _ship(self, statement: LiteralString) -> None:
        async with (
            self._write.cursor().copy(statement) as source,
            self._read.cursor().copy(COPY_INTO_BATCH) as sink,
        ):
            async for row in source:
                await sink.write(row)
