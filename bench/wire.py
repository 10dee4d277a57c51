"""A cheap HTTP client for comparisons: ready-made bytes out, next to no parsing in.

Closed loop on purpose: what is compared is how much work servers get done, not how long users wait,
so N connections ask again as soon as they are answered. Never use it for a latency promise. Needs
answers with a Content-Length.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias, cast
from urllib.parse import urlsplit

import uvloop
from msgspec import Struct

WARMUP_S: Final = 0.4  # of each measurement, not counted
PATIENCE_S: Final = 10.0  # for connecting, and for the last answers
SETTLE_POLL_S: Final = 0.002


class WireError(Exception):
    """The server does not speak as expected, or went away."""


class Reply(NamedTuple):
    """One answer. Times are time.monotonic()."""

    status: int
    head: bytes
    body: bytes
    sent: float
    received: float


class Connection(asyncio.Protocol):
    """One kept-alive connection with one request under way at most."""

    def __init__(self, on_reply: "OnReply") -> None:
        self.on_reply = on_reply
        self.sent = 0.0
        self.is_busy = False
        self._transport: asyncio.Transport | None = None
        self._received: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports only look like asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> None:
        assert self._transport is not None
        self.is_busy = True
        self.sent = time.monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _content_length(data[:end]):
            self._received = data
            return
        self._received = b""
        self.is_busy = False
        reply = Reply(int(data[9:12]), data[:end], data[end + 4 :], self.sent, time.monotonic())
        self.on_reply(self, reply)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


OnReply: TypeAlias = Callable[[Connection, Reply], None]


class Throughput(Struct, frozen=True):
    """What a closed loop got done."""

    per_second: float  # in the seconds that count
    generator_us: float  # CPU of this process per request
    requests: int  # all of them, warm-up included
    busy_s: float  # from the first request to the last answer
    last: Reply


def header(reply: Reply, name: bytes) -> str | None:
    """Return a header of the answer; `name` in lower case."""
    for line in reply.head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().decode()
    return None


def _content_length(head: bytes) -> int:
    begin = head.find(b"content-length: ")
    if begin < 0:
        begin = head.lower().find(b"content-length: ")
        if begin < 0:
            raise WireError("an answer without Content-Length")
    end = head.find(b"\r\n", begin)
    return int(head[begin + 16 : end if end >= 0 else None])


async def connect(url: str, count: int, on_reply: OnReply) -> Sequence[Connection]:
    """Open `count` connections.

    Raises:
        OSError, TimeoutError: the server does not listen.
    """
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        opened = [
            await loop.create_connection(
                lambda: Connection(on_reply), parts.hostname or "", parts.port or 80
            )
            for _ in range(count)
        ]
    return [connection for _, connection in opened]


def ask(url: str, request: bytes, *, patience_s: float) -> Reply:
    """Send one request.

    Raises:
        OSError, TimeoutError: the server does not listen, or did not answer within `patience_s`.
    """
    return uvloop.run(_ask(url, request, patience_s))


async def _ask(url: str, request: bytes, patience_s: float) -> Reply:
    answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    (connection,) = await connect(url, 1, lambda _, reply: answered.set_result(reply))
    try:
        connection.ask(request)
        async with asyncio.timeout(patience_s):
            return await answered
    finally:
        connection.close()


def saturate(
    url: str,
    *,
    connections: int,
    seconds: float,
    wanted: int,
    next_request: Callable[[], bytes],
) -> Throughput:
    """Keep `connections` busy for WARMUP_S and then `seconds`, which alone count.

    Raises:
        WireError: an answer was not as wanted, or there was none.
        OSError, TimeoutError: the server does not listen, or a connection broke.
    """
    return uvloop.run(_saturate(url, connections, seconds, wanted, next_request))


async def _saturate(
    url: str,
    connections: int,
    seconds: float,
    wanted: int,
    next_request: Callable[[], bytes],
) -> Throughput:
    loop = ClosedLoop(wanted, next_request)
    opened = await connect(url, connections, loop.on_reply)
    try:
        first_sent = time.monotonic()
        for connection in opened:
            connection.ask(next_request())
        await asyncio.sleep(WARMUP_S)
        began, cpu_began = time.monotonic(), time.process_time()
        done, refused = loop.done, loop.refused
        await asyncio.sleep(seconds)
        elapsed_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
        done, refused = loop.done - done, loop.refused - refused
        loop.is_over = True
        async with asyncio.timeout(PATIENCE_S):
            # A look now and then is free; an event would cost every answer.
            while any(connection.is_busy for connection in opened):  # noqa: ASYNC110
                await asyncio.sleep(SETTLE_POLL_S)
    finally:
        for connection in opened:
            connection.close()
    if not done or refused or loop.last is None:
        raise WireError(f"{done} answers as wanted, {refused} not; the last: {loop.last}")
    return Throughput(
        per_second=done / elapsed_s,
        generator_us=cpu_s / done * 1e6,
        requests=loop.done,
        busy_s=loop.last.received - first_sent,
        last=loop.last,
    )


class ClosedLoop:
    """Asks again on every connection as soon as it is answered."""

    def __init__(self, wanted: int, next_request: Callable[[], bytes]) -> None:
        self.done = 0
        self.refused = 0
        self.is_over = False
        self.last: Reply | None = None
        self._wanted = wanted
        self._next_request = next_request

    def on_reply(self, connection: Connection, reply: Reply) -> None:
        if reply.status == self._wanted:
            self.done += 1
        else:
            self.refused += 1
        self.last = reply
        if not self.is_over:
            connection.ask(self._next_request())
