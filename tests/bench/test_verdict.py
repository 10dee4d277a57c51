"""Fixtures that must give each of the five verdicts; all of them data, no server and no clock."""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
import pytest

from bench.lag import Lags, Sighting
from bench.recorder import BROKEN, CANCELLED, DROPPED, Recorder, quantile
from bench.slo import BROWSE, LIST_CUSTOMER, LIST_STATUS, PLACE, READ, Slo, load_slo
from bench.verdict import (
    Audit,
    Evidence,
    Kind,
    Readings,
    Verdict,
    Window,
    judge,
    wilson,
)

SLO = load_slo(Path(__file__).parents[2] / "bench/slo.toml")
WINDOW = Window(100.0, 160.0)
OPERATIONS = (BROWSE, PLACE, READ, LIST_CUSTOMER, LIST_STATUS)
CALM = Readings(
    in_flight=[],
    beat_gaps_ms=[0.5] * 1000,
    generator_cpu=0.2,
    cpu_pressure=10.0,
    steal=0.0,
    clock_step_ms=0.1,
    durable=True,
)
KEPT = Audit(acked=1000, missing=0, doubled=0, unchecked=0)

Serve = Callable[[int, str], tuple[float, float, int]]
"""Number of the arrival and operation: lateness in s, service in s, outcome."""


def evidence(
    serve: Serve,
    *,
    arrivals: int = 3000,
    lag_s: Callable[[int], float] = lambda _: 0.02,
    readings: Readings = CALM,
    audit: Audit | None = KEPT,
) -> Evidence:
    """Play `arrivals`, evenly spread over the window."""
    recorder, lags = Recorder(), Lags()
    recorder.planned = arrivals
    for number in range(arrivals):
        operation = OPERATIONS[number % len(OPERATIONS)]
        due = WINDOW.start + (WINDOW.end - WINDOW.start) * number / arrivals
        lateness_s, service_s, outcome = serve(number, operation)
        recorder.arrived += 1
        if outcome == DROPPED:
            recorder.drop(operation, due)
            continue
        recorder.sent += 1
        start = due + lateness_s
        recorder.finish(operation, due, start, start + service_s, outcome)
        if operation == PLACE:
            sighting = Sighting(sent=start, acked=start + service_s)
            sighting.blind(start + service_s + 0.9 * lag_s(number))
            sighting.seen(start + service_s + lag_s(number))
            lags.add(due, sighting)
    return Evidence(recorder=recorder, lags=lags, windows=[WINDOW], readings=readings, audit=audit)


def good(_number: int, operation: str) -> tuple[float, float, int]:
    return 0.0001, 0.005, 201 if operation == PLACE else 200


def always(lateness_s: float, service_s: float, outcome: int) -> Serve:
    return lambda _number, _operation: (lateness_s, service_s, outcome)


def slow(number: int, operation: str) -> tuple[float, float, int]:
    """One in ten takes a second."""
    lateness_s, service_s, outcome = good(number, operation)
    return lateness_s, 1.0 if number % 10 < 2 else service_s, outcome


def late(number: int, operation: str) -> tuple[float, float, int]:
    """The generator, not the server, holds up one in ten."""
    _, service_s, outcome = good(number, operation)
    return 1.0 if number % 10 < 2 else 0.0001, service_s, outcome


def judged(given: Evidence, slo: Slo = SLO) -> Verdict:
    return judge(slo, given)


def test_all_good_is_pass() -> None:
    verdict = judged(evidence(good))
    assert (verdict.kind, verdict.exit_code) == (Kind.PASS, 0)


def test_a_slow_server_is_fail() -> None:
    verdict = judged(evidence(slow))
    assert (verdict.kind, verdict.exit_code) == (Kind.FAIL, 1)


def test_a_server_that_refuses_is_fail() -> None:
    def refuse(number: int, operation: str) -> tuple[float, float, int]:
        return 0.0001, 0.001, 503 if number % 7 == 0 else good(number, operation)[2]

    assert judged(evidence(refuse)).kind is Kind.FAIL


@pytest.mark.parametrize("outcome", [BROKEN, 401, 404, 429])
def test_no_answer_and_the_wrong_answer_are_bad_however_fast(outcome: int) -> None:
    assert judged(evidence(always(0.0001, 0.0001, outcome))).kind is Kind.FAIL


def test_no_answer_is_bad_whatever_the_condition_says_of_the_status() -> None:
    lenient = msgspec.structs.replace(SLO.slo[0], good="status < 500 and response_ms <= 50")
    slo = msgspec.structs.replace(SLO, slo=(lenient,))
    assert judged(evidence(always(0.0001, 0.0001, BROKEN)), slo).kind is Kind.FAIL


def test_dropped_arrivals_are_bad_events() -> None:
    def drop(number: int, operation: str) -> tuple[float, float, int]:
        return (0.0, 0.0, DROPPED) if number % 9 == 0 else good(number, operation)

    assert judged(evidence(drop)).kind is Kind.FAIL


def test_one_slow_operation_does_not_hide_among_the_others() -> None:
    def lists_are_slow(number: int, operation: str) -> tuple[float, float, int]:
        return 0.0001, 0.5 if operation == LIST_STATUS else 0.001, good(number, operation)[2]

    verdict = judged(evidence(lists_are_slow))
    assert verdict.kind is Kind.FAIL
    assert [each.name for each in verdict.findings if each.fails] == [f"reads-fast/{LIST_STATUS}"]


def test_a_late_projection_is_fail_and_judged_on_the_lower_bound() -> None:
    assert judged(evidence(good, lag_s=lambda _: 0.7)).kind is Kind.FAIL
    # Between 495 and 555 ms: it may have been in time, or not.
    assert judged(evidence(good, lag_s=lambda _: 0.55)).kind is Kind.INCONCLUSIVE


def test_a_write_never_seen_is_bad() -> None:
    def unseen(number: int) -> float:
        return math.inf if number % 8 == 0 else 0.02

    verdict = judged(evidence(good, lag_s=unseen))
    assert verdict.kind is Kind.FAIL


def test_a_late_generator_cannot_fail_the_server() -> None:
    verdict = judged(evidence(late))
    assert (verdict.kind, verdict.exit_code) == (Kind.INVALID, 3)


def test_a_late_generator_that_hides_nothing_may_pass() -> None:
    def a_little_late(number: int, operation: str) -> tuple[float, float, int]:
        return 0.02, 0.005, good(number, operation)[2]  # 25 ms in all, of 50 allowed

    verdict = judged(evidence(a_little_late))
    assert not next(each for each in verdict.guards if each.name == "lateness p99 ms").holds
    assert verdict.kind is Kind.PASS


def test_between_service_and_response_nothing_is_decided() -> None:
    """48 ms of service and 4 ms of lateness, of 50 ms allowed: the user felt something between."""

    def just(_number: int, operation: str) -> tuple[float, float, int]:
        return 0.004, 0.048, 201 if operation == PLACE else 200

    verdict = judged(evidence(just))
    assert all(each.holds for each in verdict.guards)
    assert verdict.kind is Kind.INCONCLUSIVE


def test_a_slow_server_and_a_late_generator_is_invalid() -> None:
    def both(number: int, operation: str) -> tuple[float, float, int]:
        return 0.05, *slow(number, operation)[1:]

    assert judged(evidence(both)).kind is Kind.INVALID


@pytest.mark.parametrize(
    "unfit",
    [
        {"generator_cpu": 0.95},
        {"cpu_pressure": 90.0},
        {"steal": 0.2},
        {"durable": False},
        {"clock_step_ms": 500.0},
    ],
)
def test_an_unfit_machine_makes_a_pass_invalid(unfit: dict[str, float]) -> None:
    readings = msgspec.structs.replace(CALM, **unfit)
    assert judged(evidence(good, readings=readings)).kind is Kind.INVALID


def test_a_busy_machine_does_not_excuse_a_slow_server() -> None:
    readings = msgspec.structs.replace(CALM, cpu_pressure=90.0)
    assert judged(evidence(slow, readings=readings)).kind is Kind.FAIL


def test_a_clock_that_jumps_voids_a_fail() -> None:
    readings = msgspec.structs.replace(CALM, clock_step_ms=500.0)
    assert judged(evidence(slow, readings=readings)).kind is Kind.INVALID


def test_what_cannot_be_measured_breaks_nothing() -> None:
    nothing = Readings(
        in_flight=[],
        beat_gaps_ms=[],
        generator_cpu=None,
        cpu_pressure=None,
        steal=None,
        clock_step_ms=None,
        durable=None,
    )
    assert judged(evidence(good, readings=nothing)).kind is Kind.PASS


def test_a_lost_row_makes_the_run_invalid() -> None:
    given = evidence(slow)
    given.recorder.sent += 1
    assert not given.recorder.conserves()
    assert judged(given).kind is Kind.INVALID


def test_cancelled_requests_are_conserved() -> None:
    given = evidence(always(0.0, 0.0, CANCELLED))
    assert given.recorder.conserves()


def test_a_run_cut_short_is_invalid() -> None:
    given = evidence(good)
    given.recorder.planned = 2 * given.recorder.arrived
    assert judged(given).kind is Kind.INVALID


def test_a_record_that_contradicts_littles_law_is_invalid() -> None:
    """At 50 arrivals/s of 5 ms, a quarter of a request is in flight; not three."""
    beats = [(WINDOW.start + n * 0.01, 3) for n in range(6000)]
    readings = msgspec.structs.replace(CALM, in_flight=beats)
    assert judged(evidence(good, readings=readings)).kind is Kind.INVALID


def test_a_record_that_obeys_littles_law_is_believed() -> None:
    random = Random(1)
    beats = [(WINDOW.start + n * 0.01, int(random.random() < 0.25)) for n in range(6000)]
    readings = msgspec.structs.replace(CALM, in_flight=beats)
    assert judged(evidence(good, readings=readings)).kind is Kind.PASS


def test_too_few_events_are_inconclusive_however_good() -> None:
    verdict = judged(evidence(good, arrivals=300))
    assert (verdict.kind, verdict.exit_code) == (Kind.INCONCLUSIVE, 4)
    assert any("needs" in reason for reason in verdict.reasons)


def test_the_floor_of_events_is_that_of_no_bad_event_at_all() -> None:
    """0.98 ** 149 < 0.05: 148 good events of 148 are not yet 98 % with 95 % confidence."""
    count = len(OPERATIONS)
    assert SLO.slo[0].events_min == 149
    assert judged(evidence(good, arrivals=148 * count)).kind is Kind.INCONCLUSIVE
    assert judged(evidence(good, arrivals=149 * count)).kind is Kind.PASS


def test_few_events_that_are_all_bad_fail() -> None:
    assert judged(evidence(always(0.0001, 2.0, 200), arrivals=300)).kind is Kind.FAIL


def test_a_ratio_on_its_target_is_inconclusive() -> None:
    def on_target(number: int, operation: str) -> tuple[float, float, int]:
        bad = number // len(OPERATIONS) % 50 == 0  # 2 % of each operation
        return 0.0001, 1.0 if bad else 0.001, good(number, operation)[2]

    assert judged(evidence(on_target)).kind is Kind.INCONCLUSIVE


def test_a_lost_write_is_fail_even_when_nothing_else_is_to_be_believed() -> None:
    given = evidence(late, audit=Audit(acked=1000, missing=1, doubled=0, unchecked=0))
    given.recorder.sent += 1
    assert judged(given).kind is Kind.FAIL


def test_a_doubled_write_is_fail() -> None:
    audit = Audit(acked=1000, missing=0, doubled=1, unchecked=0)
    assert judged(evidence(good, audit=audit)).kind is Kind.FAIL


def test_orders_that_could_not_be_audited_are_no_pass() -> None:
    audit = Audit(acked=1000, missing=0, doubled=0, unchecked=3)
    assert judged(evidence(good, audit=audit)).kind is Kind.INCONCLUSIVE


def test_events_outside_of_the_windows_are_not_judged() -> None:
    given = evidence(good)
    before_the_window = WINDOW.start - 1
    for _ in range(1000):
        given.recorder.sent += 1
        given.recorder.finish(READ, before_the_window, before_the_window, WINDOW.start, 500)
        given.lags.add(before_the_window, Sighting(sent=0.0, acked=0.0))
    assert judged(given).kind is Kind.PASS


def test_bursts_widen_the_bounds() -> None:
    """The same number of bad events says less when they come together."""

    def spread(number: int, operation: str) -> tuple[float, float, int]:
        return 0.0001, 1.0 if number % 100 == 0 else 0.001, good(number, operation)[2]

    def burst(number: int, operation: str) -> tuple[float, float, int]:
        return 0.0001, 1.0 if 1000 <= number < 1150 else 0.001, good(number, operation)[2]

    widths = [
        judged(evidence(serve)).findings[0].upper - judged(evidence(serve)).findings[0].lower
        for serve in (spread, burst)
    ]
    assert widths[1] > widths[0]


def test_wilson_bounds_are_those_of_the_tables() -> None:
    lower, upper = wilson(95, 100, 0.975)
    assert abs(lower - 0.8882) < 0.0005
    assert abs(upper - 0.9785) < 0.0005
    assert wilson(0, 0, 0.95) == (0.0, 1.0)


def test_a_quantile_of_too_few_is_refused() -> None:
    assert quantile(list(range(999)), 0.99) is None
    assert quantile(list(range(1000)), 0.99) == 989
    assert quantile(list(range(19)), 0.5) is None
    assert quantile(list(range(20)), 0.5) == 9
