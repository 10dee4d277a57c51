"""Fill read models from the normalized tables: at their first start, and again when asked to.

Rows and position come from one statement, so from one snapshot: whatever was committed before is in
the rows, whatever comes after is in the outbox beyond the checkpoint, and nothing is in both. The
lanes are held meanwhile, so no batch of this read model is applied; readers see the old rows until
the commit.
"""

from collections.abc import Iterable
from typing import Final

from projections.checkpoints import hold
from projections.outbox import LANES, Connection
from projections.parking import UNPARK
from projections.read_model import ReadModel

# Filling takes as long as it takes; whoever holds a lane holds it for one batch.
TAKE_TIME: Final = """
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL lock_timeout = '30s'
"""

# $1 read model. One row: whether nobody else fills it. Held until the transaction ends.
LOCK_FILLING: Final = """
SELECT pg_try_advisory_xact_lock(hashtext('waybill: fill'), hashtext($1))
"""

# $1 read model. One row, or none.
FILLED_VERSION: Final = """
SELECT version
FROM projection_models
WHERE read_model = $1
"""

# $1 read model, $2 version.
SET_VERSION: Final = """
INSERT INTO projection_models (read_model, version, system_id)
SELECT $1::text, $2::integer, system_identifier
FROM pg_control_system()
ON CONFLICT (read_model) DO UPDATE SET version = excluded.version, system_id = excluded.system_id
"""

# $1 read model, $2 smallint[] all lanes, $3 snapshot. Readers of a table that was empty know
# nothing, so nothing is left to be published; others are told to forget everything.
SET_POSITION: Final = """
INSERT INTO projection_positions (read_models, lanes, snapshot, published, moved_at)
VALUES (ARRAY[$1::text], $2::smallint[], $3::pg_snapshot, $3::pg_snapshot, now())
"""

# $1 read model.
FORGET_ATTEMPTS: Final = """
UPDATE projection_attempts
SET finished = started, alone_until = NULL, alone_id = NULL, alone_tries = 0
WHERE read_model = $1
"""


# Transaction ids of another server may lie in this one's future: they are set to the oldest that
# there is, which every snapshot contains. One row: how many read models are of another server.
COUNT_FOREIGN: Final = """
SELECT count(*)
FROM projection_models
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


async def fill_missing(
    connection: Connection, models: Iterable[ReadModel]
) -> tuple[list[ReadModel], list[ReadModel]]:
    """Fill the read models that never were, or whose code is newer than their rows.

    Returns those that had rows before, which readers must forget, and those that another worker
    fills at this moment. Owns its transactions.
    """
    refilled: list[ReadModel] = []
    elsewhere: list[ReadModel] = []
    for model in models:
        version = await _filled_version(connection, model)
        if version is not None and version >= model.version:
            continue
        if not await fill(connection, model):
            elsewhere.append(model)
        elif version is not None:
            refilled.append(model)
    return refilled, elsewhere


async def fill(connection: Connection, model: ReadModel, *, anew: bool = False) -> bool:
    """Fill one read model, if not `anew` only when nobody just has; False when somebody else does.

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
            return True
        await hold(connection, model.name)
        await connection.execute(model.clear, [None])
        snapshot = await (await connection.execute(model.bootstrap, [None])).fetchone()
        assert snapshot is not None
        await connection.execute(SET_VERSION, [model.name, model.version])
        lanes = list(range(LANES))
        await connection.execute(SET_POSITION, [model.name, lanes, snapshot[0]])
        await connection.execute(UNPARK, [model.name, None])
        await connection.execute(FORGET_ATTEMPTS, [model.name])
    return True


async def _filled_version(connection: Connection, model: ReadModel) -> int | None:
    row = await (await connection.execute(FILLED_VERSION, [model.name])).fetchone()
    return None if row is None else row[0]
