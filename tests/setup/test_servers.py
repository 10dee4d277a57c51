"""The embedded servers start anywhere, keep their data, and leave nothing behind."""

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import psycopg
import pytest

from app.children import RunAs, end, spawn
from app.servers import Postgres, Server, ServerError, Valkey, embedded_servers
from app.settings import ROOT
from tests.conftest import temporary_directory

S = TypeVar("S", bound=Server)

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def data_dir() -> Generator[Path]:
    with temporary_directory() as directory:
        yield directory / "data"


@contextmanager
def running(server: S) -> Generator[S]:
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


def run_sql(url: str, statement: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
    return str(row[0]) if row else ""


def at_work_in(directory: Path) -> list[int]:
    """Which processes have their working directory in there."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.cwd()).is_relative_to(directory)
        except psutil.Error:
            continue
        if inside and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def test_both_serve_and_leave_their_data_and_nothing_else(data_dir: Path) -> None:
    with embedded_servers(data_dir) as (postgres_url, _):
        assert run_sql(postgres_url, "SHOW server_version").startswith("18")
        assert run_sql(postgres_url, "SHOW fsync") == "on"
        assert run_sql(postgres_url, "SHOW synchronous_commit") == "on"
        assert run_sql(postgres_url, "SHOW track_commit_timestamp") == "on"
        assert run_sql(postgres_url, "SHOW shared_buffers") == "256MB"
    assert at_work_in(data_dir) == []
    left = {path.name for path in data_dir.iterdir()}
    assert left == {"postgres", "postgres.log", "valkey", "valkey.log"}
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_data_survives_a_restart_at_the_same_address(data_dir: Path) -> None:
    with running(Postgres(data_dir)) as server:
        run_sql(server.url, "CREATE TABLE toy AS SELECT 42 AS id")
        first = server.url
    with running(Postgres(data_dir)) as server:
        assert server.url == first
        assert run_sql(server.url, "SELECT id FROM toy") == "42"


def test_a_killed_postgres_starts_again_while_its_sessions_still_work(data_dir: Path) -> None:
    with running(Postgres(data_dir)) as server:
        run_sql(server.url, "CREATE TABLE toy AS SELECT 42 AS id")
        # A session in mid-query outlives the postmaster and holds its shared memory.
        sleeper = subprocess.Popen(
            [sys.executable, "-c", SLEEP_IN_POSTGRES, server.url], stderr=subprocess.DEVNULL
        )
        wait_until(lambda: len(sessions(data_dir)) == 1)
        server.process.kill()
        server.process.wait()
        assert sessions(data_dir)
        server.start()
        server.wait_ready()
        assert run_sql(server.url, "SELECT id FROM toy") == "42"
        assert sleeper.wait(10) != 0


SLEEP_IN_POSTGRES = """
import psycopg, sys
psycopg.connect(sys.argv[1]).execute("DO $$ BEGIN LOOP END LOOP; END $$")
"""


def sessions(data_dir: Path) -> list[int]:
    """Which processes serve a client's session in the database."""
    workers = [psutil.Process(pid).cmdline() for pid in at_work_in(data_dir / "postgres")]
    return [at for at, line in enumerate(workers) if "[local] DO" in " ".join(line)]


def wait_until(true: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_servers_die_with_whoever_started_them_and_start_again(data_dir: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", START_BOTH, str(data_dir)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    with starter.stdout:
        assert starter.stdout.readline() == b"ready\n"
    starter.kill()
    starter.wait()
    with embedded_servers(data_dir) as (postgres_url, _):
        assert run_sql(postgres_url, "SELECT 1") == "1"
    assert at_work_in(data_dir) == []


START_BOTH = """
import sys, time
from pathlib import Path
from app.servers import embedded_servers
with embedded_servers(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_postmaster_without_a_supervisor_is_stopped_and_replaced(data_dir: Path) -> None:
    with running(Postgres(data_dir)) as forgotten:
        run_sql(forgotten.url, "CREATE TABLE toy AS SELECT 42 AS id")
        with running(Postgres(data_dir)) as server:
            assert forgotten.process.wait(5) == 0  # it was asked, not killed
            assert run_sql(server.url, "SELECT id FROM toy") == "42"


def test_a_process_number_that_went_to_another_program_is_no_hindrance(data_dir: Path) -> None:
    with running(Postgres(data_dir)) as server:
        server.process.kill()
        server.process.wait()
        wait_until(lambda: at_work_in(data_dir) == [])
    pidfile = data_dir / "postgres" / "postmaster.pid"
    lines = pidfile.read_text().splitlines()
    pidfile.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")
    with running(Postgres(data_dir)) as server:
        assert run_sql(server.url, "SELECT 1") == "1"
    assert psutil.pid_exists(os.getppid())


def test_a_set_up_that_was_killed_half_way_is_made_anew(data_dir: Path) -> None:
    half = data_dir / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with running(Postgres(data_dir)) as server:
        assert run_sql(server.url, "SELECT 1") == "1"
    assert not half.exists()


def test_data_of_another_version_is_left_alone(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(ServerError, match="made by PostgreSQL 17, this is 18"):
        Postgres(data_dir).start()


def test_a_server_that_cannot_start_says_why_in_one_line(data_dir: Path) -> None:
    with running(Postgres(data_dir)):
        pass
    (data_dir / "postgres" / "global" / "pg_control").unlink()
    server = Postgres(data_dir)
    server.start()
    with pytest.raises(ServerError, match="PostgreSQL ended while starting") as caught:
        server.wait_ready()
    server.stop()
    assert "\n" not in str(caught.value)
    assert "pg_control" in str(caught.value)


@pytest.mark.parametrize("name", ["deep" * 25, "a shop, %41?#'\"ä"])
@pytest.mark.parametrize("kind", [Postgres, Valkey])
def test_a_path_that_will_not_do_for_a_socket_is_no_hindrance(
    data_dir: Path, kind: type[Postgres] | type[Valkey], name: str
) -> None:
    deep = data_dir / name
    with running(kind(deep)) as server:
        elsewhere = server.socket.parent
        assert not elsewhere.is_relative_to(deep)
        assert elsewhere.stat().st_mode & 0o077 == 0
    assert not elsewhere.exists()
    assert sorted(path.name for path in deep.iterdir()) == [server.name, f"{server.name}.log"]


def test_the_socket_directory_of_a_killed_process_is_removed_by_the_next(data_dir: Path) -> None:
    deep = data_dir / ("deep" * 25)
    left = Valkey(deep).socket.parent
    with running(Valkey(deep)) as server:
        assert server.socket.parent != left
        assert not left.exists()


def test_an_answer_by_a_stranger_does_not_count(data_dir: Path) -> None:
    with running(Valkey(data_dir)) as stranger:
        asleep = Asleep(data_dir)
        asleep.start()
        try:
            assert stranger.answers()
            assert not asleep.answers()
        finally:
            end(asleep.process)


class Asleep(Valkey):
    """A Valkey that never comes up, where another one listens."""

    def start(self) -> None:
        self._process = spawn(["sleep", "60"])


@pytest.mark.parametrize("kind", [Postgres, Valkey])
def test_a_log_is_bounded(data_dir: Path, kind: type[Postgres] | type[Valkey]) -> None:
    with running(kind(data_dir)) as server:
        log = data_dir / f"{server.name}.log"
        with log.open("ab") as file:
            file.write(b"x" * (9 * 2**20))
        server.tend()
        assert log.stat().st_size < 2**20
        assert log.with_suffix(".log.1").stat().st_size > 9 * 2**20
        size = log.stat().st_size
    assert log.stat().st_size >= size  # it went on at the new end, without a hole
    assert b"\0" not in log.read_bytes()


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")
def test_postgres_runs_as_nobody_where_nobody_can_reach_it(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    data_dir.parent.chmod(0o711)
    with running(Postgres(data_dir)) as server:
        user = psutil.Process(server.process.pid).username()
    assert user in ({"postgres", "nobody"} if reachable_by_nobody() else {"root"})


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")
def test_postgres_runs_in_a_user_namespace_where_only_root_can_enter(data_dir: Path) -> None:
    data_dir.parent.chmod(0o700)
    data_dir.mkdir(mode=0o700)
    with running(Postgres(data_dir)) as server:
        namespace = Path(f"/proc/{server.process.pid}/ns/user").readlink()
        assert namespace != Path("/proc/self/ns/user").readlink()
        assert (data_dir / "postgres").stat().st_uid == 0


def reachable_by_nobody() -> bool:
    nobody = RunAs(user=pwd.getpwnam("nobody"))
    return spawn(["test", "-x", sys.prefix], run_as=nobody).wait() == 0


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", SPAWN_AND_WAIT, str(note)], cwd=ROOT)
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
    child = psutil.Process(int(note.read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


SPAWN_AND_WAIT = """
import sys, time
from pathlib import Path
from app.children import spawn
child = spawn(["sleep", "60"])
Path(sys.argv[1]).write_text(f"{child.pid}\\n")
time.sleep(60)
"""
