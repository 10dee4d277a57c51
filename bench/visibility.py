"""Commit to visible, tightly: orders at a given rate, some read back, and their commit times.

Both ends are on one clock, so the lag is at most what is measured here, and less by the way back of
the read's answer. Needs `track_commit_timestamp` and a database on this machine.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Final

import msgspec
import psycopg
import uvloop
from msgspec import Struct

from bench.requests import Requests
from bench.wire import Connection, Reply, WireError, connect, header

CONNECTIONS: Final = 256  # at 1,000 orders/s of 10 ms, 10 are busy
PROBES_PER_S: Final = 150  # orders read back; more would be load of its own
WAIT_S: Final = 5  # the server may hold a read so long

# $1 text[]: transaction ids. Rows: one per id, in any order.
COMMIT_TIMES: Final = """
SELECT asked.xid, extract(epoch FROM pg_xact_commit_timestamp(asked.xid::xid8::xid))::float8
FROM unnest($1::text[]) AS asked (xid)
"""
OPEN_A_WRITE: Final = "CREATE TEMPORARY TABLE stranger AS SELECT pg_current_xact_id()::text AS xid"

OnWall = Callable[[], float]


class Seen(Struct, frozen=True):
    """An order that was read back."""

    xid: str
    received_at: float  # time.time(), when the read that shows it was there


class Lagged(Struct, frozen=True):
    """One stretch of orders."""

    offered: int
    unanswered: int  # no idle connection, or an answer that was no order
    unseen: int  # not shown within WAIT_S
    lags_ms: Sequence[float]


def measure(
    url: str,
    postgres_url: str,
    requests: Requests,
    *,
    rate: float,
    seconds: float,
    next_order: Callable[[], bytes],
    seed: int,
) -> Lagged:
    """Place orders at `rate` per second, Poisson, and time how soon some are visible.

    Raises:
        WireError: nothing was placed, or nothing seen.
        psycopg.Error: the commit times cannot be read.
    """
    prober = Prober(requests, share=min(1.0, PROBES_PER_S / rate), seed=seed)
    uvloop.run(prober.run(url, rate, seconds, next_order))
    with psycopg.connect(postgres_url, cursor_factory=psycopg.RawCursor) as database:
        xids = [each.xid for each in prober.seen]
        committed_at = dict(database.execute(COMMIT_TIMES, [xids]).fetchall())
    lags_ms = [(each.received_at - committed_at[each.xid]) * 1000 for each in prober.seen]
    if not lags_ms:
        raise WireError(f"of {prober.offered} orders none was seen")
    return Lagged(prober.offered, prober.unanswered, prober.unseen, lags_ms)


@contextmanager
def stranger_writing(postgres_url: str) -> Generator[None]:
    """Hold a write transaction open, of somebody who has nothing to do with us."""
    with psycopg.connect(postgres_url, application_name="stranger") as stranger:
        stranger.execute(OPEN_A_WRITE)
        try:
            yield
        finally:
            stranger.rollback()


class Prober:
    """Places orders when they are due, and reads some of them back on the same connection."""

    def __init__(self, requests: Requests, *, share: float, seed: int) -> None:
        self.offered = 0
        self.unanswered = 0
        self.unseen = 0
        self.seen: list[Seen] = []
        self._requests = requests
        self._share = share
        self._random = Random(seed)  # noqa: S311  reproducible on purpose
        self._idle: list[Connection] = []
        self._looking: dict[Connection, str] = {}  # for the write of this transaction

    async def run(
        self, url: str, rate: float, seconds: float, next_order: Callable[[], bytes]
    ) -> None:
        opened = await connect(url, CONNECTIONS, self._on_reply)
        self._idle = list(opened)
        try:
            began = due = time.monotonic()
            while due < began + seconds:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self._place(next_order)
                due += self._random.expovariate(rate)
            async with asyncio.timeout(2 * WAIT_S):
                while any(connection.is_busy for connection in opened):  # noqa: ASYNC110  (as wire)
                    await asyncio.sleep(0.01)
        finally:
            for connection in opened:
                connection.close()

    def _place(self, next_order: Callable[[], bytes]) -> None:
        self.offered += 1
        if self._idle:
            self._idle.pop().ask(next_order())
        else:
            self.unanswered += 1

    def _on_reply(self, connection: Connection, reply: Reply) -> None:
        received_at = time.time()
        xid = self._looking.pop(connection, None)
        if xid is not None:
            if reply.status == 200 and header(reply, b"projection-lag") is None:
                self.seen.append(Seen(xid, received_at))
            else:
                self.unseen += 1
        elif reply.status != 201:
            self.unanswered += 1
        elif self._random.random() < self._share:
            token = header(reply, b"consistency-token") or ""
            order_id = msgspec.json.decode(reply.body)["order_id"]
            self._looking[connection] = token.rpartition(".")[2]
            connection.ask(self._requests.get(f"/v1/orders/{order_id}", token=token, wait_s=WAIT_S))
            return
        self._idle.append(connection)
