"""The outer edge: what happens to each request before Litestar routes it, and after it is answered.

In this order: shed what is too much, name the request, decide whether it is traced, find out who
asks, spend one request of the key's quota; then the app; then count, and log what is worth a line.
None of it waits for a request with a known key and a share in hand.
"""

import logging
import re
from collections.abc import Iterable
from time import monotonic
from typing import Any, Final, cast

import structlog
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bind_contextvars
from uuid_utils import uuid7

from app.http.callers import Callers
from app.http.exchange import SCOPE_KEY, Exchange
from app.http.limiter import Limiter
from app.http.problems import CONTENT_TYPE, ProblemError
from app.http.replies import Reply
from app.metrics import Metrics
from app.telemetry import Tracing, finish

IN_FLIGHT_MAX: Final = 2048  # requests per process; each holds some 10 KB while it waits
SLOW_S: Final = 1.0
NO_ANSWER: Final = 499  # the label of a request whose client left before the answer began

UNMATCHED: Final = "unmatched"  # the route of what no route took: one label, whatever the path
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD: Final = "_OTHER"  # as the semantic conventions for HTTP have it
READS: Final = frozenset({"GET", "HEAD"})

# Everything else needs a key.
OPEN_PATHS: Final = frozenset({"/health/live", "/health/ready", "/openapi.json", "/docs"})
OPEN_FOLDER: Final = "/problems/"

# What ids are made of; no blank and no control character, so a log line stays one.
SANE_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._~:=+/@-]{1,128}")

log = structlog.stdlib.get_logger("waybill.http")


class Edge:
    """An ASGI app around the app. `is_draining` is set when the process is about to stop."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        callers: Callers,
        limiter: Limiter,
        tracing: Tracing,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._callers = callers
        self._limiter = limiter
        self._tracing = tracing
        self._metrics = metrics
        self._in_flight = 0
        self._lines = Lines()
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request; the lifespan is the app's business."""
        http = cast("dict[str, Any]", scope)
        if http["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = monotonic()
        exchange = _begin(http, receive, send)
        code = ""
        self._in_flight += 1
        try:
            await self._serve(http, exchange, began_s)
        except Exception as error:
            if exchange.status:
                raise  # half an answer is on its way: the server cuts the connection
            problem = _problem(error)
            code = problem.code
            if code == "internal":
                log.exception("bug", path=exchange.path, request_id=exchange.request_id)
            await _send_problem(problem, exchange)
        finally:
            self._in_flight -= 1
            self._account(http, exchange, code, monotonic() - began_s)

    async def _serve(self, scope: dict[str, Any], exchange: Exchange, began_s: float) -> None:
        path = scope["path"]
        headers = exchange.headers
        needs_key = not (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))
        if self._in_flight > IN_FLIGHT_MAX and needs_key:
            self._metrics.shed.labels("process").inc()
            raise ProblemError("overloaded", "Too many requests are being worked on.")
        exchange.is_last = self.is_draining
        if b"traceparent" in headers or self._tracing.by_chance():
            exchange.span = self._tracing.begin(scope, headers)
        bind_contextvars(request_id=exchange.request_id, trace_id=exchange.trace_id)
        if needs_key:
            authorization = headers.get(b"authorization", b"")
            caller = self._callers.at_hand(authorization, began_s)
            if caller is None:
                caller = await self._callers.identify(authorization)
            exchange.caller = caller
            allowance = caller.allowance
            if began_s < allowance.ends_at_s and allowance.tokens > allowance.low:
                allowance.tokens -= 1
            else:
                await self._limiter.spend(allowance, is_read=exchange.method in READS)
        if exchange.method == "HEAD":  # RFC 9110, 9.3.2: a GET whose body the server leaves out
            scope["method"] = "GET"
        await self._app(cast("Scope", scope), exchange.receive, exchange.send)

    def _account(
        self, scope: dict[str, Any], exchange: Exchange, code: str, seconds: float
    ) -> None:
        """Count it, end its span, and log it if it failed, was slow, refused or traced."""
        route = scope.get("path_template", UNMATCHED)
        method = exchange.method if exchange.method in METHODS else OTHER_METHOD
        status = exchange.status or NO_ANSWER
        self._metrics.observe(route, method, status, seconds)
        span = exchange.span
        if span is None and status < 429 and seconds < SLOW_S:
            return
        if code == "rate-limited":
            self._metrics.limited.inc()
        if span is not None:
            finish(span, method=method, route=route, status=status)
        unsaid = 0 if span is not None else self._lines.unsaid(code or str(status // 100))
        if unsaid is not None:
            caller = exchange.caller
            log.log(
                logging.ERROR if status == 500 else logging.INFO,
                "request",
                method=method,
                route=route,
                status=status,
                code=code or None,
                ms=round(1000 * seconds, 1),
                owner=None if caller is None else caller.principal.owner,
                unsaid=unsaid,
            )


class Lines:
    """Which of many like requests get a line: one per kind and second; it says how many did not."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, int]] = {}  # kind: second of its last line, unsaid since

    def unsaid(self, kind: str) -> int | None:
        """How many of this kind had no line since the last one; None: nor has this one."""
        second = int(monotonic())
        last, unsaid = self._said.get(kind, (-1, 0))
        if second == last:
            self._said[kind] = (last, unsaid + 1)
            return None
        self._said[kind] = (second, 0)
        return unsaid


def _begin(scope: dict[str, Any], receive: Receive, send: Send) -> Exchange:
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
    headers = dict(pairs)
    if len(headers) != len(pairs):
        headers = _combined(pairs)
    given = headers.get(b"x-request-id")
    if given is not None and SANE_REQUEST_ID.fullmatch(given):
        request_id = given.decode()
    else:
        request_id = str(uuid7())
    exchange = Exchange(
        scope["method"], scope["path"], scope["query_string"], headers, receive, send, request_id
    )
    scope[SCOPE_KEY] = exchange
    return exchange


def _combined(pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Lines of one field are one list (RFC 9110, 5.3); two keys or tokens become a wrong one."""
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _problem(error: Exception) -> ProblemError:
    """The problem that ends a request: a handler's own, Litestar's, or a bug."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, NotFoundException):
        return ProblemError("not-found", "There is nothing at this path.")
    if isinstance(error, MethodNotAllowedException):
        return method_not_allowed((error.headers or {}).get("allow", ""))
    if isinstance(error, HTTPException) and error.status_code < 500:
        return ProblemError("invalid-parameter", "The request's headers cannot be used.")
    return ProblemError("internal", "Something went wrong on our side.")


def method_not_allowed(handled: str) -> ProblemError:
    """`handled` are the methods of the route as Litestar counts them, which adds OPTIONS."""
    methods = {method.strip() for method in handled.split(",")} - {"OPTIONS", ""}
    if "GET" in methods:
        methods.add("HEAD")
    allow = ", ".join(sorted(methods))
    return ProblemError(
        "method-not-allowed", f"This path takes {allow}.", headers=[(b"allow", allow.encode())]
    )


async def _send_problem(problem: ProblemError, exchange: Exchange) -> None:
    body = problem.document(
        instance=exchange.instance, request_id=exchange.request_id, trace_id=exchange.trace_id
    )
    headers = [(b"content-type", CONTENT_TYPE), (b"cache-control", b"no-store"), *problem.headers]
    await Reply(problem.status, headers, body).send(exchange.send)
