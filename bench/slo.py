"""The SLO file: what is offered, what counts as good, and when a run is not to be believed.

Unknown keys are errors that name the key. A `good` condition is not Python: it is clauses joined by
`and`, each one comparing a field with a number (see `parse_good`).
"""

import math
import operator
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, cast

import msgspec
from msgspec import Meta, Struct

BROWSE: Final = "browse_stock"
PLACE: Final = "place_order"
READ: Final = "read_order"
LIST_CUSTOMER: Final = "list_customer_orders"
LIST_STATUS: Final = "list_placed_orders"
READ_BACK: Final = "read_back"

PLANNED_OPERATIONS: Final = (BROWSE, PLACE, READ, LIST_CUSTOMER, LIST_STATUS)
"""What arrives by plan; an order that is read back follows its placement."""
OPERATIONS: Final = (*PLANNED_OPERATIONS, READ_BACK)

ARRIVALS_MAX: Final = 1_000_000  # of a run with all its extensions: about 200 MB of plan
AUDITED_MAX: Final = 50_000  # orders read back after a run: about 30 s at 1,700 reads/s

Good: TypeAlias = Callable[[int, float], bool]
"""Whether (HTTP status, milliseconds) is a good event."""

Seconds = Annotated[str, Meta(pattern=r"^\d+(\.\d+)?(ms|s|m)$")]
Ratio = Annotated[float, Meta(gt=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]

AUDIT_GOOD: Final = "acked_exactly_once"
_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0}


class SloError(Exception):
    """The SLO file cannot be used: one line that names the key."""


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file, closed to keys that nobody reads."""


class Workload(Section, frozen=True, kw_only=True):
    """What is offered, and for how long."""

    arrivals: Literal["poisson", "uniform"] = "poisson"
    rate: Positive  # arrivals per second, whole mix
    duration: Seconds
    max_duration: Seconds  # the run is extended up to this while the verdict is INCONCLUSIVE
    warmup: Seconds  # recorded, not judged
    seed: int
    timeout: Seconds  # per request; a request that takes longer is a bad event
    in_flight_max: Annotated[int, Meta(gt=0)]
    mix: dict[str, Annotated[float, Meta(ge=0)]]  # operation: weight

    def __post_init__(self) -> None:
        unknown = sorted(self.mix.keys() - set(PLANNED_OPERATIONS))
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r} in mix; {PLANNED_OPERATIONS}")
        if not sum(self.mix.values()):
            raise ValueError("the mix is empty")
        if not seconds(self.warmup) < seconds(self.duration) <= seconds(self.max_duration):
            raise ValueError("needs warmup < duration <= max_duration")

    @property
    def order_rate(self) -> float:
        """Orders placed per second."""
        return self.rate * self.mix.get(PLACE, 0) / sum(self.mix.values())


class Probe(Section, frozen=True, kw_only=True):
    """How projection lag is probed."""

    sample: Ratio  # share of the placed orders that are read back
    method: Literal["wait"]  # one read that the server holds until the write is visible
    timeout: Seconds  # the wait asked for; whole seconds (RFC 7240)

    def __post_init__(self) -> None:
        if seconds(self.timeout) % 1 or seconds(self.timeout) < 1:
            raise ValueError("probe.timeout must be whole seconds (RFC 7240, wait)")


class Objective(Section, frozen=True, kw_only=True):
    """One promise: at least `target` of its events are good, with `confidence`."""

    name: Annotated[str, Meta(min_length=1)]
    sli: Literal["request", "projection_lag", "audit"] = "request"
    events: tuple[str, ...] = ()
    scope: Literal["each", "all"] = "each"  # each operation must pass, or all of them pooled
    probe: Probe | None = None
    good: str
    target: Ratio
    confidence: Annotated[float, Meta(gt=0.5, lt=1)] = 0.95

    def __post_init__(self) -> None:
        match self.sli:
            case "request":
                unknown = sorted(set(self.events) - set(OPERATIONS))
                if unknown:
                    raise ValueError(f"unknown operation {unknown[0]!r} in events; {OPERATIONS}")
                if not self.events:
                    raise ValueError("events is missing")
                parse_good(self.good, latency="response_ms")
            case "projection_lag":
                if self.probe is None:
                    raise ValueError("probe is missing")
                parse_good(self.good, latency="lag_high_ms")
            case "audit":
                if self.good != AUDIT_GOOD or self.target != 1:
                    raise ValueError(f"an audit has good = {AUDIT_GOOD!r} and target = 1.0")
        if self.sli != "audit" and self.target == 1:
            raise ValueError("a target of 1.0 can never be shown by a sample; only an audit has it")

    @property
    def events_min(self) -> int:
        """Fewest events, all of them good, that show `target` with `confidence`."""
        return math.ceil(math.log(1 - self.confidence) / math.log(self.target))


class Validity(Section, frozen=True, kw_only=True):
    """When a run is not to be believed. CPU figures are shares of 1."""

    lateness_p99_ms: Positive  # about 10 % of the tightest threshold; blocks FAIL, not PASS
    min_sent_ratio: Ratio
    conservation: Literal[True]  # sent == done + failed + cancelled; cannot be switched off
    littles_law_error: Ratio
    generator_cpu: Ratio  # of one core
    cpu_pressure_avg10: Annotated[float, Meta(gt=0, le=100)]  # percent, PSI "some", worst 10 s
    steal: Ratio
    clock_step_ms: Positive  # between wall clock and monotonic clock, within one second


class Slo(Section, frozen=True, kw_only=True):
    """The whole file."""

    schema: Literal[1]
    service: str
    workload: Workload
    slo: Annotated[tuple[Objective, ...], Meta(min_length=1)]
    validity: Validity

    def __post_init__(self) -> None:
        names = [objective.name for objective in self.slo]
        if len(set(names)) != len(names):
            raise ValueError("two [[slo]] share a name")
        if sum(objective.probe is not None for objective in self.slo) > 1:
            raise ValueError("only one [[slo]] can have a probe")
        workload = self.workload
        needed = math.ceil(workload.rate * self.held_s)
        if workload.in_flight_max < needed:
            raise ValueError(
                f"in_flight_max is {workload.in_flight_max}, below rate x (timeout + probe"
                f" timeout) = {needed}: a dropped arrival might not be the server's fault"
            )
        longest_s = seconds(workload.max_duration)
        if workload.rate * longest_s > ARRIVALS_MAX:
            raise ValueError(f"more than {ARRIVALS_MAX} arrivals in max_duration")
        if workload.order_rate * longest_s > AUDITED_MAX:
            raise ValueError(
                f"more than {AUDITED_MAX} orders in max_duration; none would audit all"
            )

    @property
    def held_s(self) -> float:
        """Longest time that an arrival can be under way."""
        return seconds(self.workload.timeout) + (seconds(self.probe.timeout) if self.probe else 0)

    @property
    def probe(self) -> Probe | None:
        """How lag is probed, if any objective asks for it."""
        return next((each.probe for each in self.slo if each.probe is not None), None)


def seconds(text: str) -> float:
    """`120s`, `2m`, `250ms` as seconds; the text has matched `Seconds`."""
    number, unit = re.fullmatch(r"([\d.]+)(ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * _UNIT_S[unit]


def load_slo(
    path: Path,
    *,
    rate: float | None = None,
    duration_s: float | None = None,
    seed: int | None = None,
) -> Slo:
    """Read the file; what is given besides replaces a value of [workload].

    A `duration_s` above `max_duration` replaces that too.

    Raises:
        SloError: the file is not there, is not TOML, or breaks the schema.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        workload = tables.get("workload")
        if isinstance(workload, dict):
            _replace(cast("dict[str, object]", workload), rate, duration_s, seed)
        return msgspec.convert(tables, Slo)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise SloError(f"{path}: {error}") from error


def _replace(
    workload: dict[str, object], rate: float | None, duration_s: float | None, seed: int | None
) -> None:
    if rate is not None:
        workload["rate"] = rate
    if seed is not None:
        workload["seed"] = seed
    if duration_s is not None:
        workload["duration"] = f"{duration_s:.3f}s"
        longest = workload.get("max_duration")
        if isinstance(longest, str) and seconds(longest) < duration_s:
            workload["max_duration"] = workload["duration"]


_CLAUSE: Final = re.compile(r"\s*(\w+)\s*(<=|>=|==|<|>)\s*([\d.]+)\s*")
_STATUS_IN: Final = re.compile(r"\s*status\s+in\s+\(([\d\s,]+)\)\s*")
_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def parse_good(text: str, *, latency: str) -> Good:
    """Compile a condition.

        good   = clause { "and" clause }
        clause = "status" ( "<" | "<=" | "==" | ">=" | ">" ) number
               | "status" "in" "(" number { "," number } ")"
               | latency ( "<" | "<=" ) number

    `latency` is the name of the latency field. It has an upper bound only: the verdict judges PASS
    on the longest and FAIL on the shortest latency that an event can have had, and that needs a
    condition which no longer latency can make true.

    Raises:
        ValueError: the text is not of this grammar.
    """
    clauses = [_parse_clause(each, latency) for each in re.split(r"\band\b", text)]
    return lambda status, latency_ms: all(clause(status, latency_ms) for clause in clauses)


def _parse_clause(text: str, latency: str) -> Good:
    if found := _STATUS_IN.fullmatch(text):
        statuses = frozenset(int(each) for each in found[1].split(","))
        return lambda status, _: status in statuses
    if found := _CLAUSE.fullmatch(text):
        field, sign, bound = found[1], _COMPARE[found[2]], float(found[3])
        if field == "status":
            return lambda status, _: sign(status, bound)
        if field == latency and found[2] in ("<", "<="):
            return lambda _, latency_ms: sign(latency_ms, bound)
    raise ValueError(f"cannot read {text.strip()!r} in a condition on status and {latency}")
