"""A Waybill to put load on: one of our own, started by `./waybill up`, or a given one.

Our own always has its own PostgreSQL and Valkey, whatever servers the caller's environment names: a
hundred thousand made-up orders do not belong in anybody's database.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

from msgspec import Struct

from bench.cost import read_stack

ROOT: Final = Path(__file__).resolve().parent.parent
START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 40.0
POLL_S: Final = 0.1
VERB_TIMEOUT_S: Final = 300.0
NICENESS: Final = (
    5  # of all that is under load alike, so that the generator is not the one to starve
)
STACK_FILE: Final = "stack.json"
DEMO_FILE: Final = "demo.env"
CLIENT_VARIABLES: Final = ("WAYBILL_URL", "WAYBILL_API_KEY")


PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None)  # loaded here, since little is safe between fork and exec


class StackError(Exception):
    """There is no Waybill to put load on: one line for the person at the terminal."""


class Stack(Struct, frozen=True):
    """A running Waybill."""

    url: str
    api_key: str
    file: Path | None  # its stack.json, if it runs on this machine and says so
    data_dir: Path | None  # set if it is our own

    @property
    def postgres_url(self) -> str:
        """The address of its database.

        Raises:
            StackError: it did not say.
        """
        url = read_stack(self.file).postgres_url
        if url is None:
            raise StackError(f"{STACK_FILE} does not name the database")
        return url


def given_stack(url: str, environ: Mapping[str, str], file: Path | None) -> Stack:
    """Use the Waybill at `url`.

    Raises:
        StackError: there is no key for it.
    """
    api_key = environ.get("WAYBILL_API_KEY")
    if not api_key:
        raise StackError(f"WAYBILL_API_KEY is not set; it must hold a key for {url}")
    return Stack(url.rstrip("/"), api_key, file, None)


@contextmanager
def own_stack(parent: Path, environ: Mapping[str, str]) -> Generator[Stack]:
    """Start a Waybill with a data directory in `parent`; ends and removes it afterwards.

    Raises:
        StackError: it did not start.
    """
    parent.mkdir(parents=True, exist_ok=True)
    data_dir = Path(mkdtemp(prefix="stack-", dir=parent))
    try:
        with (data_dir / "up.log").open("wb") as log:
            up = subprocess.Popen(
                ["nice", "-n", str(NICENESS), str(ROOT / "waybill"), "up"],
                env=own_environment(environ, data_dir, free_port()),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C ends us, and we end it in order
                preexec_fn=end_with_us,  # noqa: PLW1509  (no threads here)
            )
        try:
            yield _await_ready(up, data_dir)
        finally:
            _stop(up)
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


def run_waybill(stack: Stack, *arguments: str, postgres_url: str | None = None) -> None:
    """Run another verb of `./waybill` on the servers of `stack`, or on another database.

    Raises:
        StackError: it failed, or the stack is not our own.
    """
    if stack.data_dir is None:
        raise StackError("only a stack of our own is changed")
    known = read_stack(stack.file)
    environ = own_environment(os.environ, stack.data_dir, port=0)
    del environ["WAYBILL_PORT"]
    environ["WAYBILL_POSTGRES_URL"] = postgres_url or stack.postgres_url
    if known.redis_url is not None:
        environ["WAYBILL_REDIS_URL"] = known.redis_url
    done = subprocess.run(
        [str(ROOT / "waybill"), *arguments],
        env=environ,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=VERB_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        said = done.stdout.strip().splitlines()
        raise StackError(f"`waybill {' '.join(arguments)}` failed: {said[-1:]}")


def own_environment(environ: Mapping[str, str], data_dir: Path, port: int) -> dict[str, str]:
    """The caller's environment without its Waybill settings, which are for another one."""
    kept = {name: value for name, value in environ.items() if not name.startswith("WAYBILL_")}
    return kept | {"WAYBILL_DATA_DIR": str(data_dir), "WAYBILL_PORT": str(port)}


def end_with_us() -> None:
    """Have the kernel end this child when we are killed (prctl(2)); between fork and exec."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(up: "subprocess.Popen[bytes]", data_dir: Path) -> Stack:
    """Wait for `up` to say that it is ready: it writes demo.env, then its last word, stack.json."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (data_dir / DEMO_FILE).exists() or not (data_dir / STACK_FILE).exists():
        if up.poll() is not None or time.monotonic() > deadline:
            said = (data_dir / "up.log").read_text(errors="replace").splitlines()
            raise StackError("`./waybill up` did not start: " + (said[-1] if said else "no word"))
        time.sleep(POLL_S)
    lines = (data_dir / DEMO_FILE).read_text().splitlines()
    values = dict(line.removeprefix("export ").split("=", 1) for line in lines if "=" in line)
    url, api_key = (values[name].strip("'\"") for name in CLIENT_VARIABLES)
    return Stack(url, api_key, data_dir / STACK_FILE, data_dir)


def _stop(up: "subprocess.Popen[bytes]") -> None:
    """Ask `up` to stop, as Ctrl-C does; kill it if it does not, which its children notice."""
    up.send_signal(signal.SIGINT)
    try:
        up.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        up.kill()
        up.wait()
