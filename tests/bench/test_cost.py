"""CPU by role."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.cost import (
    PRESSURE_SAMPLES,
    Meter,
    Sample,
    clock_step_ms,
    cost_between,
    read_log,
    within,
    worst_pressure,
)

BURN = "import time; d=time.process_time()+%s\nwhile time.process_time()<d: pass\n%s"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def sample(at: float, *, pressure_s: float = 0.0, offset_s: float = 0.0) -> Sample:
    return Sample(at, {"web": at}, 2 * at, 0.0, pressure_s, offset_s)


@linux_only
def test_the_cpu_of_a_process_and_its_children_counts_for_its_role() -> None:
    child = BURN % (0.3, "time.sleep(3)")  # seen while it lives; then it is gone by itself
    parent = f"import subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        meter = Meter({"web": [process.pid], "idle": [os.getpid()]}, None)
        before = meter.sample()
        deadline = time.monotonic() + 10
        while cost_between(before, meter.sample()).cpu_s["web"] < 0.25:
            assert time.monotonic() < deadline, "the child's CPU is not seen"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


@linux_only
def test_a_process_that_has_ended_keeps_what_it_used() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BURN % (0.2, "input()")], stdin=subprocess.PIPE
    )
    meter = Meter({"web": [process.pid]}, None)
    deadline = time.monotonic() + 10
    while meter.sample().cpu_s["web"] < 0.2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.communicate(b"\n")
    assert meter.sample().cpu_s["web"] >= 0.2


@linux_only
def test_the_sampler_prints_the_environment_and_samples_and_stops() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.cost", "--generator", str(os.getpid())],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.terminate()
    rest, _ = process.communicate(timeout=10)
    environment, samples = read_log(b"".join(lines) + rest + b'{"cut off')
    assert environment is not None
    assert environment.cores == os.cpu_count()
    assert environment.fsync_ms > 0
    assert samples[1].cpu_s["generator"] > 0
    assert samples[1].at > samples[0].at


def test_what_no_role_used_is_unattributed() -> None:
    spent = cost_between(sample(10), sample(20))
    assert spent.cpu_s == {"web": 10.0, "unattributed": 10.0}
    assert spent.elapsed_s == 10


def test_the_samples_of_a_window_are_those_around_it() -> None:
    samples = [sample(at) for at in range(10)]
    assert [each.at for each in within(samples, 2.5, 5.5)] == [2, 3, 4, 5, 6]
    assert [each.at for each in within(samples, -5, 99)] == list(range(10))


def test_the_worst_ten_seconds_of_pressure_count() -> None:
    calm, busy = [0.0] * 30, [0.9 * n for n in range(1, PRESSURE_SAMPLES + 1)]
    samples = [sample(at, pressure_s=used) for at, used in enumerate([*calm, *busy])]
    worst = worst_pressure(samples)
    assert worst is not None
    assert abs(worst - 90) < 1
    assert worst_pressure(samples[:1]) is None


def test_a_step_of_the_clock_is_seen() -> None:
    samples = [sample(0), sample(1, offset_s=0.001), sample(2, offset_s=0.501)]
    step = clock_step_ms(samples)
    assert step is not None
    assert abs(step - 500) < 1e-6
