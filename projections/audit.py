"""Compare read models with the normalized tables while both are written to, without false alarms.

Everything is read in one snapshot. Left out are the aggregates with an event that it sees and the
checkpoint does not contain, and those that are parked: they are known to be behind.
"""

from collections.abc import AsyncGenerator
from typing import Any, Final

from msgspec import Struct

from projections.outbox import Connection
from projections.read_model import ReadModel

STRETCH_MAX: Final = 1_000  # aggregates per transaction: some 50 ms, so no snapshot gets old
BEHIND_MAX: Final = 100_000  # aggregates to be left out; beyond that there is nothing to compare
DIFFERENCES_MAX: Final = 1_000  # shown per stretch

BEGIN_SNAPSHOT: Final = """
BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY
"""

# $1 read model, $2 rows at most. Rows: the aggregates that its rows may lack something of.
BEHIND: Final = """
SELECT event.aggregate_id
FROM projection_checkpoints AS checkpoint
JOIN outbox AS event
  ON event.lane = checkpoint.lane AND event.xid >= pg_snapshot_xmax(checkpoint.snapshot)
WHERE checkpoint.read_model = $1
UNION
SELECT event.aggregate_id
FROM projection_checkpoints AS checkpoint
JOIN outbox AS event
  ON event.lane = checkpoint.lane
 AND event.xid = ANY (ARRAY(SELECT pg_snapshot_xip(checkpoint.snapshot)))
WHERE checkpoint.read_model = $1
UNION
SELECT aggregate_id
FROM projection_parked
WHERE read_model = $1
LIMIT $2::integer
"""


class Difference(Struct, frozen=True):
    """A row that is not as the normalized tables say; one of both is None where there is no row."""

    aggregate_id: str
    expected: dict[str, Any] | None
    shown: dict[str, Any] | None


class TooFarBehindError(Exception):
    """So much is waiting to be applied that there is nothing to compare."""


async def audit(
    connection: Connection, model: ReadModel
) -> AsyncGenerator[tuple[int, list[Difference]]]:
    """Compare one read model, stretch by stretch: how many aggregates so far, and what differs.

    Owns its transactions, one per stretch.

    Raises:
        TooFarBehindError: let the projector catch up first.
    """
    after: str | None = None
    compared = 0
    while True:
        await connection.execute(BEGIN_SNAPSHOT)
        try:
            behind = await connection.execute(BEHIND, [model.name, BEHIND_MAX])
            left_out = [aggregate_id for (aggregate_id,) in await behind.fetchall()]
            if len(left_out) == BEHIND_MAX:
                raise TooFarBehindError(f"{model.name} is too far behind to be compared")
            stretch = await connection.execute(model.stretch, [after, STRETCH_MAX])
            found, last = await stretch.fetchone() or (0, None)
            # The last stretch is open, so that rows that should not be there are found, too.
            until = last if found == STRETCH_MAX else None
            rows = await connection.execute(model.audit, [after, until, left_out, DIFFERENCES_MAX])
            differences = [Difference(*row) for row in await rows.fetchall()]
        finally:
            await connection.rollback()
        compared += found
        yield compared, differences
        if until is None:
            return
        after = until
