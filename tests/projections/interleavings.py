"""Commit orders against cursors: who loses, doubles or inverts events?

    python -m tests.projections.interleavings --events 100000

32 writers adjust a few hot shelves through the real handler. Each transaction has its id before it
takes its locks, and many sleep before the locks or before the commit, so ids, transaction ids and
commits come in three different orders. Meanwhile cursors deliver the outbox, each into a table of
its own; afterwards the deliveries are compared with the outbox.
"""

import argparse
import asyncio
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, LiteralString

import asyncpg
from msgspec import Struct
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from app.pools import open_postgres, open_psycopg
from app.servers import Postgres
from app.settings import ROOT
from commands.adjust_stock import AdjustStock
from projections.outbox import LANES, Connection, Outbox, Position
from tests.projections.shop import Shop

WRITERS = 32
SHELVES = 20
POLL_S = 0.004
EVENTS_MAX = 200  # small, so that paging is part of it

# What each cursor delivered: in which batch, and at which place in it.
MAKE_DELIVERIES = """
CREATE TABLE deliveries (
    cursor text, batch integer, place integer, id bigint, aggregate_id text, version integer)
"""

# $1 cursor, $2 number of the batch.
DELIVER = """
INSERT INTO deliveries (cursor, batch, place, id, aggregate_id, version)
SELECT $1, $2::integer, row_number() OVER (ORDER BY id), id, aggregate_id, aggregate_version
FROM batch
"""

# $1 cursor, $2 number of the batch, $3 last id. The simplest cursor, and the one that loses.
DELIVER_BY_ID = """
INSERT INTO deliveries (cursor, batch, place, id, aggregate_id, version)
SELECT $1, $2::integer, row_number() OVER (ORDER BY id), id, aggregate_id, aggregate_version
FROM outbox
WHERE id > $3
RETURNING id
"""

# $1 cursor, $2 number of the batch, $3 last transaction and $4 last id. The popular one: nothing
# that is newer than the oldest open transaction, in the order of transaction ids.
DELIVER_BELOW_XMIN = """
WITH fresh AS (
    SELECT xid, id, aggregate_id, aggregate_version
    FROM outbox
    WHERE (xid, id) > ($3::text::xid8, $4::bigint)
      AND xid < pg_snapshot_xmin(pg_current_snapshot())
), delivered AS (
    INSERT INTO deliveries (cursor, batch, place, id, aggregate_id, version)
    SELECT $1, $2::integer, row_number() OVER (ORDER BY xid, id), id, aggregate_id,
           aggregate_version
    FROM fresh
)
SELECT xid::text, id
FROM fresh
ORDER BY fresh.xid DESC, fresh.id DESC
LIMIT 1
"""

# $1 cursor. One row: events lost, doubled, and inverted within their aggregate.
COMPARE = """
WITH delivered AS (SELECT * FROM deliveries WHERE cursor = $1)
SELECT (SELECT count(*) FROM outbox WHERE id NOT IN (SELECT id FROM delivered)),
       (SELECT count(*) FROM (SELECT FROM delivered GROUP BY id HAVING count(*) > 1) AS twice),
       (SELECT count(*)
        FROM (SELECT version,
                     lag(version) OVER (PARTITION BY aggregate_id ORDER BY batch, place) AS before
              FROM delivered) AS ordered
        WHERE version < before)
"""


class Verdict(Struct, frozen=True):
    lost: int
    doubled: int
    inverted: int


class Cursor:
    """One way to read the outbox."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        self._batch = 0

    async def open(self) -> None:
        """Prepare the session."""

    async def deliver(self) -> int:
        """Deliver what is new; returns how much that was."""
        raise NotImplementedError

    async def _execute(self, statement: LiteralString, *arguments: Any) -> AsyncCursor[TupleRow]:
        self._batch += 1
        return await self._connection.execute(statement, [self.name, self._batch, *arguments])


class BySnapshot(Cursor):
    """Ours, as the projector uses it, over all lanes or over some."""

    def __init__(self, name: str, connection: Connection, lanes: Sequence[int]) -> None:
        super().__init__(name, connection)
        self._lanes = lanes
        self._outbox = Outbox(connection)
        self._at = Position("3:3:")

    async def open(self) -> None:
        await self._outbox.open()

    async def deliver(self) -> int:
        async with self._connection.transaction():
            batch = await self._outbox.take(
                self._at, self._lanes, target=None, events_max=EVENTS_MAX
            )
            await self._execute(DELIVER)
        self._at = batch.reaches
        return batch.events + (self._at.target is not None)


class ById(Cursor):
    last_id = 0

    async def deliver(self) -> int:
        rows = await (await self._execute(DELIVER_BY_ID, self.last_id)).fetchall()
        self.last_id = max((row[0] for row in rows), default=self.last_id)
        return len(rows)


class BelowXmin(Cursor):
    last: tuple[str, int] = ("0", 0)

    async def deliver(self) -> int:
        row = await (await self._execute(DELIVER_BELOW_XMIN, *self.last)).fetchone()
        if row is not None:
            self.last = (row[0], row[1])
        return row is not None


async def write(shop: Shop, events: int, seed: int) -> None:
    """Let the writers write so many events: a third sleeps before its locks, a third after."""
    left = events

    async def writer(chance: random.Random) -> None:
        nonlocal left
        while left > 0:
            wanted = chance.sample(shop.skus, chance.randint(1, 3))
            pauses = tuple(chance.choice((0, 0, chance.random() * 0.02)) for _ in range(2))
            adjustments = [AdjustStock(sku, "main", "count", delta=1) for sku in wanted]
            with suppress(asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError):
                await shop.run(adjustments, pauses_s=(pauses[0], pauses[1]))
                left -= len(wanted)

    await asyncio.gather(*(writer(random.Random(seed * 1000 + n)) for n in range(WRITERS)))


async def poll(cursor: Cursor, is_over: asyncio.Event) -> None:
    """Deliver until the writers are done and nothing is left."""
    while True:
        was_over = is_over.is_set()
        if not await cursor.deliver() and was_over:
            return
        await asyncio.sleep(POLL_S)


async def run(
    postgres: "asyncpg.Pool[asyncpg.Record]",
    pool: AsyncConnectionPool[AsyncConnection[TupleRow]],
    *,
    events: int,
    seed: int = 1,
) -> dict[str, Verdict]:
    """Write, deliver with every cursor, compare. The database is fresh and migrated."""
    shop = Shop(postgres)
    await shop.open(products=SHELVES, customers=1)
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(pool.connection()) for _ in range(4)]
        await connections[0].execute(MAKE_DELIVERIES)
        half = LANES // 2
        cursors: list[Cursor] = [
            BySnapshot("snapshot", connections[0], range(half)),
            BySnapshot("snapshot", connections[1], range(half, LANES)),
            ById("id > last", connections[2]),
            BelowXmin("xid < xmin", connections[3]),
        ]
        for cursor in cursors:
            await cursor.open()
        is_over = asyncio.Event()
        pollers = [asyncio.create_task(poll(cursor, is_over)) for cursor in cursors]
        await write(shop, events, seed)
        is_over.set()
        await asyncio.gather(*pollers)
    verdicts: dict[str, Verdict] = {}
    async with pool.connection() as connection:
        for name in dict.fromkeys(cursor.name for cursor in cursors):
            row = await (await connection.execute(COMPARE, [name])).fetchone()
            verdicts[name] = Verdict(*row) if row else Verdict(-1, -1, -1)
    return verdicts


async def run_on(url: str, *, events: int, seed: int) -> dict[str, Verdict]:
    """As `run`, on a database that nobody has connected to yet."""
    async with (
        open_postgres(url, application_name="waybill-test", size=WRITERS) as postgres,
        open_psycopg(url, application_name="waybill-test", size=5) as pool,
    ):
        return await run(postgres, pool, events=events, seed=seed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare cursors over many interleaved commits.")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="waybill-", dir="/tmp") as directory:
        server = Postgres(Path(directory))
        try:
            server.start()
            server.wait_ready()
            migrate = [sys.executable, "-m", "migrations", server.url]
            subprocess.run(migrate, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            began_s = monotonic()
            verdicts = asyncio.run(run_on(server.url, events=asked.events, seed=asked.seed))
        finally:
            server.stop()
    print(f"{asked.events} events, seed {asked.seed}, {monotonic() - began_s:.0f} s")
    print(f"{'CURSOR':12} {'LOST':>8} {'DOUBLED':>8} {'INVERTED':>9}")
    for name, verdict in verdicts.items():
        print(f"{name:12} {verdict.lost:>8} {verdict.doubled:>8} {verdict.inverted:>9}")
    return 0 if verdicts["snapshot"] == Verdict(0, 0, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
