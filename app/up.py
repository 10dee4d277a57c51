"""The supervisor behind `up`: starts the whole house, watches it, and takes it down in order."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import psutil

from app.children import POLL_S, Child, adopt_orphans, end, kill_session, spawn
from app.servers import Postgres, Server, Valkey
from app.settings import ROOT, OperatorError, Settings, client_url, variable_of
from app.stack import Stack, forget_stack, read_demo_key, write_stack

WATCH_S = 0.1
"""How often the children are looked at."""

RESTARTS_MAX = 5
RESTART_WINDOW_S = 30.0
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Before the first, second, ... restart within the window. A sixth end within it is final."""

STEADY_S = 5.0
"""Whoever ran that long does not fail at its start, and is started again at once."""

READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 5.0

CURRENT_PATIENCE_S = 10.0
"""An hour's backlog takes longer, and the house serves meanwhile."""

# How long a port may stay taken: an earlier `up` that was killed leaves its web process that long.
PORT_PATIENCE_S = 3.0

# SIGTERM, then this long for requests or a projection batch under way, then SIGKILL.
PROGRAM_PATIENCE_S = 15.0
STRAGGLER_PATIENCE_S = 5.0

# We ask our own web process: no proxy of the environment has a part in it.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class UpError(OperatorError):
    """The house cannot be started, or cannot be kept."""


class StopRequested(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


class Program(Child):
    """A process of our own: `python -m ...`."""

    def __init__(self, name: str, *arguments: str, environ: Mapping[str, str]) -> None:
        super().__init__()
        self.name = self.title = name
        self._command: Final = (sys.executable, "-m", *arguments)
        self._environ: Final = environ

    def start(self) -> None:
        if self._process is not None:
            kill_session(self._process)
        self._process = spawn(self._command, env=self._environ, cwd=ROOT)

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, (signal.SIGTERM, PROGRAM_PATIENCE_S))
            kill_session(self._process)


class Watched:
    """A child and the times it ended by itself."""

    def __init__(self, child: Child) -> None:
        self.child: Final = child
        self._ends: Final[list[float]] = []
        self._started = 0.0
        self._start_at: float | None = time.monotonic()

    def look(self, now: float, say: Callable[[str], None]) -> bool:
        """Start it, and start it again if it has ended, after a pause that grows with each time.

        Returns whether it was started now.

        Raises:
            UpError: it ended more than `RESTARTS_MAX` times within `RESTART_WINDOW_S`.
        """
        if self._start_at is not None:
            if now < self._start_at:
                return False
            self._start_at, self._started = None, now
            self.child.start()
            return True
        how = self.child.ended()
        if how is None:
            self.child.tend()
            return False
        self._ends[:] = [end for end in self._ends if end > now - RESTART_WINDOW_S]
        if len(self._ends) == RESTARTS_MAX:
            raise UpError(
                f"{self.child.title} ended {RESTARTS_MAX + 1} times within "
                f"{RESTART_WINDOW_S:.0f} s, the last time with {how}"
            )
        steady = now - self._started > STEADY_S
        self._start_at = now if steady else now + BACKOFF_S[len(self._ends)]
        self._ends.append(now)
        say(f"{self.child.title} ended with {how} and is started again")
        return False


class Supervisor:
    """Everything `up` runs. Its children are listed in the order they are started."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings: Final = settings
        self._environ: Final = dict(environ)
        self._watched: Final[list[Watched]] = []
        self._began: Final = time.monotonic()
        self._stop_requested = False

    def run(self) -> None:
        """Run until asked to stop.

        Raises:
            UpError, ServerError: the house cannot be started, or cannot be kept.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._request_stop)
        adopt_orphans()
        with _owned(self._settings.data_dir):
            try:
                self._start()
                self._watch()
            except StopRequested:
                self._say("stopping")
            except PermissionError as error:
                raise UpError(f"{error.filename} belongs to another user") from error
            finally:
                self._stop()

    def _watch(self) -> NoReturn:
        while True:
            self._pause(WATCH_S)
            if self._look():
                self._reap()
                self._tell()

    def _start(self) -> None:
        forget_stack(self._settings.data_dir)  # of one that was killed
        _check_port(self._settings, self._pause)
        self._start_servers()
        self._finish("migrations")
        self._start_programs()
        self._say("web and worker processes start; demo data is looked after")
        welcome = self._finish("app", "demo", capture=True)
        self._wait_ready()
        self._wait_current()
        self._tell()
        print(f"\n{welcome}\nCtrl-C stops everything.", flush=True)

    def _start_programs(self) -> None:
        port = self._settings.worker_metrics_port
        for number in range(self._settings.workers):
            environ = self._environ
            if port is not None:  # the first gets the port itself, the second the next one
                environ = environ | {variable_of("worker_metrics_port"): str(port + number)}
            self._run(Program("worker", "workers", environ=environ))
        self._run(Program("web", "app", "web", environ=self._environ))

    def _start_servers(self) -> None:
        """Start what has no address yet, side by side, and give the addresses to all children."""
        data_dir = self._settings.data_dir
        servers: dict[str, Server] = {}
        if self._settings.postgres_url is None:
            servers[variable_of("postgres_url")] = Postgres(data_dir)
        if self._settings.redis_url is None:
            servers[variable_of("redis_url")] = Valkey(data_dir)
        names = " and ".join(server.title for server in servers.values())
        self._say(f"{names} start in {data_dir}" if servers else "using the servers given")
        for variable, server in servers.items():
            self._environ[variable] = server.url
            self._run(server)
        for server in servers.values():
            server.wait_ready(self._pause)

    def _run(self, child: Child) -> None:
        watched = Watched(child)
        self._watched.append(watched)
        watched.look(time.monotonic(), self._say)

    def _finish(self, *arguments: str, capture: bool = False) -> str:
        """Run one of our programs to its end and return what it printed, if captured."""
        output = subprocess.PIPE if capture else None
        process = spawn(
            (sys.executable, "-m", *arguments), env=self._environ, cwd=ROOT, output=output
        )
        try:
            while process.poll() is None:
                self._pause(POLL_S)
                self._look()
            if process.returncode != 0:
                raise UpError(f"`{' '.join(arguments)}` failed; the lines above say why")
            return process.stdout.read().decode() if process.stdout else ""
        finally:
            end(process, (signal.SIGTERM, PROGRAM_PATIENCE_S))
            if process.stdout:
                process.stdout.close()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (why := _not_ready(client_url(self._settings))) is not None:
            if time.monotonic() > deadline:
                raise UpError(f"not ready after {READY_TIMEOUT_S:.0f} s: {why}")
            self._pause(2 * POLL_S)
            self._look()

    def _wait_current(self) -> None:
        """Wait until the read models show what has been written, for a while."""
        deadline = time.monotonic() + CURRENT_PATIENCE_S
        key = read_demo_key(self._settings.data_dir) or ""
        while not _is_current(client_url(self._settings), key):
            if time.monotonic() > deadline:
                self._say("ready; the read models still catch up, see ./waybill projections")
                return
            self._pause(2 * POLL_S)
            self._look()
        self._say("ready")

    def _look(self) -> bool:
        """Look after every child; tell whether one was started, which ends the round."""
        now = time.monotonic()
        return any(watched.look(now, self._say) for watched in self._watched)

    def _tell(self) -> None:
        pids: dict[str, list[int]] = {}
        for watched in self._watched:
            pids.setdefault(watched.child.name, []).append(watched.child.process.pid)
        postgres_url = self._environ[variable_of("postgres_url")]
        redis_url = self._environ[variable_of("redis_url")]
        write_stack(self._settings.data_dir, Stack(postgres_url, redis_url, pids))

    def _stop(self) -> None:
        forget_stack(self._settings.data_dir)
        for watched in reversed(self._watched):
            with contextlib.suppress(OperatorError):  # what it could not end, it may not keep alive
                watched.child.stop()
        left = psutil.Process().children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STRAGGLER_PATIENCE_S)

    def _reap(self) -> None:
        """Take note of the end of what we adopted from a child that was killed."""
        ours = {watched.child.process.pid for watched in self._watched}
        for process in psutil.Process().children():
            if process.pid not in ours:
                with contextlib.suppress(psutil.Error):
                    if process.status() == psutil.STATUS_ZOMBIE:
                        process.wait(0)

    def _pause(self, seconds: float) -> None:
        if not self._stop_requested:
            time.sleep(seconds)
        if self._stop_requested:
            raise StopRequested

    def _request_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_requested = True

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


@contextlib.contextmanager
def _owned(data_dir: Path) -> Generator[None]:
    """Hold the data directory for this process alone; the kernel lets go when it dies."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir, os.O_RDONLY)
    except OSError as error:
        raise UpError(f"the data directory {data_dir} cannot be used: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        if not os.access(data_dir, os.W_OK | os.X_OK):
            raise UpError(f"the data directory {data_dir} is not writable for this user")
        try:
            # The lock is on the directory itself, so there is no file to leave behind.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(
                f"the data directory {data_dir} is in use by another `up`; "
                "stop that one, or set WAYBILL_DATA_DIR and WAYBILL_PORT"
            ) from None
        yield


def _check_port(settings: Settings, pause: Callable[[float], None]) -> None:
    """Refuse a port that somebody listens on, before anything is started."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UpError(f"WAYBILL_HOST={settings.host} is no address: {error.strerror}") from error
    family, kind, protocol, _, where = found[0]
    deadline = time.monotonic() + PORT_PATIENCE_S
    while True:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UpError(
                    f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
                    "set WAYBILL_PORT to another one"
                ) from error
        pause(WATCH_S)


def _not_ready(url: str) -> str | None:
    """Ask the health report; None when everything is well, else what is not."""
    try:
        with _opener.open(f"{url}/health/ready", timeout=ANSWER_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.code} {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return f"the web process does not answer ({error})"


def _is_current(url: str, key: str) -> bool:
    request = urllib.request.Request(f"{url}/v1/projections")  # noqa: S310  (our own address)
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with _opener.open(request, timeout=ANSWER_TIMEOUT_S) as answer:
            projections = json.load(answer)["data"]
    except OSError:
        return False
    return all(projection["lag_events"] == 0 for projection in projections)
