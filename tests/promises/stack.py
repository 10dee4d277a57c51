"""A whole Waybill as `up` runs it, in a directory of its own, with its processes to be killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
from msgspec import Struct

from app.settings import ROOT

START_S = 60.0
STOP_S = 30.0

Victim = Literal["postgres", "web", "worker", "valkey"]


class Stack(Struct):
    """A running `up`."""

    url: str
    api_key: str
    data_dir: Path
    process: subprocess.Popen[bytes]

    @property
    def postgres_url(self) -> str:
        """Read from the environment of the worker, which was given it."""
        return self._environ("WAYBILL_POSTGRES_URL")

    @property
    def redis_url(self) -> str:
        return self._environ("WAYBILL_REDIS_URL")

    def _environ(self, name: str) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for worker in self.processes("worker"):
                with suppress(psutil.Error):
                    return worker.environ()[name]
            time.sleep(0.1)
        raise TimeoutError(name)

    def processes(self, victim: Victim) -> list[psutil.Process]:
        """The processes of one kind, of this stack alone: descendants of its `up`."""
        found: list[psutil.Process] = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if kind_of(each.cmdline()) == victim:
                    found.append(each)
        return found

    def kill(self, victim: Victim) -> int:
        """SIGKILL every process of a kind; returns how many there were."""
        killed = 0
        for each in self.processes(victim):
            with suppress(psutil.NoSuchProcess):
                each.kill()
                killed += 1
        return killed


def kind_of(cmdline: list[str]) -> Victim | None:
    line = " ".join(cmdline)
    if "valkey-server" in line:
        return "valkey"
    if "-m workers" in line:
        return "worker"
    if "-m app web" in line or "multiprocessing" in line:
        return "web"
    if line.startswith("postgres:") or "/postgres " in line:
        return "postgres"
    return None


@contextmanager
def running_stack(data_dir: Path, **settings: str) -> Generator[Stack]:
    """Start `up`, wait for its address and key, and stop it by its handle."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WAYBILL_")}
    environ |= {"WAYBILL_DATA_DIR": str(data_dir), "WAYBILL_PORT": str(free_port()), **settings}
    with (data_dir.parent / f"{data_dir.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "up"], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
        try:
            demo = wait_for_demo(data_dir / "demo.env", process, Path(log.name))
            yield Stack(demo["WAYBILL_URL"], demo["WAYBILL_API_KEY"], data_dir, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def wait_for_demo(path: Path, process: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if path.exists() and "Ctrl-C stops everything" in log.read_text():
            lines = (line.partition("=") for line in path.read_text().splitlines())
            return {name: value for name, _, value in lines}
        time.sleep(0.05)
    raise RuntimeError(f"`up` did not start:\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
