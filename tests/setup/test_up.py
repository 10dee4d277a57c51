"""`up` starts the whole house with one command, keeps it running, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.settings import ROOT
from app.stack import read_stack
from app.up import BACKOFF_S, RESTARTS_MAX, Program, UpError, Watched
from tests.conftest import temporary_directory
from tests.promises.stack import Stack, Victim, free_port, running_stack
from tests.setup.test_servers import wait_until

LATER_START_MAX_S = 5.0
RECOVERY_MAX_S = 15.0
VICTIMS: tuple[Victim, ...] = ("postgres", "valkey", "worker", "web")
WORKER_STOPPED = {"process": "worker", "event": "stopped"}


@pytest.fixture
def data_dir() -> Generator[Path]:
    with temporary_directory() as directory:
        yield directory / "data"


def up(**settings: object) -> subprocess.CompletedProcess[str]:
    """Run an `up` that is expected to end by itself."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WAYBILL_")}
    return subprocess.run(
        [sys.executable, "-m", "app", "up"],
        cwd=ROOT,
        env=environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def is_one_line_and_a_failure(ended: subprocess.CompletedProcess[str]) -> bool:
    lines = ended.stderr.strip().splitlines()
    return ended.returncode == 1 and len(lines) == 1 and lines[0].startswith("waybill: ")


def printed(stack: Stack) -> str:
    return (stack.data_dir.parent / f"{stack.data_dir.name}.log").read_text()


def get(stack: Stack, path: str) -> Any:
    answer = httpx.get(
        f"{stack.url}{path}", headers={"Authorization": f"Bearer {stack.api_key}"}, timeout=10
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Which have not ended; one that nobody has waited for has."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def order_ids(stack: Stack) -> set[str]:
    return {order["order_id"] for order in get(stack, "/v1/orders?limit=100")["data"]}


def test_the_three_lines_work_as_printed(data_dir: Path) -> None:
    with running_stack(data_dir) as stack:
        wait_until(lambda: len(order_ids(stack)) == 20)  # the demo's
        lines = [line for line in printed(stack).splitlines() if line.startswith("  curl ")]
        stock, placed, listed = (
            subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
            for line in lines
        )
        level = json.loads(stock)["data"][0]
        assert level["available"] >= 2
        headers, _, body = (
            placed.partition("\n\n") if "\r" not in placed else placed.partition("\r\n\r\n")
        )
        assert headers.startswith("HTTP/1.1 201")
        assert "consistency-token:" in headers.lower()
        assert json.loads(listed)["data"]
        wait_until(lambda: json.loads(body)["order_id"] in order_ids(stack))
        file = data_dir / "demo.env"
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_text() == f"WAYBILL_URL={stack.url}\nWAYBILL_API_KEY={stack.api_key}\n"


def test_ctrl_c_leaves_the_data_and_nothing_else(data_dir: Path) -> None:
    with running_stack(data_dir) as stack:
        wait_until(lambda: len(order_ids(stack)) == 20)
        family = psutil.Process(stack.process.pid).children(recursive=True)
        assert len(family) > 10
        key, orders = stack.api_key, order_ids(stack)
        os.kill(stack.process.pid, signal.SIGINT)
        assert stack.process.wait(20) == 0
        assert alive(family) == []
        assert any(  # it was asked, not killed
            line.startswith("{") and json.loads(line).items() >= WORKER_STOPPED.items()
            for line in printed(stack).splitlines()
        )
        left = {path.name for path in data_dir.iterdir()}
        assert left == {"demo.env", "postgres", "postgres.log", "valkey", "valkey.log"}
        assert not list((data_dir / "postgres").glob("*.pid"))
    began = time.monotonic()
    with running_stack(data_dir) as stack:
        assert time.monotonic() - began < LATER_START_MAX_S
        assert stack.api_key == key
        assert order_ids(stack) == orders  # the demo is loaded once


def test_after_a_sigkill_the_next_up_recovers(data_dir: Path) -> None:
    port = str(free_port())
    with running_stack(data_dir, WAYBILL_PORT=port) as stack:
        wait_until(lambda: len(order_ids(stack)) == 20)
        family = psutil.Process(stack.process.pid).children(recursive=True)
        orders = order_ids(stack)
        stack.process.kill()
        stack.process.wait()
        with running_stack(data_dir, WAYBILL_PORT=port) as again:
            assert order_ids(again) == orders
            assert again.api_key == stack.api_key
            assert alive(family) == []


def test_each_child_that_is_killed_is_started_again(data_dir: Path) -> None:
    with running_stack(data_dir) as stack:
        for victim in VICTIMS:
            kill_and_await_recovery(stack, victim)
        assert printed(stack).count("SIGKILL and is started again") == len(VICTIMS)
        told = read_stack(data_dir)
        assert told is not None
        assert set(told.pids) == set(VICTIMS)
        assert all(psutil.pid_exists(pid) for (pid,) in told.pids.values())


def kill_and_await_recovery(stack: Stack, victim: Victim) -> None:
    before = {process.pid for process in stack.processes(victim)}
    assert stack.kill(victim) > 0
    wait_until(lambda: bool({each.pid for each in stack.processes(victim)} - before))
    wait_until(lambda: serves(stack), RECOVERY_MAX_S)


def serves(stack: Stack) -> bool:
    """Whether it is ready and lists orders."""
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    try:
        answers = [
            httpx.get(f"{stack.url}{path}", headers=headers, timeout=10)
            for path in ("/health/ready", "/v1/orders?limit=1")
        ]
    except httpx.TransportError:
        return False
    return [answer.status_code for answer in answers] == [200, 200]


def test_several_web_and_worker_processes_share_the_work(data_dir: Path) -> None:
    with running_stack(data_dir, WAYBILL_WEBS="2", WAYBILL_WORKERS="2") as stack:
        assert len(stack.processes("worker")) == 2
        assert len(stack.processes("web")) == 3  # granian's own and two that serve
        wait_until(lambda: len(order_ids(stack)) == 20)


def test_servers_that_are_given_are_used(data_dir: Path, postgres_url: str, redis_url: str) -> None:
    given = {"WAYBILL_POSTGRES_URL": postgres_url, "WAYBILL_REDIS_URL": redis_url}
    with running_stack(data_dir, **given) as stack:
        wait_until(lambda: len(order_ids(stack)) == 20)
        assert stack.processes("postgres") == []
        assert stack.processes("valkey") == []


def test_a_server_that_is_not_given_is_brought_along(data_dir: Path, postgres_url: str) -> None:
    with running_stack(data_dir, WAYBILL_POSTGRES_URL=postgres_url) as stack:
        assert stack.processes("postgres") == []
        assert stack.processes("valkey")
        assert get(stack, "/v1/stock")["data"] is not None


def test_a_port_that_is_taken_is_one_line(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = up(WAYBILL_DATA_DIR=data_dir, WAYBILL_PORT=port)
    assert is_one_line_and_a_failure(ended)
    assert f"port {port}: Address already in use" in ended.stderr


def test_a_data_directory_in_use_is_one_line(data_dir: Path) -> None:
    with running_stack(data_dir):
        ended = up(WAYBILL_DATA_DIR=data_dir, WAYBILL_PORT=free_port())
    assert is_one_line_and_a_failure(ended)
    assert f"{data_dir} is in use" in ended.stderr


def test_a_wrong_setting_is_one_line() -> None:
    ended = up(WAYBILL_PROT=8000)
    assert is_one_line_and_a_failure(ended)
    assert "WAYBILL_PROT is not a setting" in ended.stderr


def test_a_database_out_of_reach_is_said_and_a_failure(data_dir: Path) -> None:
    url = "postgresql://waybill@/waybill?host=/nowhere"
    ended = up(WAYBILL_DATA_DIR=data_dir, WAYBILL_POSTGRES_URL=url, WAYBILL_PORT=free_port())
    assert ended.returncode == 1
    assert "PostgreSQL is out of reach" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("waybill: `migrations` failed")


def test_a_child_that_will_not_live_is_given_up_after_growing_pauses() -> None:
    watched = Watched(Program("hopeless", "no_such_module", environ=os.environ))
    said: list[str] = []
    began = clock = time.monotonic()

    def watch() -> None:
        nonlocal clock
        while True:
            watched.look(clock, said.append)
            wait_until(lambda: watched.child.ended() is not None)
            clock += 0.1

    with pytest.raises(UpError, match=r"hopeless ended 6 times within 30 s, .* exit code 1"):
        watch()
    assert len(said) == RESTARTS_MAX
    assert sum(BACKOFF_S) <= clock - began < sum(BACKOFF_S) + 2
