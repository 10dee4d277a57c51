"""One run from start to verdict: set up, drive the plan, extend it, audit, judge, keep."""

import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, cast

import gevent
import msgspec
from msgspec import Struct

from bench import cost
from bench.audit import audit
from bench.catalogue import Catalogue, CatalogueError, Preloaded, register
from bench.dispatcher import Client, Dispatcher, Greenlet, OnRequest
from bench.environment import Environment
from bench.lag import Lags
from bench.plan import plan_arrivals
from bench.recorder import DROPPED, Row
from bench.report import Rates, Result, summarize_lags, summarize_latencies
from bench.requests import Requests
from bench.scenario import Ledger, Shopper
from bench.slo import PLACE, PLANNED_OPERATIONS, Slo, seconds
from bench.verdict import (
    BLOCK_S,
    BLOCKS_MIN,
    Audit,
    Evidence,
    Kind,
    Readings,
    Verdict,
    Window,
    judge,
)

ROOT: Final = Path(__file__).resolve().parent.parent
LEAD_S: Final = 0.2  # between planning and the first arrival
EXTENSION_S: Final = 30.0  # of each extension, or what is left up to max_duration
METER_STOP_S: Final = 5.0


class Options(Struct, frozen=True, kw_only=True):
    """What to measure, and where the result goes."""

    slo: Slo
    url: str
    api_key: str
    stack: Path | None  # stack.json, for CPU by role and the database's settings
    preloaded: Preloaded | None  # None: customers and products are registered over HTTP
    results: Path  # directory
    command: str


class Run:
    """One run: `drive` in the dispatcher's greenlet, then `conclude`, once."""

    def __init__(self, options: Options, on_request: OnRequest) -> None:
        self.is_over = False
        self._options = options
        self._slo = options.slo
        self._on_request = on_request
        self._started_at = datetime.now(UTC)
        self._crash: Exception | None = None
        self._windows: list[Window] = []
        self._generator_cpu: list[float] = []  # share of a core, one per stretch
        self._ledger = Ledger()
        self._requests = Requests(options.url, options.api_key)
        self._client = Client(
            options.url,
            connections=2 * self._slo.workload.in_flight_max,  # witnesses have theirs besides
            timeout_s=seconds(self._slo.workload.timeout),
        )
        self._catalogue: Catalogue | None = None
        self._dispatcher: Dispatcher | None = None
        self._meter_log = TemporaryFile()  # noqa: SIM115  closed in conclude
        self._meter = self._start_meter()

    def _start_meter(self) -> subprocess.Popen[bytes]:
        stack = self._options.stack
        return subprocess.Popen(
            [sys.executable, "-m", "bench.cost", "--generator", str(os.getpid())]
            + (["--stack", str(stack.absolute())] if stack is not None else []),
            stdout=self._meter_log,
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C ends the run, which then reads what it has measured
        )

    def drive(self) -> None:
        """Offer the plan, and its extensions; what goes wrong is kept for the verdict."""
        try:
            self._set_up()
            self._drive_stretches()
        except Exception as crash:  # noqa: BLE001  the run's boundary: it becomes an ERROR
            self._crash = crash
        finally:
            self.is_over = True

    def _set_up(self) -> None:
        preloaded = self._options.preloaded
        self._catalogue = (
            preloaded.catalogue()
            if preloaded is not None
            else register(self._requests, self._client.ask_all)
        )
        self._dispatcher = Dispatcher(
            self._client,
            Shopper(self._requests, self._catalogue, self._ledger, self._slo.probe),
            in_flight_max=self._slo.workload.in_flight_max,
            on_request=self._on_request,
        )

    def _drive_stretches(self) -> None:
        assert self._dispatcher is not None
        workload = self._slo.workload
        stretch, stretch_s = 0, seconds(workload.duration)
        left_s = seconds(workload.max_duration)
        warmup_s = seconds(workload.warmup)
        while stretch_s >= BLOCK_S * BLOCKS_MIN or stretch == 0:
            arrivals = plan_arrivals(workload, stretch=stretch, duration_s=stretch_s)
            gc.collect()
            gc.freeze()  # a full collection in mid-run would be charged to the server
            started, cpu_started = time.monotonic() + LEAD_S, time.process_time()
            self._windows.append(Window(started + warmup_s, started + stretch_s))
            progress = cast("Greenlet", gevent.spawn(self._show_progress, started, stretch_s))
            try:
                self._dispatcher.drive(arrivals, started)
                self._dispatcher.drain(self._slo.held_s + LEAD_S)
            finally:
                progress.kill()
            elapsed_s = time.monotonic() - started
            self._generator_cpu.append((time.process_time() - cpu_started) / elapsed_s)
            if judge(self._slo, self._evidence(None, None)).kind is not Kind.INCONCLUSIVE:
                return
            left_s -= stretch_s
            stretch, stretch_s, warmup_s = stretch + 1, min(EXTENSION_S, left_s), 0.0

    def _show_progress(self, started: float, stretch_s: float) -> None:
        """Write one line a second, on the same line where there is a terminal."""
        assert self._dispatcher is not None
        recorder = self._dispatcher.recorder
        shown = len(recorder)
        ending = "\r" if sys.stderr.isatty() else "\n"
        every_s = 1 if sys.stderr.isatty() else 10
        while True:
            gevent.sleep(every_s)
            new = list(recorder.rows(shown))
            shown += len(new)
            slowest = max((row.response_ms for row in new if row.answered), default=0.0)
            failed = sum(not row.answered or row.outcome >= 500 for row in new)
            sys.stderr.write(
                f"bench: {time.monotonic() - started:4.0f} of {stretch_s:.0f} s"
                f"  {len(new) / every_s:6.1f} requests/s  in flight {self._dispatcher.in_flight:4}"
                f"  slowest {slowest:7.1f} ms  failed {failed}   {ending}"
            )
            sys.stderr.flush()

    def conclude(self) -> tuple[Result, str]:
        """Audit, judge, and keep the result; returns it and where it is kept."""
        try:
            result = self._judge()
        except Exception as crash:  # noqa: BLE001  the run's boundary: it becomes an ERROR
            if not isinstance(crash, CatalogueError):
                traceback.print_exception(crash)
            error = Verdict(kind=Kind.ERROR, reasons=[f"{type(crash).__name__}: {crash}"])
            result = self._result(error, [], [], None)
        finally:
            self._stop_meter()
            self._meter_log.close()
            self._client.close()
        name = f"{self._started_at:%Y%m%dT%H%M%SZ}-{result.verdict.lower()}.json"
        self._options.results.mkdir(parents=True, exist_ok=True)
        path = self._options.results / name
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
        return result, str(path)

    def _judge(self) -> Result:
        if self._dispatcher is not None:
            self._dispatcher.drain(0)  # a run stopped by hand leaves requests in flight
        if self._crash is not None:
            raise self._crash
        if self._dispatcher is None or self._catalogue is None:
            raise RuntimeError("stopped before the first arrival")
        environment, samples = cost.read_log(self._stop_meter())
        samples = cost.within(samples, self._windows[0].start, self._windows[-1].end)
        audited = None
        if any(objective.sli == "audit" for objective in self._slo.slo):
            audited = audit(
                self._ledger, self._requests, self._client.ask_all, self._catalogue.customers
            )
        verdict = judge(self._slo, self._evidence(audited, environment, samples))
        return self._result(verdict, list(self._dispatcher.recorder.rows()), samples, environment)

    def _evidence(
        self,
        audited: Audit | None,
        environment: Environment | None,
        samples: Sequence[cost.Sample] = (),
    ) -> Evidence:
        assert self._dispatcher is not None
        spent = _spent(samples)
        cores = os.cpu_count() or 1
        return Evidence(
            recorder=self._dispatcher.recorder,
            lags=self._dispatcher.lags,
            windows=self._windows,
            readings=Readings(
                in_flight=self._dispatcher.beats,
                beat_gaps_ms=self._dispatcher.beat_gaps_ms,
                generator_cpu=max(self._generator_cpu, default=None),
                cpu_pressure=cost.worst_pressure(samples),
                steal=spent.steal_s / spent.elapsed_s / cores if spent is not None else None,
                clock_step_ms=cost.clock_step_ms(samples),
                durable=environment.durable if environment is not None else None,
            ),
            audit=audited,
        )

    def _result(
        self,
        verdict: Verdict,
        rows: Sequence[Row],
        samples: Sequence[cost.Sample],
        environment: Environment | None,
    ) -> Result:
        judged = [row for row in rows if any(w.start <= row.due < w.end for w in self._windows)]
        judged_s = sum(window.end - window.start for window in self._windows)
        lags = self._dispatcher.lags if self._dispatcher is not None else Lags()
        spent = _spent(samples)
        measured = [
            row
            for row in rows
            if samples and row.answered and samples[0].at <= row.start < samples[-1].at
        ]
        return Result(
            verdict=verdict.kind.name,
            exit_code=verdict.exit_code,
            judged=verdict,
            service=self._slo.service,
            command=self._options.command,
            started_at=self._started_at.isoformat(timespec="seconds"),
            judged_s=judged_s,
            workload=self._slo.workload,
            rates=measure_rates(judged, judged_s) if judged else None,
            latencies=summarize_latencies(judged),
            lag=summarize_lags(
                [lag for lag in lags if any(w.start <= lag.due < w.end for w in self._windows)],
                lags.witnesses,
            ),
            cost=spent,
            requests=len(measured),
            orders=sum(row.operation == PLACE for row in measured),
            environment=environment,
        )

    def _stop_meter(self) -> bytes:
        """Stop the meter if it runs, and return what it has written."""
        self._meter.terminate()
        self._meter.wait(METER_STOP_S)
        self._meter_log.seek(0)
        return self._meter_log.read()


def _spent(samples: Sequence[cost.Sample]) -> cost.Cost | None:
    return cost.cost_between(samples[0], samples[-1]) if len(samples) > 1 else None


def measure_rates(rows: Sequence[Row], judged_s: float) -> Rates:
    planned = [row for row in rows if row.operation in PLANNED_OPERATIONS]
    return Rates(
        offered=len(planned) / judged_s,
        sent=sum(row.outcome != DROPPED for row in planned) / judged_s,
        answered=sum(row.answered for row in planned) / judged_s,
        failed=sum(not row.answered or row.outcome >= 500 for row in planned) / judged_s,
    )
