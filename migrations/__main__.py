"""The migration runner: `python -m migrations [postgres url]`, else WAYBILL_POSTGRES_URL.

Plain SQL files, NNNN_what.sql beside this one, are applied in order, each once and each in a
transaction of its own, so none may hold a statement that refuses one (CREATE INDEX CONCURRENTLY).
Several runners at once are safe.
"""

import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg import Connection
from psycopg.rows import TupleRow

SERVER_MIN = 150000
"""PostgreSQL 15, as `server_version_num` counts."""

# A migration that waits for a lock makes everybody behind it wait as well, so it waits 2 s, gives
# way, and comes again: 30 tries with pauses of 0.25 to 0.75 s give up after 75 s at most.
LOCK_TIMEOUT = "2s"
TRIES_MAX = 30
PAUSE_S = 0.25

CONNECT_TIMEOUT_S = 5

# Any number will do, if nobody else on the same database takes it.
RUNNER_LOCK = 7_305_417_227_012

FILE_NAME = re.compile(r"\d{4}_[a-z0-9_]+\.sql")

# Two runners that both create it: the second waits for the first one's runner lock before.
CREATE_JOURNAL = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""

HAS_JOURNAL = "SELECT to_regclass('schema_migrations') IS NOT NULL"
READ_JOURNAL = "SELECT name, checksum FROM schema_migrations"
WRITE_JOURNAL = "INSERT INTO schema_migrations (name, checksum) VALUES ($1, $2)"

# Both end with the transaction, so a runner that dies leaves nothing. The time limit bounds the
# wait for the runner lock, too.
SET_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', $1, true)"
TAKE_RUNNER_LOCK = "SELECT pg_advisory_xact_lock($1)"


class MigrationError(Exception):
    """The schema cannot be brought up to date. The text is one line."""


class Migration(NamedTuple):
    """One file. The checksum is that of its bytes."""

    name: str
    text: str
    checksum: str


def read_migrations(directory: Path) -> list[Migration]:
    """Read the files in the order they are applied.

    Raises:
        MigrationError: a name has not the form NNNN_what.sql, or two have one number.
    """
    migrations: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        if not FILE_NAME.fullmatch(path.name):
            raise MigrationError(f"{path.name} is not named like 0001_what_it_does.sql")
        if migrations and migrations[-1].name[:4] == path.name[:4]:
            raise MigrationError(f"{migrations[-1].name} and {path.name} have the same number")
        content = path.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        migrations.append(Migration(path.name, content.decode(), checksum))
    return migrations


def migrate(url: str, migrations: Sequence[Migration]) -> int:
    """Apply what is missing, with a line on standard output for each, and return how many.

    Raises:
        MigrationError: a file was changed after it was applied, comes before an applied one, failed
            (nothing of it stays), or found no moment without locks; or the server is out of reach.
    """
    try:
        with psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="waybill-migrations",
            cursor_factory=psycopg.RawCursor,
        ) as connection:
            if connection.info.server_version < SERVER_MIN:
                version = connection.info.parameter_status("server_version")
                raise MigrationError(f"PostgreSQL 15 or newer is needed, this is {version}")
            missing = _missing(connection, migrations)
            return sum(_apply_patiently(connection, migration) for migration in missing)
    except psycopg.OperationalError as error:
        raise MigrationError(f"PostgreSQL is out of reach: {_line(error)}") from error


def _missing(connection: Connection[TupleRow], migrations: Sequence[Migration]) -> list[Migration]:
    applied = _read_journal(connection)
    missing = [migration for migration in migrations if migration.name not in applied]
    for migration in migrations:
        if applied.get(migration.name, migration.checksum) != migration.checksum:
            raise MigrationError(f"{migration.name} was changed after it had been applied")
    # A name that is applied but not here comes from a newer version, whose schema still fits ours.
    if missing and missing[0].name < max(applied, default=""):
        raise MigrationError(f"{missing[0].name} comes before {max(applied)}, which is applied")
    return missing


def _apply_patiently(connection: Connection[TupleRow], migration: Migration) -> bool:
    for attempt in range(1, TRIES_MAX + 1):
        try:
            return _apply(connection, migration)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            print(f"{migration.name}: a lock is taken, try {attempt} of {TRIES_MAX}", flush=True)
            time.sleep(random.uniform(PAUSE_S, 3 * PAUSE_S))  # noqa: S311  (jitter, no secret)
        except psycopg.Error as error:
            raise MigrationError(f"{migration.name} failed: {_line(error)}") from error
    raise MigrationError(f"{migration.name} found no moment without locks in {TRIES_MAX} tries")


def _apply(connection: Connection[TupleRow], migration: Migration) -> bool:
    """Apply one migration unless another runner just has; tell whether it was applied here."""
    started = time.monotonic()
    with connection.transaction():
        connection.execute(SET_LOCK_TIMEOUT, (LOCK_TIMEOUT,))
        connection.execute(TAKE_RUNNER_LOCK, (RUNNER_LOCK,))
        connection.execute(CREATE_JOURNAL)
        if migration.name in _read_journal(connection):
            return False
        connection.execute(migration.text.encode())
        connection.execute(WRITE_JOURNAL, (migration.name, migration.checksum))
    print(f"{migration.name} applied in {time.monotonic() - started:.2f} s", flush=True)
    return True


def _read_journal(connection: Connection[TupleRow]) -> dict[str, str]:
    if connection.execute(HAS_JOURNAL).fetchone() != (True,):
        return {}
    return dict(connection.execute(READ_JOURNAL).fetchall())


def _line(error: psycopg.Error) -> str:
    return " ".join(str(error).split())


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("WAYBILL_POSTGRES_URL")
    if not url:
        sys.exit("migrations: give the PostgreSQL URL as argument or as WAYBILL_POSTGRES_URL")
    try:
        migrations = read_migrations(Path(__file__).parent)
        count = migrate(url, migrations)
    except MigrationError as error:
        sys.exit(f"migrations: {error}")
    print(f"migrations: {count} applied, {len(migrations) - count} were there", flush=True)


if __name__ == "__main__":
    main()
