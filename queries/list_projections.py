"""List the read models: how far each is, what it has parked, and whether it moves."""

from datetime import datetime
from itertools import groupby
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from queries.cache import Entry
from queries.lag import Lag, measure_lag
from queries.read_side import Found, ReadSide

# behind: it lacks events and catches up. parked: an aggregate waits for an operator. stopped: it
# has lacked an event for STOPPED_S, and has not moved for as long, as far as this process has seen.
State: TypeAlias = Literal["current", "behind", "parked", "stopped"]

STOPPED_S: Final = 10.0  # ten sweeps of an idle worker
PARKED_SHOWN_MAX: Final = 100  # of each read model, the oldest


class ParkedAggregate(Struct, frozen=True):
    """One aggregate that has an event which could not be applied."""

    aggregate: str
    aggregate_id: str
    event_id: int
    attempts: int
    parked_at: datetime
    error: str


class Projection(Struct, frozen=True):
    """One read model. `lag_events` is counted up to 1,000 per lane."""

    read_model: str
    version: int
    state: State
    lag_s: float
    lag_events: int
    parked_count: int
    parked: list[ParkedAggregate]


class Projections(Struct, frozen=True):
    """The answer."""

    data: list[Projection]


# $1 how many rows per read model. The oldest parked aggregates of each, and the number of all.
LIST_PARKED: Final = """
SELECT read_model, aggregate, aggregate_id, event_id, attempts, parked_at, error, total
FROM (
    SELECT read_model, aggregate, aggregate_id, event_id, attempts, parked_at, error,
           count(*) OVER (PARTITION BY read_model) AS total,
           row_number() OVER (PARTITION BY read_model ORDER BY parked_at, aggregate_id) AS place
    FROM projection_parked
) AS parked
WHERE place <= $1
ORDER BY read_model, place
"""


async def list_projections(read_side: ReadSide) -> Found:
    """Every read model that has checkpoints, by name. Measured now, and not cached.

    Raises:
        ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
    """
    return Found(Entry(_encode(Projections(await measure_projections(read_side)))))


async def measure_projections(read_side: ReadSide) -> list[Projection]:
    """The same, for gauges and the health report."""
    async with read_side.connection() as connection:
        lags = await measure_lag(connection)
        rows = await connection.fetch(LIST_PARKED, PARKED_SHOWN_MAX)
    parked = {
        model: list(group) for model, group in groupby(rows, key=lambda row: row["read_model"])
    }
    projections: list[Projection] = []
    for lag in lags:
        aggregates = parked.get(lag.read_model, [])
        still_s = read_side.freshness.still_s(lag.read_model, lag.lanes_behind)
        projections.append(
            Projection(
                read_model=lag.read_model,
                version=lag.version,
                state=judge(lag, still_s=still_s, is_parked=bool(aggregates)),
                lag_s=round(lag.lag_s, 3),
                lag_events=lag.lag_events,
                parked_count=aggregates[0]["total"] if aggregates else 0,
                parked=[ParkedAggregate(*row[1:7]) for row in aggregates],
            )
        )
    return projections


def judge(lag: Lag, *, still_s: float, is_parked: bool) -> State:
    """The worst that is true. `still_s`: how long a lane that is behind has not moved."""
    if lag.lag_events and min(lag.lag_s, still_s) > STOPPED_S:
        return "stopped"
    if is_parked:
        return "parked"
    return "behind" if lag.lag_events else "current"


_encode: Final = msgspec.json.Encoder().encode
