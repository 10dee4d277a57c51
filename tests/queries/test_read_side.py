"""A read through all tiers, while things change and break."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from uuid import UUID, uuid4

import asyncpg
import pytest
from redis.exceptions import RedisError

from app.pools import open_redis
from app.servers import Valkey
from queries import cache, shared_cache
from queries import read_side as read_side_module
from queries.cache import Entry
from queries.get_order import ORDER_VIEW, get_order, load_order, order_key
from queries.list_orders import ListOrders, list_key, list_orders
from queries.list_stock import ListStock, list_stock
from queries.local_cache import Fill, LocalCache
from queries.read_side import Connection, Found, Lookup, ReadOverloadError, ReadSide
from tests.queries.conftest import Shop, command
from tests.queries.waiting import until


async def version_of(read_side: ReadSide, order_id: UUID, token_xid: int | None = None) -> int:
    found = await get_order(read_side, order_id, token_xid=token_xid, wait_s=5)
    assert isinstance(found, Found)
    if token_xid is not None:
        assert found.lag_s is None
    return found.entry.version


class SlowFill:
    """A read that has its row and is held up before it can store it."""

    def __init__(self, read_side: ReadSide, order_id: UUID, token_xid: int | None = None) -> None:
        self._gate = asyncio.Event()
        self._loaded = asyncio.Event()
        lookup = Lookup(
            key=order_key(order_id),
            model=ORDER_VIEW,
            load=partial(self._load, order_id=order_id),
            concerns=lambda _: False,
            order_id=order_id,
        )
        self._reading = asyncio.create_task(read_side.answer(lookup, token_xid=token_xid, wait_s=5))

    async def _load(self, connection: Connection, *, order_id: UUID) -> Entry | None:
        entry = await load_order(connection, order_id)
        self._loaded.set()
        await self._gate.wait()
        return entry

    async def loaded(self) -> None:
        await self._loaded.wait()

    async def finish(self) -> Entry:
        self._gate.set()
        found = await self._reading
        assert found is not None
        await asyncio.sleep(0.05)  # what it stores in Redis has arrived
        return found.entry


async def race(shop: Shop, read_side: ReadSide, other: ReadSide) -> tuple[int | None, int]:
    """A filler reads version 1, stops, and goes on after version 2 has been announced.

    Returns the version that its process then holds, and the one that another process reads.
    """
    order_id = await shop.place()
    slow = SlowFill(read_side, order_id)
    await slow.loaded()
    token_xid = await shop.change(order_id, 2)
    await until(lambda: read_side.freshness.is_announced(ORDER_VIEW, token_xid))
    await until(lambda: other.freshness.is_announced(ORDER_VIEW, token_xid))
    assert (await slow.finish()).version == 1
    kept = read_side.cached(order_key(order_id), model=ORDER_VIEW)
    return (kept.version if kept else None), await version_of(other, order_id, token_xid)


async def test_a_slow_filler_puts_the_old_version_back_in_no_tier(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    assert await race(shop, read_side, other) == (None, 2)


async def test_it_would_locally_without_the_version_check(
    shop: Shop, read_side: ReadSide, other: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LocalCache.finish

    def unfenced(self: LocalCache, fill: Fill, entry: Entry | None) -> None:
        fill.floor = 0
        honest(self, fill, entry)

    monkeypatch.setattr(LocalCache, "finish", unfenced)
    assert await race(shop, read_side, other) == (1, 2)


async def test_it_would_in_redis_without_the_version_check(
    shop: Shop, read_side: ReadSide, other: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = shared_cache.STORE_ORDER.replace("tonumber(stored) > tonumber(ARGV[2])", "false")
    monkeypatch.setattr(shared_cache, "STORE_ORDER", planted)
    assert await race(shop, read_side, other) == (None, 1)


async def test_who_asks_after_the_news_does_not_join_a_fill_from_before(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    slow = SlowFill(read_side, order_id)
    await slow.loaded()
    token_xid = await shop.change(order_id, 2)
    assert await version_of(read_side, order_id, token_xid) == 2
    assert (await slow.finish()).version == 1
    kept = read_side.cached(order_key(order_id), model=ORDER_VIEW, token_xid=token_xid)
    assert kept is not None
    assert kept.version == 2


async def test_what_is_applied_and_not_announced_is_read_past_the_caches(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    order_id = await shop.place()
    for each in (read_side, other):
        assert await version_of(each, order_id) == 1
    token_xid = await shop.write(order_id, 2, await shop.owner(order_id))
    await shop.apply(order_id)

    for each in (read_side, other):
        assert await version_of(each, order_id, token_xid) == 2


async def test_such_a_read_joins_no_fill_that_goes_through_the_caches(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    slow = SlowFill(read_side, order_id)
    await slow.loaded()
    token_xid = await shop.write(order_id, 2, await shop.owner(order_id))
    await shop.apply(order_id)
    assert await version_of(read_side, order_id, token_xid) == 2
    await slow.finish()


async def test_nor_one_that_may_find_the_old_in_redis(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    order_id = await shop.place()
    await version_of(other, order_id)  # it is in Redis now
    token_xid = await shop.write(order_id, 2, await shop.owner(order_id))
    await shop.apply(order_id)
    assert await read_side.freshness.wait_for(ORDER_VIEW, token_xid, 5)

    versions = await asyncio.gather(
        version_of(read_side, order_id), version_of(read_side, order_id, token_xid)
    )

    assert tuple(versions) == (1, 2)


async def test_nor_one_that_began_before_the_write_was_applied(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    customer_id = await shop.owner(order_id)
    first_xid = await shop.write(order_id, 2, customer_id)
    await shop.apply(order_id)
    slow = SlowFill(read_side, order_id, first_xid)
    await slow.loaded()
    second_xid = await shop.write(order_id, 3, customer_id)
    await shop.apply(order_id)

    assert await version_of(read_side, order_id, second_xid) == 3
    assert (await slow.finish()).version == 2


async def test_what_is_applied_and_not_announced_when_pushes_begin_is_not_taken_as_announced(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    order_id = await shop.place()
    await version_of(other, order_id)  # it is in Redis now
    await shop.cut("pubsub")
    await until(lambda: read_side.freshness.breaks == 1)
    token_xid = await shop.write(order_id, 2, await shop.owner(order_id))
    await shop.apply(order_id)
    await asyncio.sleep(0.4)  # pushes have begun anew
    assert await version_of(read_side, order_id, token_xid) == 2


async def test_500_misses_at_once_are_one_select(shop: Shop, read_side: ReadSide) -> None:
    order_id = await shop.place()
    versions = await asyncio.gather(*(version_of(read_side, order_id) for _ in range(500)))
    assert versions == [1] * 500
    assert read_side.loads == 1


async def test_a_client_that_leaves_takes_nothing_from_the_others(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    slow = SlowFill(read_side, order_id)
    await slow.loaded()
    first, second = (asyncio.create_task(version_of(read_side, order_id)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await slow.finish()
    assert await second == 1
    assert first.cancelled()


async def test_a_failed_fill_fails_those_who_wait_and_nobody_else(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    await shop.pool.execute("ALTER TABLE order_view RENAME TO away")
    outcomes = await asyncio.gather(
        *(version_of(read_side, order_id) for _ in range(20)), return_exceptions=True
    )
    assert {type(outcome) for outcome in outcomes} == {asyncpg.UndefinedTableError}
    await shop.pool.execute("ALTER TABLE away RENAME TO order_view")
    assert await version_of(read_side, order_id) == 1


async def test_too_many_reads_are_shed(
    shop: Shop, read_side: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_side_module, "READS_WAITING_MAX", 20)
    orders = [await shop.place() for _ in range(2)]
    outcomes = await asyncio.gather(
        *(get_order(read_side, uuid4()) for _ in range(100)), return_exceptions=True
    )
    shed = [outcome for outcome in outcomes if isinstance(outcome, ReadOverloadError)]
    assert 0 < len(shed) == read_side.shed
    assert all(
        isinstance(each, ReadOverloadError) or not isinstance(each, Exception) for each in outcomes
    )
    assert [await version_of(read_side, order_id) for order_id in orders] == [1, 1]


async def test_reads_never_take_all_connections(shop: Shop, read_side: ReadSide) -> None:
    orders = [await shop.place() for _ in range(40)]
    slow = [SlowFill(read_side, order_id) for order_id in orders]
    await slow[0].loaded()
    await asyncio.sleep(0.05)
    assert shop.pool.get_max_size() - 1 == shop.pool.get_size() - shop.pool.get_idle_size()
    await shop.pool.fetchval("SELECT 1", timeout=1)
    await asyncio.gather(*(each.finish() for each in slow))


async def test_pages_are_forgotten_when_their_tag_moves(shop: Shop, read_side: ReadSide) -> None:
    mine, theirs = await shop.customer(), await shop.customer()
    await shop.place(mine)
    await shop.announce(await shop.apply(stock=("MUG", "main", 5, 1)))
    await shop.announce(await shop.apply(stock=("CUP", "main", 5, 1)))

    async def held() -> list[bool]:
        """Which pages are held; then all are."""
        loads: list[bool] = []
        reads: list[Callable[[], Awaitable[Found]]] = [
            lambda: list_orders(read_side, ListOrders()),
            lambda: list_orders(read_side, ListOrders(customer_id=mine)),
            lambda: list_orders(read_side, ListOrders(customer_id=theirs)),
            lambda: list_stock(read_side, ListStock()),
            lambda: list_stock(read_side, ListStock(skus=("MUG",))),
            lambda: list_stock(read_side, ListStock(skus=("CUP",))),
        ]
        for read in reads:
            before = read_side.misses
            await read()
            loads.append(read_side.misses == before)
        return loads

    await held()
    assert await held() == [True] * 6
    await shop.place(mine)
    await asyncio.sleep(0.05)
    assert await held() == [False, False, True, True, True, True]
    await shop.announce(await shop.apply(stock=("MUG", "main", 4, 2)))
    await asyncio.sleep(0.05)
    assert await held() == [True, True, True, False, False, True]


async def test_a_list_with_a_token_shows_the_order(shop: Shop, read_side: ReadSide) -> None:
    customer_id = await shop.customer()
    query = ListOrders(customer_id=customer_id)
    first = await list_orders(read_side, query)
    assert b'"data":[]' in first.entry.body
    order_id = uuid4()
    token_xid = await shop.write(order_id, 1, customer_id)
    reading = asyncio.create_task(list_orders(read_side, query, token_xid=token_xid, wait_s=5))
    await until(lambda: read_side.freshness.waiting == 1)
    await shop.announce(await shop.apply(order_id))
    found = await reading
    assert str(order_id).encode() in found.entry.body
    await until(lambda: read_side.freshness.is_announced("order_list", token_xid))
    found = await list_orders(read_side, query, token_xid=token_xid)
    key = list_key(query)
    assert read_side.cached(key, model="order_list", token_xid=token_xid) is found.entry


async def test_pages_are_shared_through_redis(
    shop: Shop, read_side: ReadSide, other: ReadSide
) -> None:
    customer_id = await shop.customer()
    for _ in range(3):
        await shop.place(customer_id)
    query = ListOrders(customer_id=customer_id, limit=2)
    first = await list_orders(read_side, query)
    await asyncio.sleep(0.05)
    second = await list_orders(other, query)
    assert second.entry.body == first.entry.body
    assert second.entry.next_cursor == first.entry.next_cursor is not None
    assert other.loads == 0
    await shop.place(customer_id)
    await asyncio.sleep(0.05)
    third = await list_orders(other, query)
    assert third.entry.body != first.entry.body


async def test_losing_the_push_connection_empties_the_local_tier(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    await version_of(read_side, order_id)
    key = order_key(order_id)
    assert read_side.cached(key, model=ORDER_VIEW) is not None

    await shop.cut("pubsub")

    await until(lambda: read_side.freshness.breaks == 1)
    assert read_side.cached(key, model=ORDER_VIEW) is None
    assert len(read_side.local) == 0
    assert await version_of(read_side, order_id) == 1
    await until(lambda: read_side.freshness.is_open)
    await version_of(read_side, order_id)
    assert read_side.cached(key, model=ORDER_VIEW) is not None


async def test_changes_missed_while_the_push_connection_was_down_are_seen(
    shop: Shop, read_side: ReadSide
) -> None:
    order_id = await shop.place()
    await version_of(read_side, order_id)
    await shop.cut("pubsub")
    await until(lambda: read_side.freshness.breaks == 1)
    token_xid = await shop.change(order_id, 2)
    assert await version_of(read_side, order_id) == 2
    assert await version_of(read_side, order_id, token_xid) == 2
    await until(lambda: read_side.freshness.is_open)
    assert await version_of(read_side, order_id) == 2


async def test_without_redis_every_read_is_a_select(shop: Shop) -> None:
    order_id = await shop.place()
    async with ReadSide(shop.pool, None) as read_side:
        for _ in range(3):
            assert await version_of(read_side, order_id) == 1
        assert read_side.loads == 3
        token_xid = await shop.change(order_id, 2)
        assert await version_of(read_side, order_id, token_xid) == 2


async def test_a_dead_redis_slows_no_read_down(shop: Shop, mortal_redis: Valkey) -> None:
    orders = [await shop.place() for _ in range(50)]
    async with open_redis(mortal_redis.url) as client, ReadSide(shop.pool, client) as read_side:
        await until(lambda: read_side.freshness.is_open)
        mortal_redis.process.kill()
        mortal_redis.process.wait()
        began_s = time.monotonic()
        assert [await version_of(read_side, order_id) for order_id in orders] == [1] * 50
        assert time.monotonic() - began_s < 1
        mortal_redis.start()
        mortal_redis.wait_ready()
        await until(lambda: read_side.freshness.is_open)
        await version_of(read_side, orders[0])
        assert read_side.cached(order_key(orders[0]), model=ORDER_VIEW) is not None


Nemesis = Callable[[], Awaitable[None]]


class Storm:
    """Clients read what they wrote from two processes, while one thing after another breaks."""

    def __init__(self, shop: Shop, sides: list[ReadSide], orders: list[UUID]) -> None:
        self.shop = shop
        self.sides = sides
        self.orders = orders
        self.reads = 0
        self.stale: list[str] = []
        self.must_reset = False
        self._over = False
        self._everything_read = False

    async def run(self, nemesis: Nemesis | None, seconds: float) -> None:
        clients = [
            asyncio.create_task(self.client(order_id, random.Random(number)))
            for number, order_id in enumerate(self.orders)
        ]
        worker = asyncio.create_task(self.worker())
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            await asyncio.sleep(seconds / 8)
            if nemesis is not None:
                await nemesis()
        self._over = True
        await asyncio.gather(*clients)
        self._everything_read = True
        await worker

    async def worker(self) -> None:
        """Apply everything each few milliseconds, tell of it, and reset after a failure to tell."""
        dice = random.Random(7)
        while not self._everything_read:
            change = await self.shop.apply(*self.orders)
            await asyncio.sleep(dice.random() * 0.01)
            try:
                if self.must_reset:
                    await self.shop.reset()
                    self.must_reset = False
                else:
                    await self.shop.announce(change)
            except RedisError:
                self.must_reset = True

    async def client(self, order_id: UUID, dice: random.Random) -> None:
        """Its own order: one version after the other, read from either process with the token."""
        customer_id = await self.shop.owner(order_id)
        version = 1
        key = order_key(order_id)
        while not self._over:
            version += 1
            token_xid = await self.shop.write(order_id, version, customer_id)
            for _ in range(dice.randrange(4)):
                side = dice.choice(self.sides)
                hot = side.cached(key, model=ORDER_VIEW, token_xid=token_xid)
                if hot is None:
                    found = await get_order(side, order_id, token_xid=token_xid, wait_s=5)
                    assert isinstance(found, Found)
                    assert found.lag_s is None
                    hot = found.entry
                self.reads += 1
                if hot.version < version:
                    self.stale.append(f"{order_id}: {hot.version} after {version}")
                await asyncio.sleep(dice.random() * 0.004)


async def storm(shop: Shop, url: str, nemesis: Nemesis | None, seconds: float = 1.5) -> Storm:
    orders = [await shop.place() for _ in range(8)]
    async with (
        open_redis(url) as client,
        ReadSide(shop.pool, client) as first,
        ReadSide(shop.pool, client) as second,
    ):
        await until(lambda: first.freshness.is_open and second.freshness.is_open)
        running = Storm(shop, [first, second], orders)
        await running.run(nemesis, seconds)
        assert running.reads > 50
        return running


@pytest.mark.parametrize("trouble", ["none", "flush", "cut", "cut all", "reset", "garbage"])
async def test_a_token_is_honoured_by_every_process_in_any_trouble(
    shop: Shop, redis_url: str, trouble: str
) -> None:
    async def nemesis() -> None:
        match trouble:
            case "flush":
                await command(shop.redis, "FLUSHDB")
            case "cut":
                await shop.cut("pubsub")
            case "cut all":
                for kind in ("pubsub", "normal"):
                    with suppress(RedisError):
                        await shop.cut(kind)
            case "reset":
                await cache.reset(shop.redis)
            case "garbage":
                await shop.publish(b"\xff")
            case _:
                pass

    assert (await storm(shop, redis_url, nemesis)).stale == []


async def test_a_token_is_honoured_while_redis_dies_and_comes_back(
    shop: Shop, mortal_redis: Valkey
) -> None:
    async def nemesis() -> None:
        mortal_redis.process.kill()
        mortal_redis.process.wait()
        await asyncio.sleep(0.1)
        mortal_redis.start()
        await until(mortal_redis.answers)

    async with open_redis(mortal_redis.url) as client:
        shop.redis = client
        assert (await storm(shop, mortal_redis.url, nemesis, seconds=4)).stale == []


async def test_the_storm_notices_when_nothing_is_invalidated(
    shop: Shop, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(self: ReadSide, applied: object) -> None: ...

    monkeypatch.setattr(ReadSide, "drop", deaf)
    assert (await storm(shop, redis_url, None)).stale != []
