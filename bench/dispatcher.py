"""The open-model Locust user: one greenlet that sends each arrival at its time, come what may.

Locust's own wait times start counting after an answer, so a server that stalls is asked less, and
the stall hides. Here every arrival is a greenlet of its own, spawned when it is due; none waits for
another.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar, Final, NamedTuple, Protocol, TypeAlias, cast
from urllib.parse import urlsplit

import gevent
from gevent.pool import Group, Pool
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse
from locust import User, constant, task
from locust.exception import StopUser

from bench.lag import WITNESS_FIRST_S, Lags, Sighting
from bench.plan import Arrival
from bench.recorder import BROKEN, CANCELLED, OUTCOME_NAMES, TIMED_OUT, WRONG, Recorder
from bench.requests import Answer
from bench.scenario import Shopper, Step, Story
from bench.timer import make_timer

CONNECT_TIMEOUT_S: Final = 2.0
BEAT_S: Final = 0.01  # how often the number in flight is looked at
ASK_ALL_MAX: Final = 16  # requests at a time outside of the run: set-up and audit

Greenlet: TypeAlias = "gevent.Greenlet[..., object]"
OnRequest = Callable[[str, float, int, Exception | None], None]
"""Told of each request: operation, response time in ms, bytes of the body, error."""


class Exchange(NamedTuple):
    """A request and its answer, on time.monotonic()."""

    answer: Answer
    start: float
    end: float


class Client:
    """Sends raw requests over a shared pool of kept-alive connections; repeats none of them."""

    def __init__(self, url: str, *, connections: int, timeout_s: float) -> None:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        pool = SSLConnectionPool if parts.scheme == "https" else ConnectionPool
        host = parts.hostname or ""
        self._timeout_s = timeout_s
        self._connections = pool(
            host,
            port,
            host,
            port,
            size=connections,
            connection_timeout=CONNECT_TIMEOUT_S,
        )

    def ask(self, request: bytes, *, wait_s: float = 0) -> Answer:
        """Send one request, which the server may hold for `wait_s`, and read the whole answer.

        Raises:
            TimeoutError: nothing came for `timeout_s` and `wait_s`.
            OSError: no connection, or it broke.
            HTTPParseError: what came is not HTTP, or the connection was closed.
        """
        socket = self._connections.get_socket()
        try:
            socket.settimeout(self._timeout_s + wait_s)
            socket.sendall(request)
        except BaseException:
            self._connections.release_socket(socket)
            raise
        response = HTTPSocketPoolResponse(socket, self._connections)
        body = response.read()
        return Answer(response.get_code(), body, partial(_header, response))

    def ask_all(self, requests: Iterable[bytes]) -> Sequence[Answer]:
        """Send requests, ASK_ALL_MAX at a time; an answer of status 0 where there was none."""
        answers: Sequence[Answer] = Pool(ASK_ALL_MAX).map(self.try_to_ask, requests)
        return answers

    def try_to_ask(self, request: bytes) -> Answer:
        try:
            return self.ask(request)
        except (OSError, HTTPParseError):
            return Answer(0)

    def close(self) -> None:
        self._connections.close()


class Dispatcher:
    """Sends arrivals at their times and records what becomes of them."""

    def __init__(
        self,
        client: Client,
        shopper: Shopper,
        *,
        in_flight_max: int,
        on_request: OnRequest,
    ) -> None:
        self.recorder = Recorder()
        self.lags = Lags()
        self.in_flight = 0
        self.beats: list[tuple[float, int]] = []  # (time, in flight)
        self.beat_gaps_ms: list[float] = []
        self._crashes: list[Exception] = []
        self._client = client
        self._shopper = shopper
        self._on_request = on_request
        self._visits = Pool(in_flight_max)
        self._witnesses = Group()

    def drive(self, arrivals: Sequence[Arrival], started: float) -> None:
        """Send `arrivals`, due from `started` on time.monotonic(); returns when all are sent.

        Raises:
            Exception: what a story has raised; the rest is not sent.
        """
        self.recorder.planned += len(arrivals)
        beat = cast("Greenlet", gevent.spawn(self._beat))
        timer = make_timer()
        try:
            for arrival in arrivals:
                due = started + arrival.due_s
                timer.wait_until(due)
                self._raise_crash()
                self.recorder.arrived += 1
                if self._visits.free_count() <= 0:  # Pool.spawn would wait: a closed model again
                    self.recorder.drop(arrival.operation, due)
                    continue
                self.recorder.sent += 1
                self._visits.spawn(self._visit, arrival, due)
        finally:
            timer.close()
            beat.kill()

    def drain(self, timeout_s: float) -> None:
        """Wait for the answers, and cancel what is still in flight after `timeout_s`.

        Raises:
            Exception: what a story has raised.
        """
        self._visits.join(timeout=timeout_s)
        self._visits.kill()
        self._witnesses.kill()
        self._raise_crash()

    def _raise_crash(self) -> None:
        if self._crashes:
            raise self._crashes[0]

    def _beat(self) -> None:
        while True:
            slept_at = time.monotonic()
            gevent.sleep(BEAT_S)
            now = time.monotonic()
            self.beats.append((now, self.in_flight))
            self.beat_gaps_ms.append((now - slept_at - BEAT_S) * 1000)

    def _visit(self, arrival: Arrival, due: float) -> None:
        """Play one story. What it raises is a bug of ours, and ends the run."""
        try:
            story = self._shopper.story_of(arrival)
            exchange = self._perform(next(story), due)
            while (step := _next(story, exchange.answer)) is not None:
                self.recorder.sent += 1
                if step.witness:
                    exchange = self._look_for(step, exchange, due)
                else:
                    exchange = self._perform(step, exchange.end)
        except Exception as crash:  # noqa: BLE001  raised by `drive` and `drain`, where it is seen
            self._crashes.append(crash)

    def _perform(self, step: Step, due: float) -> Exchange:
        """Send one step; records it whatever happens, a killed greenlet included."""
        answer, outcome = Answer(0), CANCELLED
        error: Exception | None = None
        self.in_flight += 1
        start = time.monotonic()
        try:
            answer = self._client.ask(step.request, wait_s=step.wait_s)
            fits = answer.status >= 300 or step.holds in answer.body
            outcome = answer.status if fits else WRONG
        except TimeoutError as timeout:
            outcome, error = TIMED_OUT, timeout
        except (OSError, HTTPParseError) as broken:
            outcome, error = BROKEN, broken
        finally:
            end = time.monotonic()
            self.in_flight -= 1
            self.recorder.finish(step.operation, due, start, end, outcome)
        if error is None and not 200 <= outcome < 400:
            error = ValueError(OUTCOME_NAMES.get(outcome, f"status {outcome}"))
        self._on_request(step.operation, (end - due) * 1000, len(answer.body), error)
        return Exchange(answer, start, end)

    def _look_for(self, step: Step, placed: Exchange, due: float) -> Exchange:
        """Read a write back with a read that is held, and with witnesses while it is.

        `due` is when the order was due: its lag is judged with its block.
        """
        sighting = Sighting(sent=placed.start, acked=placed.end)
        witness = cast(
            "Greenlet", gevent.spawn_later(WITNESS_FIRST_S, self._witness, step, sighting)
        )
        self._witnesses.add(witness)
        exchange = self._perform(step, placed.end)
        if _shows(exchange.answer, step):
            sighting.seen(exchange.end)
        elif _is_blind(exchange.answer):
            sighting.blind(exchange.start)
        sighting.is_over = True
        self.lags.add(due, sighting)
        return exchange

    def _witness(self, step: Step, sighting: Sighting) -> None:
        for moment in sighting.witness_times():
            gevent.sleep(max(0.0, moment - time.monotonic()))
            if sighting.is_over:
                return
            sent = time.monotonic()
            answer = self._client.try_to_ask(step.witness)
            self.lags.witnesses += 1
            if _shows(answer, step):
                sighting.seen(time.monotonic())
                return
            if _is_blind(answer):
                sighting.blind(sent)


def _header(response: HTTPSocketPoolResponse, name: str) -> str | None:
    value = response.get(name)
    return value if isinstance(value, str) else None  # a list where it came twice


def _next(story: Story, answer: Answer) -> Step | None:
    try:
        return story.send(answer)
    except StopIteration:
        return None


def _shows(answer: Answer, step: Step) -> bool:
    return answer.status == 200 and not answer.is_behind and step.holds in answer.body


def _is_blind(answer: Answer) -> bool:
    """Whether this answer proves that the write was not visible; an error proves nothing."""
    return answer.status == 404 or answer.is_behind


class Plan(Protocol):
    """What the one user does."""

    def drive(self) -> None: ...


class OpenModel(User):
    """The one user: it drives the plan once, and is done."""

    fixed_count = 1  # whatever number of users is asked for
    wait_time = constant(0)
    plan: ClassVar[Plan]  # set by the locustfile at the start of each run

    @task
    def drive(self) -> None:
        self.plan.drive()
        raise StopUser
