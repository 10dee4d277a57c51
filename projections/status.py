"""How far behind each read model is, counted from the events themselves."""

from datetime import datetime
from typing import Final

from msgspec import Struct

from projections.outbox import Connection

# $1 how many waiting events are counted per lane, at most. Rows: one per read model. What is
# waiting is what is visible now and neither in the snapshot nor applied on the way to the target.
READ_STATUS: Final = """
SELECT checkpoint.read_model, min(checkpoint.version), count(*), min(checkpoint.moved_at),
       sum(waiting.events)::bigint,
       coalesce(extract(epoch FROM clock_timestamp() - min(waiting.oldest)), 0)::float8,
       (SELECT count(*)
        FROM projection_parked AS parked
        WHERE parked.read_model = checkpoint.read_model)
FROM projection_checkpoints AS checkpoint
CROSS JOIN LATERAL (
    SELECT count(*) AS events, min(occurred_at) AS oldest
    FROM (
        SELECT occurred_at
        FROM (
            SELECT id, xid, occurred_at
            FROM outbox
            WHERE lane = checkpoint.lane AND xid >= pg_snapshot_xmax(checkpoint.snapshot)
            UNION ALL
            SELECT id, xid, occurred_at
            FROM outbox
            WHERE lane = checkpoint.lane
              AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(checkpoint.snapshot)))
        ) AS event
        WHERE checkpoint.target IS NULL OR event.id > checkpoint.last_id
           OR NOT pg_visible_in_snapshot(event.xid, checkpoint.target)
        LIMIT $1::integer
    ) AS counted
) AS waiting
GROUP BY checkpoint.read_model
ORDER BY checkpoint.read_model
"""

COUNTED_MAX: Final = 1_000  # events per lane; beyond that there are "at least" so many


class Status(Struct, frozen=True):
    """One read model."""

    read_model: str
    version: int
    lanes: int
    moved_at: datetime
    events_behind: int  # in all lanes; COUNTED_MAX per lane at most
    lag_s: float  # age of the oldest of them; 0 when there is none
    parked: int


async def read_status(connection: Connection) -> list[Status]:
    cursor = await connection.execute(READ_STATUS, [COUNTED_MAX])
    return [Status(*row) for row in await cursor.fetchall()]
