"""How far each lane of each read model is, who may move it, and what became of those who tried."""

from collections.abc import Collection, Mapping
from typing import Final, TypeAlias

from msgspec import Struct

from projections.outbox import Connection, Position

Key: TypeAlias = tuple[str, int]  # (read model, lane)

# $1 text[] read models and $2 integer[] the versions of their code. Locks the lanes that nobody
# else holds until the transaction ends: this is the fence. Rows: one per read model and position,
# with what was published, the lanes, and whether anything of the read model is parked.
CLAIM: Final = """
WITH held AS (
    SELECT read_model, lane, snapshot::text, target::text, last_id, published::text
    FROM projection_checkpoints
    JOIN unnest($1::text[], $2::integer[]) AS wanted (read_model, version)
         USING (read_model, version)
    FOR UPDATE OF projection_checkpoints SKIP LOCKED
)
SELECT read_model, snapshot, target, last_id, array_agg(DISTINCT published),
       array_agg(lane ORDER BY lane),
       EXISTS (SELECT FROM projection_parked AS parked WHERE parked.read_model = held.read_model)
FROM held
GROUP BY read_model, snapshot, target, last_id
"""

# $1 read model, $2 lane, $3 version of the code. Locks it until the transaction ends, or finds no
# row because somebody else does.
CLAIM_LANE: Final = """
SELECT snapshot::text, target::text, last_id, published::text
FROM projection_checkpoints
WHERE read_model = $1 AND lane = $2 AND version = $3
FOR UPDATE SKIP LOCKED
"""

# $1 text[] read models, $2 smallint[] lanes: every pair is held. $3 snapshot, $4 target or null,
# $5 last id, $6 whether readers were told of the position before: then `published` follows.
MOVE: Final = """
UPDATE projection_checkpoints
SET snapshot = $3::pg_snapshot, target = $4::pg_snapshot, last_id = $5::bigint,
    published = CASE WHEN $6::boolean THEN snapshot ELSE published END, moved_at = now()
WHERE read_model = ANY ($1::text[]) AND lane = ANY ($2::smallint[])
"""

# $1 text[], $2 smallint[], $3 text[]: read models, lanes and the snapshots that readers were told
# of, row by row. Leaves alone what has moved since, or is being moved.
MARK_PUBLISHED: Final = """
WITH standing AS (
    SELECT read_model, lane
    FROM projection_checkpoints
    JOIN unnest($1::text[], $2::smallint[], $3::text[]) AS told (read_model, lane, snapshot)
         USING (read_model, lane)
    WHERE projection_checkpoints.snapshot::text = told.snapshot
      AND projection_checkpoints.published::text <> told.snapshot AND target IS NULL
    FOR UPDATE OF projection_checkpoints SKIP LOCKED
)
UPDATE projection_checkpoints AS checkpoint
SET published = snapshot
FROM standing
WHERE checkpoint.read_model = standing.read_model AND checkpoint.lane = standing.lane
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

# $1 bigint: this server. One row: the identifier of another one that a checkpoint was made with, or
# null.
FOREIGN_SYSTEM: Final = """
SELECT min(system_id)
FROM projection_checkpoints
WHERE system_id <> $1
"""


class ForeignCheckpointError(Exception):
    """The checkpoints are of another PostgreSQL, whose transaction ids mean nothing here."""


class Claim(Struct, frozen=True):
    """Lanes of read models that stand at one position, held until the transaction ends."""

    models: tuple[str, ...]
    lanes: tuple[int, ...]
    at: Position
    published: frozenset[str]  # snapshots that readers were told of, one or another
    has_parked: bool = False

    @property
    def keys(self) -> list[Key]:
        return [(model, lane) for model in self.models for lane in self.lanes]


class Lonely(Struct, frozen=True):
    """How far a lane is whose events are applied one by one."""

    until: int | None  # the last id
    tried: int | None  # the id that was tried last
    tries: int


async def claim(connection: Connection, versions: Mapping[str, int]) -> list[Claim]:
    """Hold every lane of these read models that is free, at the version of the code.

    Read models that stand at one position with the same lanes come together: they share a batch.
    """
    cursor = await connection.execute(CLAIM, [list(versions), list(versions.values())])
    claims: dict[tuple[Position, tuple[int, ...]], Claim] = {}
    for model, snapshot, target, last_id, published, lanes, has_parked in await cursor.fetchall():
        at, where = Position(snapshot, target, last_id), tuple(lanes)
        known = claims.get((at, where)) or Claim((), where, at, frozenset())
        claims[at, where] = Claim(
            (*known.models, model),
            where,
            at,
            known.published.union(published),
            known.has_parked or has_parked,
        )
    return list(claims.values())


async def claim_lane(connection: Connection, key: Key, version: int) -> Claim | None:
    """Hold one lane of one read model, unless somebody else does."""
    cursor = await connection.execute(CLAIM_LANE, [*key, version])
    row = await cursor.fetchone()
    if row is None:
        return None
    snapshot, target, last_id, published = row
    model, lane = key
    return Claim((model,), (lane,), Position(snapshot, target, last_id), frozenset([published]))


async def move(connection: Connection, held: Claim, to: Position, *, is_told: bool) -> None:
    """Let the held lanes stand at another position."""
    await connection.execute(
        MOVE,
        [list(held.models), list(held.lanes), to.snapshot, to.target, to.last_id, is_told],
    )


async def mark_published(connection: Connection, told: Mapping[Key, Position]) -> None:
    """Note what readers were told of, as far as it still stands. Owns its transaction."""
    whole = {key: at.snapshot for key, at in told.items() if at.target is None}
    models, lanes = _columns(whole)
    await connection.execute(MARK_PUBLISHED, [models, lanes, list(whole.values())])


async def start(connection: Connection, keys: Collection[Key]) -> dict[Key, int]:
    """Count a start in lanes that are held; returns the earlier ones that led to nothing."""
    cursor = await connection.execute(START, _columns(keys))
    return {(model, lane): unfinished for model, lane, unfinished in await cursor.fetchall()}


async def finish(connection: Connection, keys: Collection[Key]) -> None:
    """A batch was applied in these lanes, which are held: what was started is finished."""
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


def _columns(keys: Collection[Key]) -> tuple[list[str], list[int]]:
    return [model for model, _ in keys], [lane for _, lane in keys]
