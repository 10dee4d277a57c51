"""How far each lane of each read model is, who may move it, and what became of those who tried."""

from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeAlias

import msgspec
from msgspec import Struct

from projections.outbox import LANES, Connection, Position

Key: TypeAlias = tuple[str, int]  # (read model, lane)

# $1 text[] read models, $2 smallint[] lanes. Holds every pair that nobody else holds, until the
# transaction ends: this is the fence. It is in memory, so looking costs neither WAL nor a
# transaction id. Rows: one per read model, with the lanes.
HOLD_FREE: Final = """
SELECT read_model, array_agg(lane ORDER BY lane)
FROM unnest($1::text[]) AS read_model, unnest($2::smallint[]) AS lane
WHERE pg_try_advisory_xact_lock(hashtext('waybill:' || read_model), lane)
GROUP BY read_model
"""

# $1 read model, $2 smallint[] lanes. Waits for whoever holds one of them, and holds them all until
# the transaction ends. Rows: one per lane.
HOLD: Final = """
SELECT pg_advisory_xact_lock(hashtext('waybill:' || $1::text), lane)
FROM unnest($2::smallint[]) AS lane
"""

# In a statement of its own after the locks, so that it sees what the last holder committed. Rows:
# all positions, the oldest first, each with its address. The last column is the same in each: the
# read models that are filled, their versions, and whether anything of them is parked.
READ_POSITIONS: Final = """
SELECT ctid::text, read_models, lanes, snapshot::text, target::text, last_id, published::text,
       (SELECT jsonb_object_agg(read_model, jsonb_build_array(version, EXISTS (
                   SELECT
                   FROM projection_parked AS parked
                   WHERE parked.read_model = model.read_model)))
        FROM projection_models AS model)
FROM projection_positions
ORDER BY position_id
"""

# $1 tid[] rows to be deleted, all of whose keys are held; $2 how many they are; $3 jsonb, an array
# of new rows. If a row was not there any more, somebody wrote without holding it: then `moved_at`
# is null, and the transaction fails.
REPLACE_POSITIONS: Final = """
WITH gone AS (
    DELETE FROM projection_positions
    WHERE ctid = ANY ($1::text[]::tid[])
    RETURNING position_id
)
INSERT INTO projection_positions (read_models, lanes, snapshot, target, last_id, published,
                                  moved_at)
SELECT read_models, lanes, snapshot::pg_snapshot, target::pg_snapshot, last_id,
       published::pg_snapshot, CASE WHEN (SELECT count(*) FROM gone) = $2::integer THEN now() END
FROM jsonb_to_recordset($3::jsonb) AS position (
    read_models text[], lanes smallint[], snapshot text, target text, last_id bigint,
    published text)
"""

# $1 text[] read models, $2 whether anybody tells readers. One row: whether something is not
# applied, or perhaps not told. Writes nothing, while a turn takes a transaction id even if it finds
# nothing: emptying a temporary table at its end does.
IS_BEHIND: Final = """
SELECT EXISTS (
    SELECT
    FROM projection_checkpoints AS checkpoint
    WHERE read_model = ANY ($1::text[])
      AND (target IS NOT NULL
           OR ($2::boolean AND published::text <> snapshot::text)
           OR EXISTS (
                  SELECT
                  FROM outbox
                  WHERE lane = checkpoint.lane AND xid >= pg_snapshot_xmax(checkpoint.snapshot))
           OR EXISTS (
                  SELECT
                  FROM outbox
                  WHERE lane = checkpoint.lane
                    AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(checkpoint.snapshot))))))
"""

# $1 text[] and $2 smallint[]: read models and lanes, row by row, all held. Rows: each, with the
# number of earlier starts that no finished batch followed.
START: Final = """
INSERT INTO projection_attempts AS attempts (read_model, lane, started)
SELECT read_model, lane, 1
FROM unnest($1::text[], $2::smallint[]) AS held (read_model, lane)
ON CONFLICT (read_model, lane) DO UPDATE SET started = attempts.started + 1
RETURNING read_model, lane, started - finished - 1
"""

# $1 text[] and $2 smallint[]: read models and lanes, row by row, all held.
FINISH: Final = """
UPDATE projection_attempts AS attempts
SET finished = started, alone_until = NULL, alone_id = NULL, alone_tries = 0
FROM unnest($1::text[], $2::smallint[]) AS held (read_model, lane)
WHERE attempts.read_model = held.read_model AND attempts.lane = held.lane
"""

# $1 read model, $2 lane, held. One row.
READ_ALONE: Final = """
SELECT alone_until, alone_id, alone_tries
FROM projection_attempts
WHERE read_model = $1 AND lane = $2
"""

# $1 read model, $2 lane, held; $3 the last id to be applied alone, $4 the one that is next. Counts
# the tries of one id.
TRY_ALONE: Final = """
UPDATE projection_attempts
SET alone_until = $3::bigint, alone_id = $4::bigint,
    alone_tries = CASE WHEN alone_id = $4::bigint THEN alone_tries + 1 ELSE 1 END
WHERE read_model = $1 AND lane = $2
"""

# $1 bigint: this server. One row: the identifier of another one that a read model was filled from,
# or null.
FOREIGN_SYSTEM: Final = """
SELECT min(system_id)
FROM projection_models
WHERE system_id <> $1
"""


class ForeignCheckpointError(Exception):
    """The checkpoints are of another PostgreSQL, whose transaction ids mean nothing here."""


class Row(Struct, frozen=True):
    """One row of projection_positions."""

    tid: str
    models: tuple[str, ...]
    lanes: tuple[int, ...]
    at: Position
    published: str

    @property
    def keys(self) -> list[Key]:
        return [(model, lane) for model in self.models for lane in self.lanes]


class Claim(Struct, frozen=True):
    """Lanes of read models that stand at one position, held until the transaction ends."""

    models: tuple[str, ...]
    lanes: tuple[int, ...]
    at: Position
    published: dict[Key, str]  # the snapshots that readers were told of
    has_parked: bool


class Held(Struct, frozen=True):
    """What a transaction holds, and where everything stands."""

    claims: list[Claim]
    keys: frozenset[Key]
    rows: list[Row]
    newest: dict[Key, Row]


class Lonely(Struct, frozen=True):
    """How far a lane is whose events are applied one by one."""

    until: int | None  # the last id
    tried: int | None  # the id that was tried last
    tries: int


async def claim(
    connection: Connection,
    versions: Mapping[str, int],
    *,
    lanes: Collection[int] = range(LANES),
    leaving: Collection[Key] = (),
) -> Held:
    """Hold every lane of these read models that is free, at the version of the code.

    Read models that stand at one position with the same lanes come together: they share a batch.
    Keys that are to be left where they are stand in no claim.
    """
    free = await connection.execute(HOLD_FREE, [list(versions), list(lanes)])
    positions = await connection.execute(READ_POSITIONS)
    free_lanes: list[tuple[str, list[int]]] = await free.fetchall()
    rows: list[Row] = []
    filled: dict[str, tuple[int, bool]] = {}
    for tid, named, in_lanes, *at, published, models in await positions.fetchall():
        rows.append(Row(tid, tuple(named), tuple(in_lanes), Position(*at), published))
        filled = models
    newest = {key: row for row in rows for key in row.keys}
    keys = [
        (name, lane)
        for name, held in free_lanes
        if filled.get(name, (None, False))[0] == versions[name]
        for lane in held
    ]
    standing: dict[Position, list[Key]] = {}
    for key in keys:
        if key not in leaving:
            standing.setdefault(newest[key].at, []).append(key)
    claims = [
        Claim(
            named,
            in_lanes,
            at,
            {(name, lane): newest[name, lane].published for name in named for lane in in_lanes},
            any(filled[name][1] for name in named),
        )
        for at, together in standing.items()
        for named, in_lanes in _together(together)
    ]
    return Held(claims, frozenset(keys), rows, newest)


async def is_behind(connection: Connection, models: Iterable[str], *, announcing: bool) -> bool:
    """Whether there is anything to apply or to tell. The outbox is on this server."""
    cursor = await connection.execute(IS_BEHIND, [list(models), announcing])
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def move(
    connection: Connection, held: Held, moved: Mapping[Key, tuple[Position, str]]
) -> None:
    """Let held lanes stand elsewhere: each with its position, and what was published.

    Rows that say nothing any more are deleted, as far as all that they name is held.
    """
    standing: dict[tuple[Position, str], list[Key]] = {}
    for key, stands in moved.items():
        standing.setdefault(stands, []).append(key)
    gone = [
        row.tid
        for row in held.rows
        if held.keys.issuperset(row.keys)
        and all(key in moved or held.newest[key] is not row for key in row.keys)
    ]
    rows = [
        {
            "read_models": named,
            "lanes": lanes,
            "snapshot": at.snapshot,
            "target": at.target,
            "last_id": at.last_id,
            "published": published,
        }
        for (at, published), keys in standing.items()
        for named, lanes in _together(keys)
    ]
    arguments = [gone, len(gone), msgspec.json.encode(rows).decode()]
    await connection.execute(REPLACE_POSITIONS, arguments)


async def hold(connection: Connection, model: str) -> None:
    """Hold all lanes of a read model until the transaction ends; waits for whoever moves them."""
    await connection.execute(HOLD, [model, list(range(LANES))])


async def start(connection: Connection, keys: Collection[Key]) -> dict[Key, int]:
    """Count a start in lanes that are held; returns the earlier ones that led to nothing."""
    cursor = await connection.execute(START, _columns(keys))
    return {(model, lane): unfinished for model, lane, unfinished in await cursor.fetchall()}


async def finish(connection: Connection, keys: Collection[Key]) -> None:
    """A batch was applied in these lanes: what was started is finished."""
    await connection.execute(FINISH, _columns(keys))


async def read_alone(connection: Connection, key: Key) -> Lonely:
    cursor = await connection.execute(READ_ALONE, key)
    row = await cursor.fetchone()
    assert row is not None, "a lane is started before it is moved"
    return Lonely(*row)


async def try_alone(connection: Connection, key: Key, *, until: int, event_id: int) -> None:
    """Note that this event is the next to be applied alone. It counts once this is committed."""
    await connection.execute(TRY_ALONE, [*key, until, event_id])


async def refuse_foreign(connection: Connection, system_id: int) -> None:
    """Compare the checkpoints with the server that has the outbox.

    Raises:
        ForeignCheckpointError: they differ, as after a restore into a new server.
    """
    cursor = await connection.execute(FOREIGN_SYSTEM, [system_id])
    row = await cursor.fetchone()
    foreign = None if row is None else row[0]
    if foreign is not None:
        raise ForeignCheckpointError(
            f"the read models were projected from the PostgreSQL with system identifier {foreign}, "
            f"this one is {system_id}: rebuild them with `projections rebuild --all`"
        )


def _together(keys: Iterable[Key]) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Read models and lanes such that every pair of them is a key; as few as is easy."""
    lanes: dict[str, list[int]] = {}
    for model, lane in keys:
        lanes.setdefault(model, []).append(lane)
    models: dict[tuple[int, ...], list[str]] = {}
    for model, standing in lanes.items():
        models.setdefault(tuple(standing), []).append(model)
    return [(tuple(named), standing) for standing, named in models.items()]


def _columns(keys: Collection[Key]) -> tuple[list[str], list[int]]:
    return [model for model, _ in keys], [lane for _, lane in keys]
