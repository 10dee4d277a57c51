"""The result of a run: what is kept as JSON, and what is printed, verdict first."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Final

from msgspec import Struct

from bench.cost import Cost
from bench.environment import Environment
from bench.lag import Lag
from bench.recorder import OUTCOME_NAMES, Row, quantile, quantile_events_min
from bench.slo import OPERATIONS, READ_BACK, Workload
from bench.verdict import Guard, Verdict

WIDTH: Final = 100
# What these do, they do for orders alone.
ORDER_ROLES: Final = ("worker", "postgres waybill-commands", "postgres waybill-worker")
QUANTILES: Final = (0.5, 0.95, 0.99)


class Quantiles(Struct, frozen=True):
    """Exact quantiles in milliseconds; None where too few events lie beyond."""

    p50: float | None
    p95: float | None
    p99: float | None


class Latency(Struct, frozen=True, kw_only=True):
    """One operation in the judged windows."""

    operation: str
    events: int
    outcomes: Mapping[str, int]
    response: Quantiles  # from the intended start
    service: Quantiles  # from the sending
    lateness: Quantiles  # from the intended start to the sending


class LagSummary(Struct, frozen=True, kw_only=True):
    """Projection lag of the probed orders: at least low, at most high."""

    events: int
    unseen: int  # looked for in vain
    low: Quantiles
    high: Quantiles
    witnesses: int


class Rates(Struct, frozen=True):
    """Per second of the judged windows. Only `offered` was chosen."""

    offered: float
    sent: float
    answered: float
    failed: float


class Result(Struct, frozen=True, kw_only=True):
    """One run."""

    verdict: str
    exit_code: int
    judged: Verdict
    service: str
    command: str
    started_at: str  # UTC
    judged_s: float
    workload: Workload
    rates: Rates | None = None
    latencies: Sequence[Latency] = ()
    lag: LagSummary | None = None
    cost: Cost | None = None
    requests: int = 0  # while `cost` was measured, what followed an arrival included
    orders: int = 0  # of them
    environment: Environment | None = None


def summarize_latencies(rows: Sequence[Row]) -> Sequence[Latency]:
    return [
        _summarize(operation, [row for row in rows if row.operation == operation])
        for operation in OPERATIONS
        if any(row.operation == operation for row in rows)
    ]


def _summarize(operation: str, rows: Sequence[Row]) -> Latency:
    answered = [row for row in rows if row.answered]
    return Latency(
        operation=operation,
        events=len(rows),
        outcomes=Counter(OUTCOME_NAMES.get(row.outcome, str(row.outcome)) for row in rows),
        response=quantiles(row.response_ms for row in answered),
        service=quantiles(row.service_ms for row in answered),
        lateness=quantiles(row.lateness_ms for row in answered),
    )


def summarize_lags(lags: Sequence[Lag], witnesses: int) -> LagSummary:
    return LagSummary(
        events=len(lags),
        unseen=sum(lag.high_ms == float("inf") for lag in lags),
        low=quantiles(lag.low_ms for lag in lags),
        high=quantiles(lag.high_ms for lag in lags),
        witnesses=witnesses,
    )


def quantiles(values: Iterable[float]) -> Quantiles:
    ordered = sorted(values)
    return Quantiles(*(quantile(ordered, q) for q in QUANTILES))


def render(result: Result, kept_at: str) -> str:
    """Put the result into words for a terminal."""
    parts = [
        _render_verdict(result),
        _render_latencies(result),
        _render_lag(result.lag),
        _render_cost(result),
        _render_guards(result.judged.guards),
        render_environment(result.environment),
        f"Command  {result.command}\nSeed     {result.workload.seed}\nResult   {kept_at}",
    ]
    return "\n\n".join(part for part in parts if part)


def _render_verdict(result: Result) -> str:
    lines = [f"{result.verdict} (exit {result.exit_code})"]
    lines += [f"  {reason}" for reason in result.judged.reasons]
    for each in result.judged.findings:
        mark = "holds" if each.passes else "fails" if each.fails else "open"
        lines.append(
            f"  {mark:5}  {each.name}: {each.lower:.2%} to {each.upper:.2%} good of {each.events},"
            f" target {each.target:.2%}"
        )
    audit = result.judged.audit
    if audit is not None:
        mark = "fails" if audit.is_broken else "open" if audit.unchecked else "holds"
        lines.append(
            f"  {mark:5}  audit: {audit.acked} orders acknowledged, {audit.missing} missing,"
            f" {audit.doubled} too many, {audit.unchecked} not checked"
        )
    return "\n".join(lines)


def _render_latencies(result: Result) -> str:
    if not result.latencies or result.rates is None:
        return ""
    rates, workload = result.rates, result.workload
    title = (
        f"{workload.arrivals.capitalize()} arrivals for {result.judged_s:.0f} s: per second"
        f" {rates.offered:.1f} offered, {rates.sent:.1f} sent, {rates.answered:.1f} answered,"
        f" {rates.failed:.1f} failed"
    )
    head = (
        f"{'milliseconds':22}{'n':>7}{'response p50':>14}{'p95':>9}{'p99':>9}"
        f"{'service p99':>13}{'lateness p99':>14}"
    )
    lines = [title, "", head]
    for each in result.latencies:
        response = each.response
        lines.append(
            f"{each.operation:22}{each.events:>7}{_ms(response.p50):>14}{_ms(response.p95):>9}"
            f"{_ms(response.p99):>9}{_ms(each.service.p99):>13}{_ms(each.lateness.p99):>14}"
        )
        odd = {name: n for name, n in each.outcomes.items() if name not in ("200", "201", "304")}
        if odd:
            lines.append(f"  {', '.join(f'{n} x {name}' for name, n in sorted(odd.items()))}")
    lines.append(
        "Response counts from the intended start, service from the sending; lateness is between."
    )
    lines.append(f"{READ_BACK} is held by the server until the order is visible.")
    if any(None in (each.response.p95, each.response.p99) for each in result.latencies):
        needs = ", ".join(f"p{q * 100:.0f} {quantile_events_min(q)}" for q in QUANTILES[1:])
        lines.append(f"- : too few events ({needs}).")
    return "\n".join(lines)


def _render_lag(lag: LagSummary | None) -> str:
    if lag is None or not lag.events:
        return ""
    spans = "   ".join(
        f"{name} {_ms(low)} to {_ms(high)}"
        for name, low, high in (
            ("p50", lag.low.p50, lag.high.p50),
            ("p95", lag.low.p95, lag.high.p95),
            ("p99", lag.low.p99, lag.high.p99),
        )
    )
    return (
        f"Projection lag, ms, at least to at most, n {lag.events}:   {spans}\n"
        f"{lag.unseen} not seen in time; {lag.witnesses} further reads sent to bound it from below."
    )


def _render_cost(result: Result) -> str:
    cost = result.cost
    if cost is None or result.rates is None or not result.requests:
        return ""
    head = f"CPU at {result.rates.offered:.0f} arrivals/s"
    lines = [f"{head:32}{'us/request':>12}{'us/order':>12}{'% of a core':>14}"]
    for role, seconds in sorted(cost.cpu_s.items(), key=lambda item: -item[1]):
        per_request = f"{seconds / result.requests * 1e6:.0f}"
        per_order = ""
        if role in ORDER_ROLES and result.orders:
            per_order = f"{seconds / result.orders * 1e6:.0f}"
        share = seconds / cost.elapsed_s
        lines.append(f"  {role:30}{per_request:>12}{per_order:>12}{share:>14.1%}")
    steal = cost.steal_s / cost.elapsed_s
    lines.append(f"  {'stolen by the hypervisor':54}{steal:>14.1%}")
    return "\n".join(lines)


def _render_guards(guards: Sequence[Guard]) -> str:
    if not guards:
        return ""
    shown = [
        f"{each.name} {'not measured' if each.value is None else format(each.value, '.3g')}"
        f"{'' if each.holds else f' (limit {each.limit:.3g})'}"
        for each in guards
    ]
    return wrap("Validity  ", ", ".join(shown))


def render_environment(environment: Environment | None) -> str:
    if environment is None:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in sorted(environment.postgres.items()))
    machine = (
        f"{environment.cores} cores, {environment.processor}, {environment.kernel},"
        f" Python {environment.python}; fsync {environment.fsync_ms:.2f} ms"
    )
    known = settings or "not known: durability was not checked"
    return f"{wrap('Machine   ', machine)}\n{wrap('Database  ', known)}"


def wrap(title: str, text: str) -> str:
    """Break a long line under its title."""
    return fill(text, WIDTH, initial_indent=title, subsequent_indent=" " * len(title))


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
