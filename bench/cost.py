"""What a request costs: CPU time by role, read from /proc once a second by a process of its own.

CPU per request falls as load rises (an event loop handles more per wake-up), so a figure means
nothing without the rate that was offered. What is unattributed, and what the hypervisor stole, is
the noise.
"""

import argparse
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import msgspec
import psycopg
from msgspec import Struct

from bench.environment import Environment, read_environment

PROC: Final = Path("/proc")
SAMPLE_S: Final = 1.0
PRESSURE_SAMPLES: Final = 10  # the 10 s of the kernel's own avg10
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
CONNECT_TIMEOUT_S: Final = 5

# Rows = processes of the server. Locks nothing.
NAME_BACKENDS: Final = """
SELECT pid, backend_type, application_name FROM pg_stat_activity
"""


class StackFile(Struct, frozen=True):
    """What a running Waybill tells of itself in `stack.json`; other keys are not ours."""

    postgres_url: str | None = None
    redis_url: str | None = None
    pids: Mapping[str, Sequence[int]] = {}  # role: roots of process trees


class Sample(Struct, frozen=True):
    """Totals since boot, at one moment. Differences of two samples are what counts."""

    at: float  # time.monotonic(), the same clock in all processes of the machine
    cpu_s: Mapping[str, float]  # by role
    busy_s: float  # all cores, all processes
    steal_s: float
    pressure_s: float | None  # PSI: time that some task waited for a core
    wall_minus_monotonic_s: float


class Cost(Struct, frozen=True):
    """CPU between two samples, in seconds of one core."""

    elapsed_s: float
    cpu_s: Mapping[str, float]  # by role, with "unattributed"
    steal_s: float


class Meter:
    """Reads the CPU time of process trees; remembers processes that have ended in between.

    Asks PostgreSQL, on a connection of its own, which of its processes serves whom.
    """

    def __init__(self, roots: Mapping[str, Sequence[int]], postgres_url: str | None) -> None:
        self._roots = roots
        self._postgres_url = postgres_url
        self._postgres: psycopg.Connection[Any] | None = None
        self._seen: dict[tuple[int, int], tuple[str, float]] = {}  # (pid, start): role, seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._postgres is not None:
            self._postgres.close()

    def sample(self) -> Sample:
        backends = self._name_backends()
        children = _children(apart=frozenset(chain.from_iterable(self._roots.values())))
        for role, roots in self._roots.items():
            for pid in _tree(roots, children):
                self._read(
                    pid, backends.get(pid, "postgres background") if role == "postgres" else role
                )
        cpu_s: dict[str, float] = defaultdict(float)
        for role, seconds in self._seen.values():
            cpu_s[role] += seconds
        busy_s, steal_s = _machine()
        return Sample(
            at=time.monotonic(),
            cpu_s=dict(cpu_s),
            busy_s=busy_s,
            steal_s=steal_s,
            pressure_s=_pressure_s(),
            wall_minus_monotonic_s=time.time() - time.monotonic(),
        )

    def _read(self, pid: int, role: str) -> None:
        try:
            started = int(_stat_fields(pid)[19])
            seconds = _cpu_s(pid)
        except OSError:
            return  # ended since it was listed; what was read last stands
        known = self._seen.get((pid, started), (role, 0.0))
        # A backend names itself after it has started; threads that end take their time with them.
        self._seen[pid, started] = (role, max(seconds, known[1]))

    def _name_backends(self) -> Mapping[int, str]:
        """Name the server's processes by application, the background ones alike."""
        if self._postgres_url is None:
            return {}
        try:
            if self._postgres is None:
                self._postgres = psycopg.connect(
                    self._postgres_url,
                    application_name="waybill-bench",
                    autocommit=True,
                    connect_timeout=CONNECT_TIMEOUT_S,
                )
            rows = self._postgres.execute(NAME_BACKENDS).fetchall()
        except psycopg.Error:
            if self._postgres is not None:
                self._postgres.close()
            self._postgres = None  # restarting, perhaps; asked again at the next sample
            return {}
        return {
            pid: f"postgres {application}" if kind == "client backend" else "postgres background"
            for pid, kind, application in rows
        }


def cost_between(first: Sample, last: Sample) -> Cost:
    """Return the CPU used from one sample to another."""
    cpu_s = {
        role: max(0.0, total - first.cpu_s.get(role, 0.0)) for role, total in last.cpu_s.items()
    }
    busy_s = last.busy_s - first.busy_s
    cpu_s["unattributed"] = max(0.0, busy_s - sum(cpu_s.values()))
    return Cost(last.at - first.at, cpu_s, max(0.0, last.steal_s - first.steal_s))


def within(samples: Sequence[Sample], start: float, end: float) -> Sequence[Sample]:
    """Return the samples from the last one at `start` or before to the first at `end` or after."""
    first = max((n for n, sample in enumerate(samples) if sample.at <= start), default=0)
    last = min(
        (n for n, sample in enumerate(samples) if sample.at >= end), default=len(samples) - 1
    )
    return samples[first : last + 1]


def worst_pressure(samples: Sequence[Sample]) -> float | None:
    """Return the worst 10 s of CPU pressure ("some"), in percent; None without PSI or samples."""
    worst: float | None = None
    for n, last in enumerate(samples):
        first = samples[max(0, n - PRESSURE_SAMPLES)]
        if first.pressure_s is None or last.pressure_s is None or last.at <= first.at:
            continue
        if n >= PRESSURE_SAMPLES or n == len(samples) - 1:
            share = 100 * (last.pressure_s - first.pressure_s) / (last.at - first.at)
            worst = share if worst is None else max(worst, share)
    return worst


def clock_step_ms(samples: Sequence[Sample]) -> float | None:
    """Return the largest step of the wall clock against the monotonic one between two samples."""
    offsets = [sample.wall_minus_monotonic_s for sample in samples]
    return max((abs(b - a) * 1000 for a, b in pairwise(offsets)), default=None)


def _children(apart: frozenset[int]) -> Mapping[int, Sequence[int]]:
    """Every process by its parent, but for those `apart`: they are roots of their own."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (pid := int(entry.name)) not in apart:
            try:
                children[int(_stat_fields(pid)[1])].append(pid)
            except OSError:
                continue  # ended since it was listed
    return children


def _tree(roots: Iterable[int], children: Mapping[int, Sequence[int]]) -> Iterable[int]:
    pending = list(roots)
    while pending:
        pid = pending.pop()
        yield pid
        pending += children.get(pid, ())


def _stat_fields(pid: int) -> Sequence[str]:
    """The fields of /proc/PID/stat from number 3, `state`; the name before them may hold spaces."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _cpu_s(pid: int) -> float:
    """CPU time of a process: in nanoseconds from schedstat, or in ticks where that is off."""
    threads = (PROC / str(pid) / "task").iterdir()
    nanoseconds = 0
    for thread in threads:
        try:
            nanoseconds += int((thread / "schedstat").read_text().split()[0])
        except OSError:
            continue
    fields = _stat_fields(pid)
    return nanoseconds / 1e9 or (int(fields[11]) + int(fields[12])) * TICK_S


def _machine() -> tuple[float, float]:
    """Busy and stolen seconds of all cores (proc(5), /proc/stat)."""
    fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq) * TICK_S, steal * TICK_S


def _pressure_s() -> float | None:
    try:
        return int((PROC / "pressure/cpu").read_text().split("\n", 1)[0].rpartition("=")[2]) / 1e6
    except OSError:
        return None  # a kernel without PSI


def read_stack(path: Path | None) -> StackFile:
    return StackFile() if path is None else msgspec.json.decode(path.read_bytes(), type=StackFile)


def read_log(lines: bytes) -> tuple[Environment | None, Sequence[Sample]]:
    """Read what `python -m bench.cost` has printed; a last line that was cut off is left out."""
    complete = lines.split(b"\n")[:-1]
    if not complete:
        return None, []
    environment = msgspec.json.decode(complete[0], type=Environment)
    return environment, [msgspec.json.decode(line, type=Sample) for line in complete[1:]]


def main() -> None:
    """Print the environment, then a sample a second, until told to stop or left alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost")
    parser.add_argument("--generator", type=int, required=True, help="process id of the load")
    parser.add_argument("--stack", type=Path, help="stack.json of the Waybill under load")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    stack = read_stack(arguments.stack)
    roots = {**stack.pids, "generator": [arguments.generator], "meter": [os.getpid()]}
    _print(read_environment(stack.postgres_url, arguments.stack))
    parent, due = os.getppid(), time.monotonic()
    with Meter(roots, stack.postgres_url) as meter:
        while PROC.is_dir() and os.getppid() == parent:
            _print(meter.sample())
            due += SAMPLE_S
            time.sleep(max(0.0, due - time.monotonic()))


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _print(line: Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
