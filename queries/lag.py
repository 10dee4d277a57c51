"""How far each read model is behind the outbox, counted from the events it lacks."""

from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[Record]
else:  # asyncpg's generics exist for the type checkers only
    Connection = object

# No parameters, no locks. One row per read model and lane, by read model. A checkpoint lacks what
# is visible here and not in its snapshot (the index on lane, xid, id; two branches, because one
# range from xmin would read all that was committed beside a long transaction). Counted up to 1,000
# in each branch: 0.6 ms when all is applied, 10 ms at a backlog of any size. While a large batch is
# paged, part of what is counted has been applied already, so the age is then the snapshot's.
MEASURE_LAG: Final = """
SELECT checkpoint.read_model, checkpoint.lane, checkpoint.version, missing.events,
       extract(epoch FROM now() - CASE
           WHEN checkpoint.target IS NULL THEN missing.oldest
           ELSE checkpoint.moved_at
       END)::float8 AS lag_s
FROM projection_checkpoints AS checkpoint
CROSS JOIN LATERAL (
    SELECT count(*) AS events, min(event.occurred_at) AS oldest
    FROM (
        (SELECT occurred_at
         FROM outbox
         WHERE lane = checkpoint.lane AND xid >= pg_snapshot_xmax(checkpoint.snapshot)
         ORDER BY lane, xid, id
         LIMIT 1000)
        UNION ALL
        (SELECT occurred_at
         FROM outbox
         WHERE lane = checkpoint.lane
           AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(checkpoint.snapshot)))
         ORDER BY lane, xid, id
         LIMIT 1000)
    ) AS event
) AS missing
ORDER BY checkpoint.read_model, checkpoint.lane
"""


class Lag(Struct, frozen=True):
    """One read model against the outbox, as committed now."""

    read_model: str
    version: int  # of the read model's code; the oldest, while lanes differ
    lag_s: float  # age of the oldest event it lacks
    lag_events: int  # how many it lacks; counting stops at 1,000 per lane
    lanes_behind: tuple[int, ...]


async def measure_lag(connection: Connection) -> list[Lag]:
    """One per read model that has checkpoints, by name."""
    rows = await connection.fetch(MEASURE_LAG)
    lags: list[Lag] = []
    for read_model, group in groupby(rows, key=lambda row: row["read_model"]):
        lanes = list(group)
        lags.append(
            Lag(
                read_model,
                version=min(lane["version"] for lane in lanes),
                # The clock of whoever wrote an event may be ahead of PostgreSQL's.
                lag_s=max(0.0, *(lane["lag_s"] if lane["events"] else 0.0 for lane in lanes)),
                lag_events=sum(lane["events"] for lane in lanes),
                lanes_behind=tuple(lane["lane"] for lane in lanes if lane["events"]),
            )
        )
    return lags
