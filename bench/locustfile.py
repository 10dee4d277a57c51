"""The load suite for Locust, with or without its web interface: `locust -f bench/locustfile.py`.

The scenario, the arrivals and the verdict are those of `./waybill bench`; Locust starts and stops
the run, shows it, and exits with the verdict's code. The code says ERROR until a verdict says
otherwise, and is set last: Locust swallows what a listener raises.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import msgspec
from locust import LoadTestShape, events
from locust.env import Environment
from locust.runners import LocalRunner

from bench.catalogue import Preloaded
from bench.dispatcher import OnRequest, OpenModel
from bench.report import render
from bench.run import ROOT, Options, Run
from bench.slo import PLACE, SloError, load_slo
from bench.verdict import Kind

__all__ = ["OpenModel", "PlanShape"]  # what Locust looks for in this file

DEFAULT_URL: Final = "http://127.0.0.1:8000"


class PlanShape(LoadTestShape):
    """One user as long as the plan lasts; the plan carries the rate."""

    def tick(self) -> tuple[int, float] | None:
        run = Session.run
        return None if run is not None and run.is_over else (1, 1.0)


class Session:
    """The run at hand; Locust's listeners are functions, so it stands here."""

    run: ClassVar[Run | None] = None


def add_options(parser: Any, **_: object) -> None:
    """Add ours to Locust's options; its web interface shows those that a run may change."""
    slo = str(ROOT / "bench/slo.toml")
    parser.add_argument("--slo", default=slo, help="promises, workload and validity")
    parser.add_argument("--rate", type=float, help="arrivals per second instead of the file's")
    parser.add_argument("--duration", type=float, help="seconds instead of the file's")
    parser.add_argument("--seed", type=int, help="seed instead of the file's")
    hidden: dict[str, Any] = {"include_in_web_ui": False}
    parser.add_argument("--stack", type=Path, help="stack.json of the Waybill", **hidden)
    parser.add_argument("--preloaded", type=Path, help="what is loaded already", **hidden)
    parser.add_argument("--results", type=Path, help="directory for results", **hidden)
    parser.add_argument("--command", help="the command to name in the result", **hidden)


def refuse_what_cannot_be_judged(environment: Environment, **_: object) -> None:
    """Start at ERROR; end at once if there could be no verdict."""
    environment.process_exit_code = Kind.ERROR.value
    if not isinstance(environment.runner, LocalRunner):
        print("bench: one process only: the plan and its record are in one", file=sys.stderr)
        sys.exit(Kind.ERROR.value)
    try:
        read_options(environment)
    except SloError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(Kind.ERROR.value)


def begin(environment: Environment, **_: object) -> None:
    environment.process_exit_code = Kind.ERROR.value
    Session.run = run = Run(read_options(environment), on_request=tell(environment))
    OpenModel.plan = run


def conclude(environment: Environment, **_: object) -> None:
    run, Session.run = Session.run, None
    assert run is not None, "stopped without a start"
    result, kept_at = run.conclude()
    print(f"\n{render(result, kept_at)}\n", flush=True)
    environment.process_exit_code = result.exit_code  # the last statement


def read_options(environment: Environment) -> Options:
    """Read the options as they are now: the web interface changes some between runs.

    Raises:
        SloError: the SLO file cannot be used, or what is given instead cannot.
    """
    given = environment.parsed_options
    assert given is not None
    preloaded = None
    if given.preloaded is not None:
        preloaded = msgspec.json.decode(given.preloaded.read_bytes(), type=Preloaded)
    data_dir = Path(os.environ.get("WAYBILL_DATA_DIR") or ROOT / ".waybill")
    seed = _number(given.seed)
    return Options(
        slo=load_slo(
            Path(given.slo),
            rate=_number(given.rate),
            duration_s=_number(given.duration),
            seed=None if seed is None else int(seed),
        ),
        url=environment.host or os.environ.get("WAYBILL_URL") or DEFAULT_URL,
        api_key=os.environ.get("WAYBILL_API_KEY") or "",
        stack=given.stack,
        preloaded=preloaded,
        results=given.results or data_dir / "bench",
        command=given.command or shlex.join(["locust", *sys.argv[1:]]),
    )


def _number(value: str | float | None) -> float | None:
    # The web interface sends text, and nothing for an empty field.
    return float(value) if value not in (None, "") else None


def tell(environment: Environment) -> OnRequest:
    """Show each request in Locust's own statistics, with its response time."""
    fire = cast("Any", environment.events.request).fire

    def on_request(
        operation: str, response_ms: float, body_bytes: int, error: Exception | None
    ) -> None:
        fire(
            request_type="POST" if operation == PLACE else "GET",
            name=operation,
            response_time=response_ms,
            response_length=body_bytes,
            exception=error,
            context={},
        )

    return on_request


_events: Any = events  # Locust's hooks are not typed
_events.init_command_line_parser.add_listener(add_options)
_events.init.add_listener(refuse_what_cannot_be_judged)
_events.test_start.add_listener(begin)
_events.test_stop.add_listener(conclude)
