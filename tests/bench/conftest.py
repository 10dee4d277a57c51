"""A stand-in for the service, and the load suite run on it as its users run it."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.bench.fake_waybill import Faults

ROOT = Path(__file__).parents[2]
LOCUST_TIMEOUT_S = 60

# Small and forgiving: these runs test the harness on whatever machine there is, not the machine.
SLO = """
schema = 1
service = "fake"
[workload]
rate = {rate}
duration = "{duration_s}s"
max_duration = "{duration_s}s"
warmup = "0.5s"
seed = 7
timeout = "5s"
in_flight_max = {in_flight_max}
mix = {{ browse_stock = {browse}, read_order = 5, list_customer_orders = 5, place_order = 20 }}
[[slo]]
name = "answered"
events = ["browse_stock"]
good = "status == 200 and response_ms <= 4000"
target = 0.9
[[slo]]
name = "fresh"
sli = "projection_lag"
probe = {{ sample = 1.0, method = "wait", timeout = "2s" }}
good = "lag_high_ms <= 4000"
target = 0.6
[[slo]]
name = "kept"
sli = "audit"
good = "acked_exactly_once"
target = 1.0
[validity]
lateness_p99_ms = 60000
min_sent_ratio = 0.99
conservation = true
littles_law_error = 1.0
generator_cpu = 1.0
cpu_pressure_avg10 = 100
steal = 1.0
clock_step_ms = 60000
"""


class Outcome(msgspec.Struct):
    """How a run of the suite ended."""

    code: int
    out: str
    err: str
    result: dict[str, Any]


Offer = Callable[..., Outcome]


@pytest.fixture
def fake() -> Generator[Callable[[Faults], str]]:
    """Start stand-ins; each answers at the address returned."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(faults: Faults) -> str:
        program = Path(__file__).parent / "fake_waybill.py"
        process = subprocess.Popen(
            [sys.executable, str(program), msgspec.json.encode(faults).decode()],
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def offer(tmp_path: Path) -> Offer:
    """Run `locust -f bench/locustfile.py` against an address, to its end."""

    def run(
        url: str,
        *,
        rate: float = 60,
        duration_s: float = 3,
        browse: int = 70,
        locustfile: str = "bench/locustfile.py",
        slo: str | None = None,
    ) -> Outcome:
        text = slo or SLO.format(
            rate=rate, duration_s=duration_s, browse=browse, in_flight_max=int(8 * rate)
        )
        (tmp_path / "slo.toml").write_text(text)
        command = [
            *(sys.executable, "-m", "locust", "-f", locustfile, "--headless", "--only-summary"),
            *("--host", url, "--slo", str(tmp_path / "slo.toml"), "--loglevel", "ERROR"),
            *("--results", str(tmp_path / "results")),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "WAYBILL_API_KEY": "key"},
            capture_output=True,
            text=True,
            timeout=LOCUST_TIMEOUT_S,
            check=False,
        )
        kept = sorted((tmp_path / "results").glob("*.json"))
        result: dict[str, Any] = msgspec.json.decode(kept[-1].read_bytes()) if kept else {}
        return Outcome(done.returncode, done.stdout, done.stderr, result)

    return run
