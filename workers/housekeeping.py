"""What grows is bounded: outbox partitions ahead of the writers, old keys and windows deleted."""

from typing import Final, LiteralString

import structlog
from psycopg import sql

from projections.outbox import Connection

PARTITION_IDS: Final = 16_777_216  # ids per partition of the outbox, as in migrations/0001
PARTITIONS_AHEAD: Final = 2  # empty ones: more than an hour at 4,000 events a second each
DELETED_MAX: Final = 5_000  # rows per statement, so that none holds its locks for long
STATEMENTS_MAX: Final = 100  # per run: 500 thousand keys a minute, above what anybody writes

# $1 ids per partition. One row: the number of the partition that is written to, and of the last one
# with rows in the default partition, or -1.
OUTBOX_EXTENT: Final = """
SELECT (SELECT last_value FROM outbox_id) / $1::bigint,
       coalesce((SELECT max(id) FROM outbox_default) / $1::bigint, -1)
"""

# $1 text: name of a table. One row.
IS_TABLE: Final = """
SELECT to_regclass($1::text) IS NOT NULL
"""

# A partition is made apart and then attached: this waits for no writer, and only the default
# partition, which has no rows of this range, is locked for a moment.
MAKE_PARTITION: Final = sql.SQL("""
CREATE TABLE {table} (LIKE outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
""")
INDEX_PARTITION: Final = sql.SQL("""
CREATE UNIQUE INDEX {index} ON {table} (aggregate_id, aggregate_version)
""")
ATTACH_PARTITION: Final = sql.SQL("""
ALTER TABLE outbox ATTACH PARTITION {table} FOR VALUES FROM ({first}) TO ({end})
""")

# $1 rows at most. A key is good for two days; whoever repeats a request later makes a new one.
DELETE_OLD_KEYS: Final = """
DELETE FROM idempotency_keys
WHERE ctid = ANY (ARRAY(
    SELECT ctid
    FROM idempotency_keys
    WHERE created_at < now() - interval '48 hours'
    LIMIT $1::integer))
"""

# $1 rows at most. Windows are a minute long; of a key that is not used one row stays.
DELETE_OLD_WINDOWS: Final = """
DELETE FROM rate_limit_windows
WHERE key_id = ANY (ARRAY(
    SELECT key_id
    FROM rate_limit_windows
    WHERE window_start < now() - interval '1 day'
    LIMIT $1::integer))
"""

log = structlog.get_logger(__name__)


async def keep_house(connection: Connection) -> None:
    """Do all of it. Owns its transactions.

    Raises:
        psycopg.Error: what is left is done in the next run.
    """
    await keep_partitions_ahead(connection)
    await _delete_old(connection, DELETE_OLD_KEYS)
    await _delete_old(connection, DELETE_OLD_WINDOWS)


async def _delete_old(connection: Connection, statement: LiteralString) -> None:
    for _ in range(STATEMENTS_MAX):
        if (await connection.execute(statement, [DELETED_MAX])).rowcount < DELETED_MAX:
            return


async def keep_partitions_ahead(connection: Connection) -> None:
    """Make the partitions that the outbox will need, each with its unique index of versions.

    Rows that reached the default partition stay there; partitions begin beyond them.
    """
    extent = await (await connection.execute(OUTBOX_EXTENT, [PARTITION_IDS])).fetchone()
    assert extent is not None
    written, defaulted = extent
    first = max(written, defaulted) + 1
    for number in range(first, first + PARTITIONS_AHEAD):
        name = f"outbox_{number}"
        found = await (await connection.execute(IS_TABLE, [name])).fetchone()
        if found is not None and not found[0]:
            await _make_partition(connection, name, number)


async def _make_partition(connection: Connection, name: str, number: int) -> None:
    table, index = sql.Identifier(name), sql.Identifier(f"{name}_version")
    first = sql.Literal(number * PARTITION_IDS)
    end = sql.Literal((number + 1) * PARTITION_IDS)
    async with connection.transaction():
        await connection.execute(MAKE_PARTITION.format(table=table))
        await connection.execute(INDEX_PARTITION.format(index=index, table=table))
        await connection.execute(ATTACH_PARTITION.format(table=table, first=first, end=end))
    log.info("outbox_partition_made", table=name)
