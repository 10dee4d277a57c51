"""The migration runner applies each file once, in order, whole or not at all."""

import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

from app.settings import ROOT
from migrations import __main__ as runner
from migrations.__main__ import MigrationError, migrate, read_migrations

FIRST = "CREATE TABLE toy (id int PRIMARY KEY); INSERT INTO toy VALUES (1);"
SECOND = "ALTER TABLE toy ADD COLUMN name text;"


@pytest.fixture
def connection(postgres_url: str) -> Generator[psycopg.Connection[TupleRow]]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP TABLE schema_migrations")  # the toys have a journal of their own
        yield connection


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "0001_first.sql").write_text(FIRST)
    (tmp_path / "0002_second.sql").write_text(SECOND)
    return tmp_path


def columns(connection: psycopg.Connection[TupleRow]) -> int:
    row = connection.execute(
        "SELECT count(*) FROM information_schema.columns WHERE table_name = 'toy'"
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.usefixtures("connection")
def test_each_file_is_applied_once(postgres_url: str, files: Path) -> None:
    assert migrate(postgres_url, read_migrations(files)) == 2
    assert migrate(postgres_url, read_migrations(files)) == 0


def test_two_runners_at_once_apply_each_file_once(
    connection: psycopg.Connection[TupleRow], postgres_url: str, files: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(migrate, postgres_url, read_migrations(files)) for _ in range(4)]
    assert sum(run.result() for run in runs) == 2
    assert columns(connection) == 2


def test_a_file_that_fails_leaves_nothing(
    connection: psycopg.Connection[TupleRow], postgres_url: str, files: Path
) -> None:
    (files / "0002_second.sql").write_text(SECOND + "INSERT INTO toy (nobody) VALUES (1);")
    with pytest.raises(MigrationError, match=r"0002_second\.sql failed: .*nobody"):
        migrate(postgres_url, read_migrations(files))
    assert columns(connection) == 1
    (files / "0002_second.sql").write_text(SECOND)
    assert migrate(postgres_url, read_migrations(files)) == 1


@pytest.mark.usefixtures("connection")
def test_a_file_that_changed_after_it_was_applied_is_an_error(
    postgres_url: str, files: Path
) -> None:
    migrate(postgres_url, read_migrations(files))
    (files / "0001_first.sql").write_text(FIRST + "-- a second thought")
    with pytest.raises(MigrationError, match=r"0001_first\.sql was changed"):
        migrate(postgres_url, read_migrations(files))


@pytest.mark.usefixtures("connection")
def test_a_file_cannot_be_slipped_in_between(postgres_url: str, files: Path) -> None:
    (files / "0001_first.sql").rename(files / "0003_late.sql")
    late = read_migrations(files)[1:]
    migrate(postgres_url, late)
    with pytest.raises(MigrationError, match="comes before"):
        migrate(postgres_url, read_migrations(files))


@pytest.mark.usefixtures("connection")
def test_a_newer_schema_is_left_alone(postgres_url: str, files: Path) -> None:
    migrate(postgres_url, read_migrations(files))
    assert migrate(postgres_url, read_migrations(files)[:1]) == 0


@pytest.mark.parametrize("name", ["3_short.sql", "0003-dash.sql", "0002_twice.sql"])
def test_names_have_one_form_and_one_number_each(files: Path, name: str) -> None:
    (files / name).write_text("")
    with pytest.raises(MigrationError, match=r"named like|the same number"):
        read_migrations(files)


def test_a_lock_that_others_hold_is_waited_for_in_short_tries(
    connection: psycopg.Connection[TupleRow],
    postgres_url: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "LOCK_TIMEOUT", "100ms")
    migrate(postgres_url, read_migrations(files)[:1])
    with ThreadPoolExecutor(1) as pool, psycopg.connect(postgres_url) as reader:
        reader.execute("SELECT * FROM toy")
        run = pool.submit(migrate, postgres_url, read_migrations(files))
        while "try 2" not in capsys.readouterr().out:
            # Whoever comes while the migration waits is served: it gives way each time.
            connection.execute("SELECT * FROM toy")
        reader.rollback()
        assert run.result() == 1


def test_no_moment_without_locks_ends_in_one_line(
    connection: psycopg.Connection[TupleRow],
    postgres_url: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "LOCK_TIMEOUT", "10ms")
    monkeypatch.setattr(runner, "PAUSE_S", 0.001)
    migrate(postgres_url, read_migrations(files)[:1])
    with connection.transaction():
        connection.execute("SELECT * FROM toy")
        with pytest.raises(MigrationError, match="no moment without locks in 30 tries"):
            migrate(postgres_url, read_migrations(files))


def test_a_server_out_of_reach_is_one_line_and_a_failure() -> None:
    command = [sys.executable, "-m", "migrations", "postgresql://waybill@/waybill?host=/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("migrations: PostgreSQL is out of reach")
    assert done.stderr.count("\n") == 1
