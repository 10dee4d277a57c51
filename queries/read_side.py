"""The read side of a process: what it knows, what it holds, and how a read goes through both.

A read asks the local tier, then Redis, then PostgreSQL, and fills on the way back. A read with a
token first waits until its read model contains that write. Then, if the write is announced, any
tier will do; if it is only known to be applied, the read goes past the caches, which may not have
heard of it.
"""

from asyncio import Lock, Semaphore, Task, create_task, gather, shield, timeout
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar
from uuid import UUID

from msgspec import Struct
from redis.asyncio import Redis

from queries.cache import Entry
from queries.freshness import Applied, Freshness, Postgres
from queries.lag import measure_lag
from queries.local_cache import Fill, LocalCache
from queries.shared_cache import SharedCache

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[Record]
else:  # asyncpg's generics exist for the type checkers only
    Connection = object

FILL_MAX_S: Final = 5.0  # a tombstone lives 60 s: no fill outlives the one that would refuse it
READS_WAITING_MAX: Final = 500  # at 7 connections and 1 ms a read, 70 ms of waiting
QUIET_S: Final = 1.0  # a page whose tag has moved since is not worth a round trip to Redis
LAG_MEMORY_S: Final = 0.5

# The tags of entries. An order's is also its key.
ORDER_TAG: Final = "order:"
CUSTOMER_TAG: Final = "customer:"
SKU_TAG: Final = "sku:"
ORDERS_TAG: Final = "orders"
STOCK_TAG: Final = "stock"

T = TypeVar("T")


class Found(Struct, frozen=True):
    """An answer. `lag_s` is None if it contains all that was asked for, else how old it may be."""

    entry: Entry
    lag_s: float | None = None
    waited_s: float = 0.0


class Absent(Struct, frozen=True):
    """There is no such thing, or it is another customer's."""

    waited_s: float = 0.0


class Behind(Struct, frozen=True):
    """It exists, and the read model could not show it in time."""

    lag_s: float
    waited_s: float


class ReadOverloadError(Exception):
    """More reads wait for PostgreSQL than can be served in good time."""


class Lookup(Struct, frozen=True):
    """What a read wants: by which key and tags it is cached, and how it is loaded."""

    key: str
    model: str
    load: Callable[[Connection], Awaitable[Entry | None]]  # one SELECT on the read model
    concerns: Callable[[str], bool]  # of an aggregate: whether the answer is behind if it is parked
    tags: tuple[str, ...] = ()  # of a page: what the worker's epochs are bumped by
    order_id: UUID | None = None  # of an order's document
    customer_id: UUID | None = None  # whose page it is


class ReadSide:
    """An async context manager. One per process.

    `pool` needs at least two connections to the primary: one is left for the checkpoints, the
    others are the cap on concurrent reads. Without `redis` every read goes to PostgreSQL.
    """

    def __init__(self, pool: Postgres, redis: Redis | None) -> None:
        self._pool = pool
        self._slots = Semaphore(max(1, pool.get_max_size() - 1))
        self._fills: set[Task[Any]] = set()
        self._waiting = 0
        self._moved_s = {ORDERS_TAG: 0.0, STOCK_TAG: 0.0}
        self._lags: dict[str, float] = {}
        self._lags_s = 0.0
        self._measuring = Lock()
        self.local = LocalCache()
        self.shared = SharedCache(redis) if redis is not None else None
        self.freshness = Freshness(pool, redis, self)
        self.hits = 0  # answered by the local tier
        self.misses = 0
        self.loads = 0  # answered by PostgreSQL
        self.shed = 0

    async def __aenter__(self) -> Self:
        await self.freshness.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.freshness.__aexit__()
        for task in self._fills:
            task.cancel()
        await gather(*self._fills, return_exceptions=True)
        if self.shared is not None:
            await self.shared.aclose()

    def cached(
        self,
        key: str,
        *,
        model: str,
        customer_id: UUID | None = None,
        token_xid: int | None = None,
    ) -> Entry | None:
        """An answer that may be sent as it is, without waiting. None: ask the use case."""
        entry = self.local.get(key)
        if (
            entry is None
            or entry.parked_at is not None
            or (customer_id is not None and entry.customer_id != customer_id)
            or (token_xid is not None and not self.freshness.is_announced(model, token_xid))
        ):
            return None
        self.hits += 1
        return entry

    async def answer(
        self, lookup: Lookup, *, token_xid: int | None = None, wait_s: float = 0.0
    ) -> Found | None:
        """The answer, as fresh as the token asks if that comes true within `wait_s`.

        Raises:
            ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
        """
        began_s = monotonic()
        is_applied, past_caches = True, False
        if token_xid is not None and not self.freshness.is_announced(lookup.model, token_xid):
            is_applied = await self.freshness.wait_for(lookup.model, token_xid, wait_s)
            past_caches = is_applied and not self.freshness.is_announced(lookup.model, token_xid)
        waited_s = monotonic() - began_s
        entry = await self._read(lookup, past_caches=past_caches)
        if entry is None:
            return None
        if not is_applied:
            lag_s = max(await self.lag_s(lookup.model), waited_s)
        elif entry.parked_at is not None:
            lag_s = max(0.0, time() - entry.parked_at)
        else:
            lag_s = None
        return Found(entry, lag_s, waited_s)

    async def lag_s(self, model: str) -> float:
        """Age of the oldest event the read model lacks, as of half a second ago at most."""
        async with self._measuring:
            if monotonic() - self._lags_s > LAG_MEMORY_S:
                async with self.connection() as connection:
                    lags = await measure_lag(connection)
                self._lags = {each.read_model: each.lag_s for each in lags}
                self._lags_s = monotonic()
        return self._lags.get(model, 0.0)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection to read with, under the cap.

        Raises:
            ReadOverloadError: shed. Errors of asyncpg and TimeoutError: PostgreSQL is away.
        """
        self._shed_overload()
        self._waiting += 1
        try:
            async with timeout(FILL_MAX_S), self._slots, self._pool.acquire() as connection:
                yield connection
        finally:
            self._waiting -= 1

    async def _read(self, lookup: Lookup, *, past_caches: bool) -> Entry | None:
        if not past_caches:
            entry = self.local.get(lookup.key)
            if entry is not None:
                self.hits += 1
                return entry
        generation = self.freshness.generation
        fill = self.local.fill_under_way(lookup.key)
        if fill is None or (
            past_caches and not (fill.past_caches and fill.generation == generation)
        ):
            self._shed_overload()
            self.misses += 1
            fill = Fill(
                lookup.key,
                (lookup.model, *lookup.tags) if lookup.order_id is None else (),
                generation=generation,
                past_caches=past_caches,
            )
            self.local.begin(fill)
            fill.answer = _start(self._fill(fill, lookup), self._fills)
        return await shield(fill.answer)

    def _shed_overload(self) -> None:
        if len(self._fills) + self._waiting >= READS_WAITING_MAX:
            self.shed += 1
            raise ReadOverloadError

    async def _fill(self, fill: Fill, lookup: Lookup) -> Entry | None:
        entry = None
        try:
            async with timeout(FILL_MAX_S), self._slots:
                entry = await self._fetch(lookup, past_caches=fill.past_caches)
            if entry is not None:
                entry.customer_id = lookup.customer_id or entry.customer_id
                entry.parked_at = self.freshness.parked_at(lookup.model, lookup.concerns)
        finally:
            self.local.finish(fill, entry)
        return entry

    async def _fetch(self, lookup: Lookup, *, past_caches: bool) -> Entry | None:
        era = self.shared.era if self.shared is not None and self.freshness.is_open else None
        if self.shared is None or era is None:
            return await self._load(lookup)
        if lookup.order_id is not None:
            return await self._fetch_order(
                self.shared, era, lookup.order_id, lookup, past_caches=past_caches
            )
        if past_caches or any(
            monotonic() - self._moved_s.get(tag, 0.0) < QUIET_S for tag in lookup.tags
        ):
            return await self._load(lookup)
        return await self._fetch_page(self.shared, era, lookup)

    async def _fetch_order(
        self, shared: SharedCache, era: str, order_id: UUID, lookup: Lookup, *, past_caches: bool
    ) -> Entry | None:
        entry = None if past_caches else await shared.find_order(era, order_id)
        if entry is None:
            entry = await self._load(lookup)
            if entry is not None:
                shared.store_order(era, order_id, entry)
        return entry

    async def _fetch_page(self, shared: SharedCache, era: str, lookup: Lookup) -> Entry | None:
        fence, entry = await shared.find_page(era, lookup.key, lookup.tags)
        if entry is None:
            entry = await self._load(lookup)
            if entry is not None and fence is not None:
                shared.store_page(era, lookup.key, fence, entry)
        return entry

    async def _load(self, lookup: Lookup) -> Entry | None:
        async with self._pool.acquire() as connection:
            entry = await lookup.load(connection)
        self.loads += 1
        return entry

    # What queries.freshness.Caches asks for.

    def drop(self, applied: Applied) -> None:
        local = self.local
        for order_id, version in applied.orders:
            local.drop(ORDER_TAG + order_id, version)
        for customer_id in applied.customers:
            local.drop(CUSTOMER_TAG + customer_id)
        for sku in applied.skus:
            local.drop(SKU_TAG + sku)
        for tag, moved in ((ORDERS_TAG, applied.orders), (STOCK_TAG, applied.skus)):
            if moved:
                local.drop(tag)
                self._moved_s[tag] = monotonic()

    def drop_aggregate(self, model: str, aggregate_id: str) -> None:
        self.local.drop(ORDER_TAG + aggregate_id)
        self.local.drop(model)

    async def open(self) -> bool:
        if self.shared is None or not await self.shared.open():
            return False
        self.local.open()
        return True

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()
        self.local.close()


def _start(work: Coroutine[Any, Any, T], tasks: set[Task[Any]]) -> Task[T]:
    """Run it apart from whoever asked; the set holds it until it is done."""
    task = create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
