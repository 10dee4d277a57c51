"""Fill read models from the normalized tables: at their first start, and again when asked to.

Rows and position come from one statement, so from one snapshot: whatever was committed before is in
the rows, whatever comes after is in the outbox beyond the checkpoint, and nothing is in both. The
lanes are held meanwhile, so no batch of this read model is applied; readers see the old rows until
the commit.
"""

from collections.abc import Iterable
from typing import Final

from projections.outbox import LANES, Connection
from projections.parking import HOLD_LANES, UNPARK
from projections.read_model import ReadModel

# Filling takes as long as it takes; whoever holds a lane holds it for one batch.
TAKE_TIME: Final = """
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL lock_timeout = '30s'
"""

# $1 read model. One row: whether nobody else fills it. Held until the transaction ends.
LOCK_FILLING: Final = """
SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))
"""

# $1 read model. One row: the version that its rows are of, or null.
FILLED_VERSION: Final = """
SELECT min(version)
FROM projection_checkpoints
WHERE read_model = $1
"""

# $1 read model, $2 number of lanes, $3 version, $4 snapshot. Readers of a table that was empty
# know nothing, so nothing is left to be published; others are told to forget everything.
SET_CHECKPOINTS: Final = """
INSERT INTO projection_checkpoints (read_model, lane, version, snapshot, published, system_id,
                                    moved_at)
SELECT $1::text, lane, $3::integer, $4::pg_snapshot, $4::pg_snapshot, system_identifier, now()
FROM generate_series(0, $2::integer - 1) AS lane, pg_control_system()
ON CONFLICT (read_model, lane) DO UPDATE
SET version = excluded.version, snapshot = excluded.snapshot, target = NULL, last_id = 0,
    published = excluded.published, system_id = excluded.system_id, moved_at = excluded.moved_at
"""

# $1 read model.
FORGET_ATTEMPTS: Final = """
DELETE FROM projection_attempts
WHERE read_model = $1
"""


# Transaction ids of another server may lie in this one's future: they are set to the oldest that
# there is, which every snapshot contains. One row: how many checkpoints are of another server.
COUNT_FOREIGN: Final = """
SELECT count(*)
FROM projection_checkpoints
WHERE system_id <> (SELECT system_identifier FROM pg_control_system())
"""
REANCHOR_OUTBOX: Final = """
UPDATE outbox
SET xid = '3'
WHERE xid >= pg_snapshot_xmin(pg_current_snapshot())
"""
REANCHOR_KEYS: Final = """
UPDATE idempotency_keys
SET xid = '3'
WHERE xid >= pg_snapshot_xmin(pg_current_snapshot())
"""


async def reanchor(connection: Connection) -> bool:
    """Make the outbox of a restored database this server's own; then fill all read models anew.

    False, and nothing done, where it is already. Owns its transaction.
    """
    async with connection.transaction():
        foreign = await (await connection.execute(COUNT_FOREIGN)).fetchone()
        if foreign is None or foreign[0] == 0:
            return False
        await connection.execute(TAKE_TIME)
        await connection.execute(REANCHOR_OUTBOX)
        await connection.execute(REANCHOR_KEYS)
    return True


async def fill_missing(connection: Connection, models: Iterable[ReadModel]) -> list[ReadModel]:
    """Fill the read models that never were, or whose code is newer than their rows.

    Returns those that had rows before, which readers must forget. One that another worker fills at
    this moment is left to it. Owns its transactions.
    """
    refilled: list[ReadModel] = []
    for model in models:
        version = await _filled_version(connection, model)
        if version is not None and version >= model.version:
            continue
        if await fill(connection, model) and version is not None:
            refilled.append(model)
    return refilled


async def fill(connection: Connection, model: ReadModel, *, anew: bool = False) -> bool:
    """Fill one read model; False when somebody else does, or, if not `anew`, just has.

    What was parked is applied by that, too. Owns its transaction, which may take minutes: 4 million
    orders need about as long as the bare INSERT.
    """
    async with connection.transaction():
        await connection.execute(TAKE_TIME)
        locked = await (await connection.execute(LOCK_FILLING, [model.name])).fetchone()
        if not (locked and locked[0]):
            return False
        version = await _filled_version(connection, model)
        if not anew and version is not None and version >= model.version:
            return False
        await connection.execute(HOLD_LANES, [model.name])
        await connection.execute(model.clear, [None])
        snapshot = await (await connection.execute(model.bootstrap, [None])).fetchone()
        assert snapshot is not None
        checkpoints = [model.name, LANES, model.version, snapshot[0]]
        await connection.execute(SET_CHECKPOINTS, checkpoints)
        await connection.execute(UNPARK, [model.name, None])
        await connection.execute(FORGET_ATTEMPTS, [model.name])
    return True


async def _filled_version(connection: Connection, model: ReadModel) -> int | None:
    row = await (await connection.execute(FILLED_VERSION, [model.name])).fetchone()
    return None if row is None else row[0]
