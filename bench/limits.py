"""How near the service comes to what its parts can do, measured side by side in one run.

(a) a cached read with everything on, against one Litestar route and a raw ASGI app that answer with
the
    same bytes, on the same server program;
(b) orders over HTTP, everything on and the worker projecting, against pgbench with the same
transaction
    one at a time, in a database of equal size on the same PostgreSQL;
(c) commit-to-visible lag, with and without a stranger's open write transaction.

Arms take turns in short rounds, in alternating order, and what counts is the ratio within a round:
on a shared machine a figure of one minute says little about the next, while a ratio of neighbours
does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urlsplit

import msgspec
import psycopg
from msgspec import Struct

from bench import pgbench, visibility, wire
from bench.catalogue import CURRENCY, Preloaded, customer_id, order_id, sku
from bench.cost import Cost, Meter, cost_between, read_stack
from bench.dataset import Say, load, tidy
from bench.report import Quantiles, quantiles
from bench.requests import Requests
from bench.stack import NICENESS, ROOT, Stack, StackError, end_with_us, free_port, run_waybill

ROUNDS: Final = 3  # of each comparison; about 45 s a round
READ_CONNECTIONS: Final = 32
READ_S: Final = 1.5
READ_ORDERS: Final = 500  # different ones, all in the cache of the web process
ORDER_CONNECTIONS: Final = (1, 8, 32, 64)
ORDER_S: Final = 3  # whole seconds, as pgbench counts them
LAG_AT: Final = 32  # connections; half of what they get done is the load for the lag
LAG_S: Final = 5.0
START_S: Final = 10.0  # for a bare server to listen
DRAIN_S: Final = 20  # for the read models to catch up after a burst
POLL_S: Final = 0.05
ELSEWHERE_MAX: Final = 0.2  # cores; above it the scheduler decides who gets more done
BUSY: Final = (
    "Many processes get more of a busy machine than few,\n"
    "so here the ratios by CPU say more than those by rate."
)
SHOWN_US: Final = 1.0  # roles below this are left out
NOT_SERVING: Final = ("unattributed", "generator", "postgres waybill-bench")
TWIN: Final = "waybill_pgbench"
CREATE_TWIN: Final = "CREATE DATABASE waybill_pgbench"

# The goals of the design, as ratios and milliseconds.
READ_GOAL: Final = 0.7
ORDER_GOALS: Final[Mapping[int, float]] = {8: 1.0, 32: 1.5, 64: 1.5}
SUSTAINED_GOAL: Final = 1.2
LAG_GOALS_MS: Final = {"p50": 10.0, "p99": 50.0}


class Arm(Struct, frozen=True):
    """One arm in one round."""

    per_second: float
    generator_us: float  # CPU per request
    server_us: Mapping[str, float]  # CPU per request, by role
    elsewhere: float  # cores that others used meanwhile: what spoils the figures
    sustained_per_second: float = 0.0  # orders, with the time counted until all were visible


class Contest(Struct, frozen=True):
    """One arm against another, round by round."""

    title: str
    ours: Sequence[Arm]
    theirs: Sequence[Arm]
    ratios: Sequence[float]
    goal: float | None


class LagContest(Struct, frozen=True):
    """Commit to visible, alone and beside a stranger's open transaction."""

    orders_per_second: float
    alone_ms: Quantiles
    beside_ms: Quantiles
    alone: int
    beside: int
    unseen: int
    unanswered: int
    ratios: Sequence[float]  # of the medians, round by round


class Limits(Struct, frozen=True):
    """All that `limits` has measured."""

    contests: Sequence[Contest]
    lag: LagContest


class Limiter:
    """Measures one stack of our own."""

    def __init__(
        self, stack: Stack, preloaded: Preloaded, rounds: int, say: Say, show: Say
    ) -> None:
        self._stack = stack
        self._preloaded = preloaded
        self._rounds = rounds
        self._say = say
        self._show = show
        self._requests = Requests(stack.url, stack.api_key)
        self._random = Random(rounds)  # noqa: S311  reproducible on purpose
        self._orders = 0

    def measure(self) -> Limits:
        reads = self._compare_reads()
        orders, half = self._compare_orders()
        return Limits([*reads, *orders], self._compare_lags(half))

    def _compare_reads(self) -> Sequence[Contest]:
        """(a), the same orders again and again."""
        count = min(READ_ORDERS, self._preloaded.orders)
        requests = [
            self._requests.get(f"/v1/orders/{order_id(self._preloaded.orders - 1 - n)}")
            for n in range(count)
        ]
        # Each once: into the cache, and for the bytes that the others answer with.
        body = [wire.ask(self._stack.url, each, patience_s=START_S) for each in requests][-1].body
        with (
            bare_server("raw", body) as (raw_url, raw),
            bare_server("litestar", body) as (litestar_url, litestar),
            self._meter(bare=[raw.pid, litestar.pid]) as meter,
        ):
            arms: Mapping[str, Callable[[], Arm]] = {
                name: partial(self._read, url, requests, meter)
                for name, url in (
                    ("waybill", self._stack.url),
                    ("litestar", litestar_url),
                    ("raw", raw_url),
                )
            }
            results = self._take_turns("cached read", arms)
        return [
            contest("cached read / bare Litestar route", results, "waybill", "litestar", READ_GOAL),
            contest("cached read / raw ASGI app", results, "waybill", "raw", None),
        ]

    def _read(self, url: str, requests: Sequence[bytes], meter: Meter) -> Arm:
        turn = cycle(requests)
        before = meter.sample()
        done = wire.saturate(
            url,
            connections=READ_CONNECTIONS,
            seconds=READ_S,
            wanted=200,
            next_request=lambda: next(turn),
        )
        spent = cost_between(before, meter.sample())
        return make_arm(
            per_second=done.per_second,
            generator_us=done.generator_us,
            spent=spent,
            requests=done.requests,
        )

    def _compare_orders(self) -> tuple[Sequence[Contest], float]:
        """(b), at each number of connections; returns half of what LAG_AT got done, too."""
        twin_url = self._make_twin()
        arms: dict[str, Callable[[], Arm]] = {}
        with self._meter() as meter:
            for connections in ORDER_CONNECTIONS:
                arms[f"waybill {connections}"] = partial(self._order, connections, meter)
                arms[f"pgbench {connections}"] = partial(
                    self._pgbench, connections, twin_url, meter
                )
            results = self._take_turns("orders", arms)
        contests = [
            contest(
                f"orders over HTTP / pgbench, {connections} connections",
                results,
                f"waybill {connections}",
                f"pgbench {connections}",
                ORDER_GOALS.get(connections),
            )
            for connections in ORDER_CONNECTIONS
        ]
        ours, theirs = results[f"waybill {LAG_AT}"], results[f"pgbench {LAG_AT}"]
        contests.append(
            Contest(
                f"orders with all read models caught up / pgbench, {LAG_AT} connections",
                ours,
                theirs,
                [a.sustained_per_second / b.per_second for a, b in zip(ours, theirs, strict=True)],
                SUSTAINED_GOAL,
            )
        )
        return contests, median(arm.per_second for arm in ours) / 2

    def _make_twin(self) -> str:
        """Make the database that pgbench writes to: same server, same schema, same size."""
        url = self._stack.postgres_url
        with psycopg.connect(url, autocommit=True) as database:
            database.execute(CREATE_TWIN)
        twin_url = urlsplit(url)._replace(path=f"/{TWIN}").geturl()
        run_waybill(self._stack, "migrate", postgres_url=twin_url)
        load(twin_url, self._preloaded.orders, self._say, self._show)
        tidy(twin_url)
        return twin_url

    def _order(self, connections: int, meter: Meter) -> Arm:
        before = meter.sample()
        done = wire.saturate(
            self._stack.url,
            connections=connections,
            seconds=ORDER_S,
            wanted=201,
            next_request=self._next_order,
        )
        began = time.monotonic()
        self._drain(done.last)
        caught_up_s = time.monotonic() - began
        spent = cost_between(before, meter.sample())
        return make_arm(
            per_second=done.per_second,
            generator_us=done.generator_us,
            spent=spent,
            requests=done.requests,
            sustained_per_second=done.requests / (done.busy_s + caught_up_s),
        )

    def _drain(self, last: wire.Reply) -> None:
        """Wait until the last order is visible, so that the next arm has the machine to itself."""
        path = f"/v1/orders/{msgspec.json.decode(last.body)['order_id']}"
        token = wire.header(last, b"consistency-token")
        request = self._requests.get(path, token=token, wait_s=DRAIN_S)
        reply = wire.ask(self._stack.url, request, patience_s=2 * DRAIN_S)
        if reply.status != 200 or wire.header(reply, b"projection-lag") is not None:
            raise StackError(f"the read models did not catch up within {DRAIN_S} s")

    def _pgbench(self, connections: int, twin_url: str, meter: Meter) -> Arm:
        placed = pgbench.place_orders(
            twin_url, self._preloaded, connections=connections, seconds=ORDER_S, meter=meter
        )
        return make_arm(
            per_second=placed.per_second,
            generator_us=placed.client_us,
            spent=placed.cost,
            requests=placed.cost_orders,
        )

    def _next_order(self) -> bytes:
        """Build an order of three products, one of each third of the catalogue, as pgbench does."""
        self._orders += 1
        draw, third = self._random.randrange, self._preloaded.skus // 3
        lines = [{"sku": sku(part * third + draw(third)), "quantity": 1} for part in range(3)]
        customer = str(customer_id(draw(self._preloaded.customers)))
        body = {"customer_id": customer, "currency": CURRENCY, "lines": lines}
        return self._requests.post("/v1/orders", body, key=str(self._orders))

    def _compare_lags(self, rate: float) -> LagContest:
        """(c), at `rate` orders per second."""
        url = self._stack.postgres_url
        alone: list[visibility.Lagged] = []
        beside: list[visibility.Lagged] = []
        for number in range(self._rounds):
            arms: list[tuple[list[visibility.Lagged], AbstractContextManager[None]]] = [
                (alone, nullcontext()),
                (beside, visibility.stranger_writing(url)),
            ]
            for results, company in arms if number % 2 == 0 else reversed(arms):
                name = "alone" if results is alone else "beside a stranger's open transaction"
                self._say(f"lag: round {number + 1} of {self._rounds}, {name}")
                with company:
                    results.append(
                        visibility.measure(
                            self._stack.url,
                            url,
                            self._requests,
                            rate=rate,
                            seconds=LAG_S,
                            next_order=self._next_order,
                            seed=number,
                        )
                    )
        return LagContest(
            orders_per_second=rate,
            alone_ms=quantiles(lag for each in alone for lag in each.lags_ms),
            beside_ms=quantiles(lag for each in beside for lag in each.lags_ms),
            alone=sum(len(each.lags_ms) for each in alone),
            beside=sum(len(each.lags_ms) for each in beside),
            unseen=sum(each.unseen for each in (*alone, *beside)),
            unanswered=sum(each.unanswered for each in (*alone, *beside)),
            ratios=[
                median(b.lags_ms) / median(a.lags_ms) for a, b in zip(alone, beside, strict=True)
            ],
        )

    def _meter(self, **others: Sequence[int]) -> Meter:
        known = read_stack(self._stack.file)
        roots = {**known.pids, "generator": [os.getpid()], **others}
        return Meter(roots, known.postgres_url)

    def _take_turns(
        self, title: str, arms: Mapping[str, Callable[[], Arm]]
    ) -> Mapping[str, Sequence[Arm]]:
        """Run all arms in each round, in alternating order."""
        results: dict[str, list[Arm]] = {name: [] for name in arms}
        for number in range(self._rounds):
            names = list(arms)
            for name in names if number % 2 == 0 else reversed(names):
                self._say(f"{title}: round {number + 1} of {self._rounds}, {name}")
                results[name].append(arms[name]())
        return results


def contest(
    title: str, results: Mapping[str, Sequence[Arm]], ours: str, theirs: str, goal: float | None
) -> Contest:
    pairs = zip(results[ours], results[theirs], strict=True)
    ratios = [a.per_second / b.per_second for a, b in pairs]
    return Contest(title, results[ours], results[theirs], ratios, goal)


def make_arm(
    *,
    per_second: float,
    generator_us: float,
    spent: Cost,
    requests: float,
    sustained_per_second: float = 0.0,
) -> Arm:
    """Share the CPU that was `spent` among the `requests` of that time."""
    return Arm(
        per_second,
        generator_us,
        {
            role: seconds / requests * 1e6
            for role, seconds in spent.cpu_s.items()
            if role not in NOT_SERVING
        },
        spent.cpu_s["unattributed"] / spent.elapsed_s,
        sustained_per_second,
    )


@contextmanager
def bare_server(app: str, body: bytes) -> Generator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Serve `body` with one of the yardsticks, as nice as the service.

    Raises:
        StackError: it does not listen.
    """
    port = free_port()
    with TemporaryDirectory() as directory:
        file = Path(directory) / "body"
        file.write_bytes(body)
        server = subprocess.Popen(
            ["nice", "-n", str(NICENESS), sys.executable, "-m", "bench.bare", app, str(port), file],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_us,  # noqa: PLW1509  (no threads here)
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await_listening(url, server)
            yield url, server
        finally:
            server.terminate()
            server.wait(START_S)


def _await_listening(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            wire.ask(url, b"GET /v1/orders/1 HTTP/1.1\r\nHost: x\r\n\r\n", patience_s=START_S)
        except (OSError, TimeoutError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise StackError("a bare server did not start") from error
            time.sleep(POLL_S)
        else:
            return


def render(limits: Limits) -> str:
    """Put the figures into words for a terminal."""
    lines: list[str] = []
    for each in limits.contests:
        lines += [*_render_contest(each), ""]
    lag = limits.lag
    lines.append(f"Commit to visible at {lag.orders_per_second:.0f} orders/s, ms")
    for name, spread, count in (
        ("alone", lag.alone_ms, lag.alone),
        ("beside a stranger's open transaction", lag.beside_ms, lag.beside),
    ):
        found = zip(LAG_GOALS_MS.items(), (spread.p50, spread.p99), strict=True)
        shown = "   ".join(_render_quantile(name, value, goal) for (name, goal), value in found)
        lines.append(f"  {name:38} {shown}   n {count}")
    lines.append(f"  ratio of the medians {_spread(lag.ratios)}")
    if lag.unseen or lag.unanswered:
        lines.append(f"  {lag.unseen} not seen in time, {lag.unanswered} not placed")
    elsewhere = max(arm.elsewhere for each in limits.contests for arm in (*each.ours, *each.theirs))
    if elsewhere > ELSEWHERE_MAX:
        lines += ["", f"Others used up to {elsewhere:.1f} cores meanwhile. {BUSY}"]
    return "\n".join(lines)


def _render_contest(each: Contest) -> list[str]:
    middle = median(each.ratios)
    goal = "no goal" if each.goal is None else f"goal {each.goal:.1f}"
    verdict = "" if each.goal is None else ", reached" if middle >= each.goal else ", MISSED"
    lines = [f"{each.title}: {_spread(each.ratios)}   {goal}{verdict}"]
    totals: list[float] = []
    for name, arms in (("waybill", each.ours), ("against", each.theirs)):
        roles = {role for arm in arms for role in arm.server_us}
        cost_us = {role: median(arm.server_us.get(role, 0.0) for arm in arms) for role in roles}
        totals.append(sum(cost_us.values()))
        shown = ", ".join(
            f"{role} {us:.0f}"
            for role, us in sorted(cost_us.items(), key=lambda item: -item[1])
            if us >= SHOWN_US
        )
        lines.append(
            f"  {name} {median(arm.per_second for arm in arms):10,.0f}/s"
            f"   CPU {totals[-1]:.0f} us each ({shown})"
        )
        lines.append(
            f"{'':24}generator {median(arm.generator_us for arm in arms):.0f} us each;"
            f" others used {median(arm.elsewhere for arm in arms):.2f} cores"
        )
    lines.append(f"  by the server's CPU the ratio is {totals[1] / totals[0]:.2f}")
    return lines


def _render_quantile(name: str, value: float | None, goal_ms: float) -> str:
    if value is None:
        return f"{name} - (too few)"
    verdict = "reached" if value <= goal_ms else "MISSED"
    return f"{name} {value:.1f}, goal {goal_ms:.0f} {verdict}"


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"
