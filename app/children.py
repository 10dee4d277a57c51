"""Child processes: started so that they do not outlive this one, stopped within a stated time."""

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from msgspec import Struct

# Linux, include/uapi/linux/prctl.h.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ENTER_NAMESPACE = Path(__file__).with_name("namespace.py")

POLL_S = 0.02

# Loaded here, since little is safe between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)

Command = Sequence[str | Path]

Pause = Callable[[float], None]
"""Sleeps that many seconds; a supervisor's raises when it was asked to stop."""


class RunAs(Struct, frozen=True):
    """Who a child runs as: this user (the default), another one, or a mapped one.

    `mapped` gives a root process the name of another user in a user namespace of its own. To the
    file system it stays root without root's privileges, so a directory only root may enter is open
    to it, while a program that refuses to run as root sees another user.
    """

    user: pwd.struct_passwd | None = None
    mapped: pwd.struct_passwd | None = None


class LibraryCallError(OSError):
    """A call to the C library failed."""


class Child(ABC):
    """One child of the supervisor, which starts it again when it ends by itself."""

    name: str
    """Its role, in one word; several children may share it."""
    title: str

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start() comes first"
        return self._process

    def ended(self) -> str | None:
        """Say how it ended, in words for an operator; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @abstractmethod
    def start(self) -> None:
        """Start it, or start it again; what is left of the one before is cleared away first."""

    @abstractmethod
    def stop(self) -> None:
        """Stop it in good order, within a stated time. Without effect when it does not run."""

    def tend(self) -> None:  # noqa: B027  (most need nothing)
        """Do what is to be done now and then while it runs."""


def spawn(
    command: Command,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: IO[bytes] | None = None,
    output: IO[bytes] | int | None = None,
    run_as: RunAs | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that a terminal's Ctrl-C reaches only us.

    On Linux it gets `death_signal` when this process dies, however that happens. Call it from the
    main thread: the kernel watches the thread that forked.

    Raises:
        OSError, subprocess.SubprocessError: the program could not be started as that user.
    """
    user = run_as.user if run_as else None
    mapped = run_as.mapped if run_as else None
    parent = os.getpid()
    if mapped is not None:
        # A namespace can be entered only by a process without threads and with files to spare,
        # which ours need not be, so a small program enters it and becomes the command.
        numbers = (mapped.pw_uid, mapped.pw_gid, int(death_signal), parent)
        command = [sys.executable, "-I", ENTER_NAMESPACE, *map(str, numbers), *command]

    def between_fork_and_exec() -> None:
        # The kernel forgets the death signal when the user changes, so the user comes first.
        die_with(parent, death_signal)

    return subprocess.Popen(
        [os.fspath(part) for part in command],
        env=env,
        cwd=cwd,
        stdin=stdin or subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is subprocess.PIPE else output,
        start_new_session=True,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
        preexec_fn=between_fork_and_exec,  # noqa: PLW1509  (no threads here)
    )


def die_with(parent: int, death_signal: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux)."""
    if sys.platform == "linux":
        _check(_libc.prctl(PR_SET_PDEATHSIG, death_signal))
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent dies, so that none is lost (Linux)."""
    if sys.platform == "linux":
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1))


def end(process: subprocess.Popen[bytes], *signals: tuple[signal.Signals, float]) -> None:
    """Send each signal and wait its seconds, until the process has ended; SIGKILL comes last."""
    for number, patience_s in (*signals, (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            return
        process.send_signal(number)
        deadline = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session that `spawn` made for this process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for zombies
        os.killpg(process.pid, signal.SIGKILL)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise LibraryCallError(number, os.strerror(number))
