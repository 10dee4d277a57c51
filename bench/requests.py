"""Requests as the bytes that go over the wire, and the answers that come back.

Built by hand because a request is built for each arrival, on a core that the server may want: 1 us,
where geventhttpclient takes 9.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec

SAMPLED_EVERY: Final = 100  # one request in so many asks to be traced
_BAGGAGE: Final = "synthetic_request=true"  # lets operators leave load out of their own figures


class Answer(NamedTuple):
    """What a server said. Status 0: nothing, or nothing that fits the request."""

    status: int
    body: bytes = b""
    header: Callable[[str], str | None] = lambda _: None

    @property
    def is_behind(self) -> bool:
        """Whether the read says that it could not wait for the write it was asked about."""
        return self.header("Projection-Lag") is not None

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Requests:
    """Builds requests for one server and one key; every request has a trace id of its own."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url
        self.run = uuid4().hex[:16]  # tells this run's keys, names and traces from all others
        self._authority = urlsplit(url).netloc
        self._bearer = api_key
        self._count = 0

    def get(self, path: str, *, token: str | None = None, wait_s: int | None = None) -> bytes:
        """A read; with `token` of that write, and waiting for it up to `wait_s`."""
        headers = f"Consistency-Token: {token}\r\n" if token is not None else ""
        if wait_s is not None:
            headers += f"Prefer: wait={wait_s}\r\n"
        return f"{self._head('GET', path)}{headers}\r\n".encode()

    def post(self, path: str, body: Mapping[str, object], *, key: str) -> bytes:
        """A command; `key` is made unique to this run."""
        data = msgspec.json.encode(body)
        headers = (
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            f"Idempotency-Key: {self.run}-{key}\r\n\r\n"
        )
        return f"{self._head('POST', path)}{headers}".encode() + data

    def _head(self, method: str, path: str) -> str:
        self._count += 1
        sampled = "01" if self._count % SAMPLED_EVERY == 0 else "00"
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self._authority}\r\n"
            f"Authorization: Bearer {self._bearer}\r\n"
            f"traceparent: 00-{self.run}{self._count:016x}-{self._count:016x}-{sampled}\r\n"
            f"baggage: {_BAGGAGE}\r\n"
        )
