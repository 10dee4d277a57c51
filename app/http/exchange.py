"""One request on its way: what the edge has found out about it, and the send that it answers by."""

from collections.abc import Awaitable
from time import monotonic
from typing import Final, cast
from urllib.parse import quote

from litestar.types import Message, Receive, Scope, Send
from opentelemetry.trace import Span

from app.http.callers import Caller
from app.telemetry import trace_id_of
from commands.command import Principal

SCOPE_KEY: Final = "waybill"
CLOSE: Final = (b"connection", b"close")


class Exchange:
    """Made by the edge for each request; handlers find it with `exchange_of`."""

    __slots__ = (
        "_send",
        "caller",
        "headers",
        "is_last",
        "method",
        "path",
        "query",
        "receive",
        "request_id",
        "span",
        "status",
    )

    def __init__(
        self,
        method: str,
        path: str,
        query: bytes,
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
        request_id: str,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.receive = receive
        self.request_id = request_id
        self.caller: Caller | None = None
        self.span: Span | None = None
        self.status = 0  # until the answer begins
        self.is_last = False  # the connection is closed after it
        self._send = send

    @property
    def principal(self) -> Principal:
        """Who asks. Wherever a scope is needed there is somebody."""
        assert self.caller is not None
        return self.caller.principal

    @property
    def trace_id(self) -> str | None:
        """Of a sampled request."""
        return None if self.span is None else trace_id_of(self.span)

    @property
    def instance(self) -> str:
        """The path as a URI reference."""
        return quote(self.path, safe="/:@!$&'()*+,;=-._~", errors="replace")

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on; the first one gets the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self.request_id.encode())]
            if self.caller is not None:
                allowance = self.caller.allowance
                headers.append(allowance.policy)
                headers.append(allowance.header(monotonic()))
            if self.is_last:
                headers.append(CLOSE)
            message["headers"] = headers
        return self._send(message)


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of this request."""
    return cast("dict[str, Exchange]", scope)[SCOPE_KEY]


def path_parameter(scope: Scope, name: str) -> str:
    """A part of the path, percent-decoded."""
    return cast("dict[str, dict[str, str]]", scope)["path_params"][name]
