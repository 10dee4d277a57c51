"""`python -m bench`: put a minute of load on Waybill and give a verdict; or measure its limits."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec
import psycopg

from bench import limits
from bench.catalogue import Preloaded
from bench.dataset import load, rebuild_read_models, tidy
from bench.environment import read_environment
from bench.pgbench import PgbenchError
from bench.report import render_environment
from bench.slo import SloError, load_slo
from bench.stack import ROOT, Stack, StackError, end_with_us, given_stack, own_stack
from bench.verdict import Kind
from bench.wire import WireError

ORDERS: Final = 100_000  # preloaded
STOP_S: Final = 60.0  # for a run that was interrupted to audit and judge what it has
FAULTS: Final = (StackError, SloError, PgbenchError, WireError, psycopg.Error, OSError)


def main(arguments: list[str]) -> int:
    """Return the exit code: the verdict's, and ERROR for all that never came to one."""
    asked = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what we started ends
    try:
        return measure_limits(asked) if asked.what == "limits" else measure(asked)
    except FAULTS as fault:
        print(f"bench: {fault}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
    except Exception:  # noqa: BLE001  Python's own exit code for it is 1, which would say FAIL
        traceback.print_exc()
    return Kind.ERROR.value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="./waybill bench",
        description="Put load on Waybill and give a verdict: PASS 0, FAIL 1, ERROR 2, INVALID 3,"
        " INCONCLUSIVE 4.",
        epilog="Without --url, or WAYBILL_URL and WAYBILL_API_KEY, it starts a Waybill of its own.",
    )
    top.add_argument(
        "what",
        nargs="?",
        choices=("run", "limits"),
        default="run",
        help="run (the default), or limits: compare with a bare server and with pgbench",
    )
    top.add_argument("--duration", type=float, metavar="S", help="instead of the SLO file's")
    top.add_argument("--rate", type=float, metavar="PER_S", help="instead of the SLO file's")
    top.add_argument("--seed", type=int, help="instead of the SLO file's")
    top.add_argument("--slo", type=Path, default=ROOT / "bench/slo.toml", help="the SLO file")
    top.add_argument("--url", help="a Waybill that runs; its key is in WAYBILL_API_KEY")
    top.add_argument("--stack", type=Path, help="stack.json of that Waybill, for CPU by role")
    top.add_argument(
        "--orders", type=int, default=ORDERS, help="to preload into a Waybill of our own"
    )
    top.add_argument("--rounds", type=int, default=limits.ROUNDS, help="of limits")
    return top


def measure(asked: argparse.Namespace) -> int:
    """Run the load suite in a process of its own, which prints what it found."""
    load_slo(asked.slo, rate=asked.rate, duration_s=asked.duration, seed=asked.seed)
    with TemporaryDirectory() as directory, waybill(asked) as (stack, preloaded):
        options = {
            "host": stack.url,
            "slo": asked.slo.absolute(),
            "rate": asked.rate,
            "duration": asked.duration,
            "seed": asked.seed,
            "stack": stack.file,
            "results": results_dir(),
            "command": shlex.join(["./waybill", "bench", *sys.argv[1:]]),
            "loglevel": "WARNING",
            "json-file": Path(directory) / "locust.json",  # Locust prints no table of its own then
        }
        if preloaded is not None:
            options["preloaded"] = Path(directory) / "preloaded.json"
            (Path(directory) / "preloaded.json").write_bytes(msgspec.json.encode(preloaded))
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        locustfile = str(ROOT / "bench/locustfile.py")
        locust = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "locust",
                "-f",
                locustfile,
                "--headless",
                "--only-summary",
                *given,
            ],
            cwd=ROOT,
            env={**os.environ, "WAYBILL_API_KEY": stack.api_key},
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_us,  # noqa: PLW1509  (no threads here)
        )
        before = kept_results()
        try:
            code = locust.wait()
        except KeyboardInterrupt:
            code = locust.wait(STOP_S)  # it was interrupted as we were, and concludes
        finally:
            locust.kill()
        # Python itself exits with 1, which would say FAIL, when it cannot even begin.
        judged = kept_results() != before and code in {kind.value for kind in Kind}
    return code if judged else Kind.ERROR.value


def measure_limits(asked: argparse.Namespace) -> int:
    """Compare with the limits, and print and keep the figures."""
    if asked.url:
        raise StackError("limits loads a second database: it needs a Waybill of our own")
    asked.url = None
    began = time.monotonic()
    with waybill(asked) as (stack, preloaded):
        assert preloaded is not None
        measured = limits.Limiter(stack, preloaded, asked.rounds, say, show).measure()
        environment = read_environment(stack.postgres_url, stack.file)
    path = results_dir() / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-limits.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode([measured, environment]), indent=1))
    print(f"{limits.render(measured)}\n\n{render_environment(environment)}")
    print(f"Took {time.monotonic() - began:.0f} s\nResult   {path}")
    return 0


@contextmanager
def waybill(asked: argparse.Namespace) -> Generator[tuple[Stack, Preloaded | None]]:
    """The Waybill that was asked for; our own is loaded first."""
    url = asked.url or (os.environ.get("WAYBILL_URL") if asked.what == "run" else None)
    if url:
        yield given_stack(url, os.environ, asked.stack), None
        return
    say("starting a Waybill of our own")
    with own_stack(results_dir(), os.environ) as stack:
        preloaded = load(stack.postgres_url, asked.orders, say, show)
        rebuild_read_models(stack, say)
        tidy(stack.postgres_url)
        yield stack, preloaded


def results_dir() -> Path:
    """Return where results are kept, and where a stack of our own has its data while it runs."""
    path = Path(os.environ.get("WAYBILL_DATA_DIR") or ROOT / ".waybill") / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def kept_results() -> set[Path]:
    return set(results_dir().glob("*.json"))


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Show progress, each line over the one before; nothing where there is no terminal."""
    if sys.stderr.isatty():
        print(f"\rbench: {text}\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
