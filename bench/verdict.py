"""The verdict on a run, one of five. Pure: no clock, no I/O, no Locust.

    PASS          exit 0  the lower bound of every objective, counted on response, is on target
    FAIL          exit 1  the upper bound of one objective, counted on service, is below target;
                          or an acknowledged order is lost or doubled
    ERROR         exit 2  the harness failed, or never came to a verdict
    INVALID       exit 3  the run is not to be believed: the generator or the machine was unfit
    INCONCLUSIVE  exit 4  the bounds straddle a target

Service time is at least and response time at most what a user felt. So a PASS stands even if the
generator was late (it was judged harder than reality), while a FAIL stands only if arrivals were
not bunched.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum
from random import Random
from statistics import NormalDist, fmean, stdev
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from bench.lag import Lags
from bench.recorder import DROPPED, Recorder, Row
from bench.slo import Good, Objective, Slo, parse_good

BLOCK_S: Final = 2.0  # latencies of neighbours are alike, so whole blocks are resampled
RESAMPLES: Final = 1000
BLOCKS_MIN: Final = 5  # fewer say nothing about how the ratio varies


Voids: TypeAlias = Literal["all", "pass", "fail"]
"""What a broken guard voids: every verdict; all but FAIL; or all but PASS."""


class Kind(Enum):
    """The five verdicts, by exit code."""

    PASS = 0
    FAIL = 1
    ERROR = 2
    INVALID = 3
    INCONCLUSIVE = 4


class Window(Struct, frozen=True):
    """A judged stretch of time.monotonic(): arrivals due from start (included) to end."""

    start: float
    end: float


class Audit(Struct, frozen=True):
    """What became of every acknowledged order, and of every one whose outcome was unknown."""

    acked: int  # answered 201, unknown ones included that were answered when asked again
    missing: int  # acked, but not to be read
    doubled: int  # more orders than were asked for, whoever placed them
    unchecked: int  # could not be asked, for lack of an answer

    @property
    def is_broken(self) -> bool:
        return bool(self.missing or self.doubled)


class Readings(Struct, frozen=True, kw_only=True):
    """What the generator and the machine were like. None: cannot be measured here."""

    in_flight: Sequence[tuple[float, int]]  # (time, requests in flight), sampled at a steady beat
    beat_gaps_ms: Sequence[float]  # how late each of those samples was
    generator_cpu: float | None  # share of one core
    cpu_pressure: float | None  # percent
    steal: float | None  # share of all cores
    clock_step_ms: float | None
    durable: bool | None  # fsync and synchronous_commit are on


class Evidence(Struct, frozen=True, kw_only=True):
    """All that a verdict rests on. `audit` is None while the run may still be extended."""

    recorder: Recorder
    lags: Lags
    windows: Sequence[Window]
    readings: Readings
    audit: Audit | None


class Finding(Struct, frozen=True, kw_only=True):
    """One objective, or one operation of it: the good ratio between its bounds."""

    name: str
    events: int
    bad_at_most: int  # counted on the response time, or lag_high
    bad_at_least: int  # counted on the service time, or lag_low
    lower: float
    upper: float
    target: float
    events_min: int  # below this PASS cannot be shown

    @property
    def passes(self) -> bool:
        return self.lower >= self.target and self.events >= self.events_min

    @property
    def fails(self) -> bool:
        return self.upper < self.target


class Guard(Struct, frozen=True, kw_only=True):
    """One validity check. `value` None: not measurable here, which breaks nothing."""

    name: str
    value: float | None
    limit: float
    holds: bool
    voids: Voids


class Verdict(Struct, frozen=True, kw_only=True):
    """The verdict and what led to it."""

    kind: Kind
    reasons: Sequence[str]
    findings: Sequence[Finding] = ()
    guards: Sequence[Guard] = ()
    audit: Audit | None = None

    @property
    def exit_code(self) -> int:
        return self.kind.value


def judge(slo: Slo, evidence: Evidence) -> Verdict:
    """Judge a run; the same evidence gives the same verdict."""
    rows = [
        row for row in evidence.recorder.rows() if _block(row.due, evidence.windows) is not None
    ]
    findings = [finding for each in slo.slo for finding in _find(each, rows, evidence, slo)]
    guards = check_guards(slo, rows, evidence)
    kind, reasons = _decide(findings, guards, evidence.audit)
    return Verdict(
        kind=kind, reasons=reasons, findings=findings, guards=guards, audit=evidence.audit
    )


def _decide(
    findings: Sequence[Finding], guards: Sequence[Guard], audit: Audit | None
) -> tuple[Kind, Sequence[str]]:
    """Apply the precedence: the first rule that holds decides."""
    broken = [guard for guard in guards if not guard.holds]
    voided = {guard.voids for guard in broken}
    failing = [finding for finding in findings if finding.fails]
    still_open = [finding for finding in findings if not finding.passes]
    lost = audit is not None and audit.is_broken
    unaudited = audit is not None and audit.unchecked > 0
    unfit = [f"{each.name} is {each.value:.4g}, limit {each.limit:.4g}" for each in broken]
    rules: tuple[tuple[bool, Kind, Sequence[str]], ...] = (
        (lost, Kind.FAIL, [_describe_loss(audit)]),  # absolute: noise cannot lose a row
        ("all" in voided, Kind.INVALID, unfit),
        (bool(failing) and "fail" not in voided, Kind.FAIL, [_describe(each) for each in failing]),
        (bool(failing) or "pass" in voided, Kind.INVALID, unfit),
        (bool(still_open) and "fail" in voided, Kind.INVALID, unfit),
        (unaudited, Kind.INCONCLUSIVE, [_describe_loss(audit)]),
        (bool(still_open), Kind.INCONCLUSIVE, [_describe(each) for each in still_open]),
        (True, Kind.PASS, ["every objective holds"]),
    )
    return next((kind, reasons) for holds, kind, reasons in rules if holds)


def _describe(finding: Finding) -> str:
    if finding.events < finding.events_min and not finding.fails:
        return f"{finding.name}: {finding.events} events, needs {finding.events_min}"
    return (
        f"{finding.name}: between {finding.lower:.2%} and {finding.upper:.2%} good,"
        f" target {finding.target:.2%}"
    )


def _describe_loss(audit: Audit | None) -> str:
    if audit is None:
        return "no audit"
    return (
        f"of {audit.acked} acknowledged orders {audit.missing} are missing, {audit.unchecked} could"
        f" not be read; {audit.doubled} orders too many"
    )


def _find(
    objective: Objective, rows: Sequence[Row], evidence: Evidence, slo: Slo
) -> Iterable[Finding]:
    if objective.sli == "audit":
        return
    if objective.sli == "projection_lag":
        good = parse_good(objective.good, latency="lag_high_ms")
        yield _bound(
            objective,
            objective.name,
            [
                (block, good(200, lag.high_ms), good(200, lag.low_ms))
                for lag in evidence.lags
                if (block := _block(lag.due, evidence.windows)) is not None
            ],
            slo.workload.seed,
        )
        return
    good = parse_good(objective.good, latency="response_ms")
    groups = (
        [(f"{objective.name}/{each}", (each,)) for each in objective.events]
        if objective.scope == "each"
        else [(objective.name, objective.events)]
    )
    for name, operations in groups:
        yield _bound(
            objective,
            name,
            [
                (_block(row.due, evidence.windows) or 0, *_both(row, good))
                for row in rows
                if row.operation in operations
            ],
            slo.workload.seed,
        )


def _both(row: Row, good: Good) -> tuple[bool, bool]:
    """Whether the event is good on its response time, and on its service time."""
    if not row.answered:
        return False, False
    return good(row.outcome, row.response_ms), good(row.outcome, row.service_ms)


def _block(moment: float, windows: Sequence[Window]) -> int | None:
    """Number of the block that `moment` falls into, over all windows; None outside of them."""
    first = 0
    for window in windows:
        if window.start <= moment < window.end:
            return first + int((moment - window.start) / BLOCK_S)
        first += math.ceil((window.end - window.start) / BLOCK_S)
    return None


def _bound(
    objective: Objective, name: str, events: Sequence[tuple[int, bool, bool]], seed: int
) -> Finding:
    """Bound the good ratio; an event is (block, good at worst, good at best)."""
    blocks: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for number, at_worst, at_best in events:
        block = blocks[number]
        block[0] += 1
        block[1] += at_worst
        block[2] += at_best
    total = len(events)
    good_at_worst = sum(block[1] for block in blocks.values())
    good_at_best = sum(block[2] for block in blocks.values())
    lower, upper = (
        wilson(good_at_worst, total, objective.confidence)[0],
        wilson(good_at_best, total, objective.confidence)[1],
    )
    # Where every event is alike, resampling has nothing to say and the Wilson bound stands alone.
    if good_at_worst < total and len(blocks) >= BLOCKS_MIN:
        boot_lower, boot_upper = _bootstrap(list(blocks.values()), objective.confidence, seed)
        lower, upper = min(lower, boot_lower), max(upper, boot_upper)
    return Finding(
        name=name,
        events=total,
        bad_at_most=total - good_at_worst,
        bad_at_least=total - good_at_best,
        lower=lower,
        upper=upper,
        target=objective.target,
        events_min=objective.events_min,
    )


def _bootstrap(
    blocks: Sequence[Sequence[int]], confidence: float, seed: int
) -> tuple[float, float]:
    """Resample whole blocks: the lower bound of the worst ratio, the upper bound of the best."""
    random = Random(seed)  # noqa: S311  reproducible on purpose
    at_worst: list[float] = []
    at_best: list[float] = []
    for _ in range(RESAMPLES):
        sample = random.choices(blocks, k=len(blocks))
        total = sum(block[0] for block in sample)
        at_worst.append(sum(block[1] for block in sample) / total)
        at_best.append(sum(block[2] for block in sample) / total)
    tail = int((1 - confidence) * RESAMPLES)
    return sorted(at_worst)[tail], sorted(at_best)[-1 - tail]


def wilson(good: int, total: int, confidence: float) -> tuple[float, float]:
    """Bound a ratio from both sides, each with `confidence` (Wilson, JASA 22, 1927)."""
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(confidence)
    ratio = good / total
    centre = ratio + z * z / (2 * total)
    spread = z * math.sqrt(ratio * (1 - ratio) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def check_guards(slo: Slo, rows: Sequence[Row], evidence: Evidence) -> list[Guard]:
    """Check whether the run is to be believed; `rows` are those of the judged windows."""
    validity, recorder, readings = slo.validity, evidence.recorder, evidence.readings
    sent_ratio = recorder.arrived / recorder.planned if recorder.planned else 0.0
    late_ms = [row.lateness_ms for row in rows if row.outcome != DROPPED]
    return [
        _at_least("sent ratio", sent_ratio, validity.min_sent_ratio, "all"),
        _at_least("conservation", float(recorder.conserves()), 1.0, "all"),
        _at_most("clock step ms", readings.clock_step_ms, validity.clock_step_ms, "all"),
        _at_most(
            "Little's law error",
            littles_law_error(rows, evidence),
            validity.littles_law_error,
            "all",
        ),
        _at_most(
            "lateness p99 ms",
            max(_p99(late_ms), _p99(readings.beat_gaps_ms)),
            validity.lateness_p99_ms,
            "fail",
        ),
        _at_most("generator CPU", readings.generator_cpu, validity.generator_cpu, "pass"),
        _at_most("CPU pressure %", readings.cpu_pressure, validity.cpu_pressure_avg10, "pass"),
        _at_most("steal", readings.steal, validity.steal, "pass"),
        _at_least("durable", None if readings.durable is None else readings.durable, 1.0, "pass"),
    ]


def littles_law_error(rows: Sequence[Row], evidence: Evidence) -> float | None:
    """Compare L = lambda W: what was seen in flight, and what the record says was in flight.

    The relative difference beyond three standard errors (over blocks): sampling at a steady beat
    scatters when little is in flight. None without samples.
    """
    seen: dict[int, list[int]] = defaultdict(list)
    for moment, in_flight in evidence.readings.in_flight:
        if (block := _block(moment, evidence.windows)) is not None:
            seen[block].append(in_flight)
    held_s: dict[int, float] = defaultdict(float)
    for row in rows:
        if row.outcome != DROPPED and (block := _block(row.start, evidence.windows)) is not None:
            held_s[block] += row.end - row.start
    differences = [fmean(counts) - held_s[block] / BLOCK_S for block, counts in seen.items()]
    recorded = fmean(held_s[block] / BLOCK_S for block in seen) if seen else 0.0
    if len(differences) < BLOCKS_MIN or not recorded:
        return None
    scatter = 3 * stdev(differences) / math.sqrt(len(differences))
    return max(0.0, abs(fmean(differences)) - scatter) / recorded


def _p99(values: Sequence[float]) -> float:
    """The nearest rank, whatever the number of values: a guard does not refuse."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def _at_most(name: str, value: float | None, limit: float, voids: Voids) -> Guard:
    holds = value is None or value <= limit
    return Guard(name=name, value=value, limit=limit, holds=holds, voids=voids)


def _at_least(name: str, value: float | None, limit: float, voids: Voids) -> Guard:
    holds = value is None or value >= limit
    return Guard(name=name, value=value, limit=limit, holds=holds, voids=voids)
