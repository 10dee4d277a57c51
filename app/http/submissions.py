"""Commands over HTTP: the headers that carry them, their bodies, and the answers."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from app.http.consistency import Timeline
from app.http.exchange import Exchange
from app.http.problems import CONTENT_TYPE, ParameterFault, ProblemError, unreadable
from app.http.replies import JSON, Headers, Reply
from app.metrics import Metrics, command_name
from app.telemetry import Tracing, traceparent_of
from commands.command import Command, Submission
from commands.executor import Answer, Executor, InProgress, OutcomeUnknown, Overloaded
from queries.freshness import POSTGRES_FAULTS

BODY_MAX: Final = 1024 * 1024  # bytes; 100 lines take 10 KB
BODY_TIMEOUT_S: Final = 10.0

T = TypeVar("T")

_HARMLESS: Final = frozenset({b"", b"charset=utf-8"})
_KEY: Final = re.compile(rb"[\x21-\x7e]{1,255}")
_ENTITY_TAG: Final = re.compile(rb'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')  # RFC 9110, 8.8.3
_VERSION: Final = re.compile(rb"v(\d{1,9})")


class Submissions:
    """Hands commands to the executor of their kind."""

    def __init__(
        self,
        executors: Mapping[type[Command], Executor[Any]],
        *,
        timeline: Timeline,
        tracing: Tracing,
        metrics: Metrics,
    ) -> None:
        self._executors = executors
        self._timeline = timeline
        self._tracing = tracing
        self._shed = metrics.shed.labels("queue")

    async def submit(
        self, exchange: Exchange, key: str, command: Command, *, expected_version: int | None = None
    ) -> Reply:
        """Run the command, and say what became of it.

        Raises:
            ProblemError: overloaded, idempotency-in-progress, outcome-unknown, unavailable.
        """
        executor = self._executors[type(command)]
        try:
            timeline = await self._timeline.number()
        except POSTGRES_FAULTS as error:
            raise ProblemError("unavailable", "PostgreSQL cannot be reached.") from error
        span = None
        traceparent = None
        if exchange.span is not None:
            name = command_name(type(command))
            span = self._tracing.child(exchange.span, f"command {name}", {"waybill.command": name})
            traceparent = traceparent_of(span)
        submission = Submission(
            command, exchange.principal, key, expected_version, traceparent, exchange.request_id
        )
        try:
            answer = await executor.submit(submission)
        except Overloaded as error:
            self._shed.inc()
            raise ProblemError("overloaded", "Too many commands wait.") from error
        except InProgress as error:
            detail = "The request that came first with this Idempotency-Key has not finished."
            raise ProblemError("idempotency-in-progress", detail) from error
        except OutcomeUnknown as error:
            detail = "The database was lost before it said whether the command was carried out."
            raise ProblemError("outcome-unknown", detail) from error
        finally:
            if span is not None:
                span.end()
        return _reply(answer, timeline)


def _reply(answer: Answer, timeline: int) -> Reply:
    headers: Headers = [
        JSON if answer.status < 400 else (b"content-type", CONTENT_TYPE),
        (b"cache-control", b"no-store"),
        (b"consistency-token", b"%d.%d" % (timeline, answer.xid)),
    ]
    if answer.etag is not None:
        headers.append((b"etag", answer.etag.encode()))
    if answer.location is not None:
        headers.append((b"location", answer.location.encode()))
    if answer.replayed:
        headers.append((b"idempotent-replayed", b"true"))
    return Reply(answer.status, headers, answer.body)


def idempotency_key(exchange: Exchange) -> str:
    """The request's Idempotency-Key.

    Raises:
        ProblemError: idempotency-key-missing, also for one that cannot be used.
    """
    key = exchange.headers.get(b"idempotency-key", b"")
    if not _KEY.fullmatch(key):
        detail = "Send an Idempotency-Key of 1 to 255 visible ASCII characters."
        fault = ParameterFault("Idempotency-Key", "invalid" if key else "missing", detail)
        raise ProblemError("idempotency-key-missing", detail, errors=[fault])
    return key.decode()


def expected_version(exchange: Exchange) -> int | None:
    """The version that If-Match asks for; None: any.

    Of several tags the newest counts: versions only rise, and whoever names an older one besides
    has seen that it is not current.

    Raises:
        ProblemError: precondition-failed, if no tag can ever match: a weak one, or not one of ours.
    """
    if_match = exchange.headers.get(b"if-match")
    if if_match is None or if_match.strip() == b"*":
        return None
    versions: list[int] = []
    for weak, tag in _ENTITY_TAG.findall(if_match):
        version = _VERSION.fullmatch(tag)
        if version is not None and not weak:  # RFC 9110, 13.1.1: strong comparison
            versions.append(int(version[1]))
    if not versions:
        raise ProblemError("precondition-failed", "If-Match names no version; a weak tag is none.")
    return max(versions)


async def decoded(exchange: Exchange, decoder: "msgspec.json.Decoder[T]") -> T:
    """The body as what is asked for.

    Raises:
        ProblemError: unsupported-media-type, payload-too-large, request-timeout, malformed-json,
            validation.
    """
    headers = exchange.headers
    content_type = headers.get(b"content-type", b"")
    if content_type != b"application/json" and not _is_json(content_type):
        raise ProblemError("unsupported-media-type", "Send the body as application/json.")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > BODY_MAX:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _received(exchange)
    except TimeoutError as error:
        detail = f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s."
        raise ProblemError("request-timeout", detail) from error
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError) as error:
        raise unreadable(error) from error


async def _received(exchange: Exchange) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await exchange.receive()
        if message["type"] != "http.request":
            raise ProblemError("malformed-json", "The body ended before it was complete.")
        part = message["body"]
        size += len(part)
        if size > BODY_MAX:
            raise _too_large()
        parts.append(part)
        if not message["more_body"]:
            return b"".join(parts)


def _is_json(content_type: bytes) -> bool:
    """RFC 8259, 11: the type has no parameters; `charset=utf-8` does no harm."""
    media_type, _, parameter = content_type.lower().replace(b'"', b"").partition(b";")
    return media_type.strip() == b"application/json" and parameter.strip() in _HARMLESS


def _too_large() -> ProblemError:
    return ProblemError("payload-too-large", f"A body holds at most {BODY_MAX} bytes.")
