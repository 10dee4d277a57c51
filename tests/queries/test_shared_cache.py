"""The shared tier: nothing old can be put back into Redis."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from signal import SIGCONT, SIGSTOP
from typing import Any, cast
from uuid import UUID, uuid4

import msgspec
import pytest
from redis.asyncio import Redis

from app.pools import open_redis
from app.servers import Valkey
from queries import cache, shared_cache
from queries.cache import APPLIED_CHANNEL, ERA_KEY, Entry, publish_changes, reset
from queries.shared_cache import ASKS_MAX, CIRCUIT_OPEN_S, SharedCache
from tests.queries.conftest import Change, command
from tests.queries.waiting import until

TAGS = ("orders",)


def order(version: int) -> Entry:
    return Entry(b"version %d" % version, version=version, customer_id=UUID(int=7))


def page(body: bytes = b"page", cursor: str | None = "next") -> Entry:
    return Entry(body, next_cursor=cursor)


async def changed(
    redis: Redis,
    *orders: tuple[UUID, int],
    customers: list[str] | None = None,
    skus: list[str] | None = None,
) -> None:
    change = Change([], [], "", [(str(i), v) for i, v in orders], customers or [], skus or [], [])
    await publish_changes(redis, msgspec.json.encode(change))


@pytest.fixture
async def shared(redis_client: Redis) -> AsyncGenerator[SharedCache]:
    shared = SharedCache(redis_client)
    assert not await shared.open()  # it had to be made
    assert await shared.open()
    yield shared
    await shared.aclose()
    assert shared.errors == 0


async def stored(store: Callable[..., None], *arguments: object) -> None:
    """A store is sent with the next pipeline; this waits until it has been."""
    store(*arguments)
    shared = cast("Any", store).__self__
    await until(lambda: vars(shared)["_sending"] is None)


def era_of(shared: SharedCache) -> str:
    assert shared.era is not None
    return shared.era


async def test_an_order_comes_back_whole(shared: SharedCache) -> None:
    order_id, era = uuid4(), era_of(shared)
    await stored(shared.store_order, era, order_id, order(3))
    found = await shared.find_order(era, order_id)
    assert found is not None
    assert (found.body, found.version, found.etag) == (b"version 3", 3, '"v3"')
    assert found.customer_id == UUID(int=7)
    assert (shared.hits, shared.misses) == (1, 0)


async def test_bodies_do_not_stay_forever(shared: SharedCache, redis_client: Redis) -> None:
    order_id, era = uuid4(), era_of(shared)
    await stored(shared.store_order, era, order_id, order(1))
    fence, _ = await shared.find_page(era, "key", TAGS)
    assert fence is not None
    await stored(shared.store_page, era, "key", fence, page())
    await changed(redis_client, (uuid4(), 2), customers=["c"], skus=["s"])
    lives = {
        key.decode(): await command(redis_client, "PTTL", key) / 1000
        for key in await command(redis_client, "KEYS", "*")
    }
    assert lives.pop(ERA_KEY) < 0
    assert len(lives) == 4  # two bodies, a tombstone, and the epoch that a reader asked for
    assert all(50 < life <= 66 for key, life in lives.items() if ":epoch:" not in key)
    assert all(290 < life <= 300 for key, life in lives.items() if ":epoch:" in key)


async def slow_fill(shared: SharedCache, redis_client: Redis) -> Entry | None:
    """What is served after a filler that had read version 1 stores it behind version 2's back."""
    order_id, era = uuid4(), era_of(shared)
    await changed(redis_client, (order_id, 2))
    await stored(shared.store_order, era, order_id, order(1))
    return await shared.find_order(era, order_id)


async def test_a_slow_filler_cannot_put_back_the_old(
    shared: SharedCache, redis_client: Redis
) -> None:
    assert await slow_fill(shared, redis_client) is None


async def test_it_could_without_the_version_check(
    shared: SharedCache, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = shared_cache.STORE_ORDER.replace("tonumber(stored) > tonumber(ARGV[2])", "false")
    assert planted != shared_cache.STORE_ORDER
    monkeypatch.setattr(shared_cache, "STORE_ORDER", planted)
    stale = await slow_fill(shared, redis_client)
    assert stale is not None
    assert stale.version == 1


async def test_the_version_of_the_tombstone_may_be_stored(
    shared: SharedCache, redis_client: Redis
) -> None:
    order_id, era = uuid4(), era_of(shared)
    await changed(redis_client, (order_id, 2))
    await stored(shared.store_order, era, order_id, order(2))
    assert await shared.find_order(era, order_id) is not None


async def test_versions_are_numbers(shared: SharedCache, redis_client: Redis) -> None:
    order_id, era = uuid4(), era_of(shared)
    await changed(redis_client, (order_id, 10))
    await stored(shared.store_order, era, order_id, order(9))
    assert await shared.find_order(era, order_id) is None


async def test_news_takes_the_old_body_away(shared: SharedCache, redis_client: Redis) -> None:
    order_id, era = uuid4(), era_of(shared)
    await stored(shared.store_order, era, order_id, order(1))
    await changed(redis_client, (order_id, 2))
    assert await shared.find_order(era, order_id) is None


async def test_late_news_leaves_the_newer_body(shared: SharedCache, redis_client: Redis) -> None:
    order_id, era = uuid4(), era_of(shared)
    await stored(shared.store_order, era, order_id, order(2))
    await changed(redis_client, (order_id, 1))
    await changed(redis_client, (order_id, 2))
    assert await shared.find_order(era, order_id) is not None


async def test_a_page_comes_back_whole(shared: SharedCache) -> None:
    era = era_of(shared)
    for key, kept in (("a", page()), ("b", page(b"last", None))):
        fence, nothing = await shared.find_page(era, key, TAGS)
        assert nothing is None
        assert fence is not None
        await stored(shared.store_page, era, key, fence, kept)
        _, found = await shared.find_page(era, key, TAGS)
        assert found is not None
        assert (found.body, found.next_cursor) == (kept.body, kept.next_cursor)


async def slow_page(shared: SharedCache, redis_client: Redis) -> Entry | None:
    """What is served after a page that was read before a change is stored after it."""
    era = era_of(shared)
    fence, _ = await shared.find_page(era, "key", TAGS)
    assert fence is not None
    await changed(redis_client, (uuid4(), 1))
    await stored(shared.store_page, era, "key", fence, page(b"old"))
    return (await shared.find_page(era, "key", TAGS))[1]


async def test_a_slow_page_cannot_be_put_back(shared: SharedCache, redis_client: Redis) -> None:
    assert await slow_page(shared, redis_client) is None


async def test_it_could_be_if_the_epoch_did_not_move(
    shared: SharedCache, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = cache.PUBLISH_CHANGES.replace("bump('orders')", "")
    assert planted != cache.PUBLISH_CHANGES
    monkeypatch.setattr(cache, "PUBLISH_CHANGES", planted)
    assert await slow_page(shared, redis_client) is not None


@pytest.mark.parametrize(
    ("tag", "news"),
    [
        ("orders", {}),
        ("customer:c1", {"customers": ["c1"]}),
        ("sku:MUG", {"skus": ["MUG"]}),
        ("stock", {"skus": ["MUG"]}),
    ],
)
async def test_each_tag_has_its_news(
    shared: SharedCache, redis_client: Redis, tag: str, news: dict[str, list[str]]
) -> None:
    era = era_of(shared)
    for key, tags in (("page", (tag,)), ("other", ("sku:CUP", "customer:c2"))):
        fence, _ = await shared.find_page(era, key, tags)
        assert fence is not None
        await stored(shared.store_page, era, key, fence, page())
    await changed(redis_client, (uuid4(), 1), **news)
    assert (await shared.find_page(era, "page", (tag,)))[1] is None
    assert (await shared.find_page(era, "other", ("sku:CUP", "customer:c2")))[1] is not None


async def test_an_epoch_that_was_lost_revives_no_page(
    shared: SharedCache, redis_client: Redis
) -> None:
    era = era_of(shared)
    for _ in range(3):
        fence, nothing = await shared.find_page(era, "key", TAGS)
        assert nothing is None
        assert fence is not None
        await stored(shared.store_page, era, "key", fence, page())
        assert (await shared.find_page(era, "key", TAGS))[1] is not None
        assert await command(redis_client, "DEL", f"waybill:{era}:epoch:orders") == 1


async def test_a_fill_from_before_a_flush_is_refused_and_the_next_is_not(
    shared: SharedCache, redis_client: Redis
) -> None:
    order_id, era = uuid4(), era_of(shared)
    await command(redis_client, "FLUSHDB")
    await changed(redis_client, (order_id, 2))  # without an era there is nothing to mark
    await stored(shared.store_order, era, order_id, order(1))
    assert shared.era is None
    assert await shared.open()
    era = era_of(shared)
    assert await shared.find_order(era, order_id) is None
    await stored(shared.store_order, era, order_id, order(2))
    assert await shared.find_order(era, order_id) is not None


async def test_a_page_from_before_a_flush_is_refused(
    shared: SharedCache, redis_client: Redis
) -> None:
    era = era_of(shared)
    fence, _ = await shared.find_page(era, "key", TAGS)
    assert fence is not None
    await command(redis_client, "FLUSHDB")
    fence, _ = await shared.find_page(era, "key", TAGS)
    assert fence is not None
    await changed(redis_client, (uuid4(), 1))
    await stored(shared.store_page, era, "key", fence, page(b"old"))
    assert (await shared.find_page(era, "key", TAGS))[1] is None


async def test_a_reset_begins_a_new_era_and_tells(shared: SharedCache, redis_client: Redis) -> None:
    order_id, era = uuid4(), era_of(shared)
    await stored(shared.store_order, era, order_id, order(1))
    async with cast("Any", redis_client).pubsub() as push:
        await push.subscribe(APPLIED_CHANNEL)
        await push.get_message(timeout=1)
        await reset(redis_client)
        told = await push.get_message(timeout=1)
    assert told["data"] == b'{"reset":true}'
    await shared.open()
    assert era_of(shared) != era
    assert await shared.find_order(era_of(shared), order_id) is None


async def test_who_makes_an_era_tells(shared: SharedCache, redis_client: Redis) -> None:
    """Another process may still be in the one before, where no change is noted any more."""
    async with cast("Any", redis_client).pubsub() as push:
        await push.subscribe(APPLIED_CHANNEL)
        await push.get_message(timeout=1)
        await command(redis_client, "DEL", ERA_KEY)
        assert not await shared.open()
        told = await push.get_message(timeout=1)
    assert told["data"] == b'{"reset":true}'


async def test_processes_share_the_era(shared: SharedCache, redis_client: Redis) -> None:
    other = SharedCache(redis_client)
    await other.open()
    assert other.era == shared.era


async def test_a_server_that_came_back_with_old_data_has_a_new_era(
    shared: SharedCache, redis_client: Redis
) -> None:
    """The era of another run, as it stands in a dump that was loaded again."""
    await command(redis_client, "SET", ERA_KEY, "0" * 40 + "12345678")
    assert not await shared.open()
    assert shared.era is None
    assert await shared.open()
    assert not era_of(shared).startswith("0" * 40)


async def test_a_new_order_costs_redis_no_memory(shared: SharedCache, redis_client: Redis) -> None:
    before = await command(redis_client, "DBSIZE")
    await changed(redis_client, (uuid4(), 1), customers=["c"], skus=["s"])
    assert await command(redis_client, "DBSIZE") == before


async def test_what_cannot_be_asked_soon_is_missed_at_once(shared: SharedCache) -> None:
    era, order_id = era_of(shared), uuid4()
    await stored(shared.store_order, era, order_id, order(1))
    found = await asyncio.gather(*(shared.find_order(era, order_id) for _ in range(2 * ASKS_MAX)))
    hits = [each for each in found if each is not None]
    assert len(hits) == shared.hits == ASKS_MAX


async def test_a_server_that_forgot_the_scripts_is_told_again(
    shared: SharedCache, redis_client: Redis
) -> None:
    era, order_id = era_of(shared), uuid4()
    await command(redis_client, "SCRIPT", "FLUSH")
    await stored(shared.store_order, era, order_id, order(1))
    assert await shared.find_order(era, order_id) is not None
    await command(redis_client, "SCRIPT", "FLUSH")
    await changed(redis_client, (order_id, 2))
    assert await shared.find_order(era, order_id) is None


async def test_a_dead_redis_costs_one_time_limit_per_second(mortal_redis: Valkey) -> None:
    now_s = 1_000.0
    async with open_redis(mortal_redis.url) as client:
        shared = SharedCache(client, clock=lambda: now_s)
        while not await shared.open():
            pass
        era = era_of(shared)
        mortal_redis.process.kill()
        mortal_redis.process.wait()
        for _ in range(20):
            assert await shared.find_order(era, uuid4()) is None
        assert shared.errors == 1
        now_s += CIRCUIT_OPEN_S
        assert [await shared.find_order(era, uuid4()) for _ in range(20)] == [None] * 20
        assert shared.errors == 2


async def test_while_one_asks_whether_it_is_back_the_others_miss_at_once(
    mortal_redis: Valkey,
) -> None:
    now_s = 1_000.0
    async with open_redis(mortal_redis.url) as client:
        shared = SharedCache(client, clock=lambda: now_s)
        while not await shared.open():
            pass
        mortal_redis.process.send_signal(SIGSTOP)
        try:
            assert await shared.find_order(era_of(shared), uuid4()) is None
            now_s += CIRCUIT_OPEN_S
            first = asyncio.create_task(shared.find_order(era_of(shared), uuid4()))
            await asyncio.sleep(0.01)
            async with asyncio.timeout(0.02):
                assert await shared.find_order(era_of(shared), uuid4()) is None
            assert not first.done()
            await first
        finally:
            mortal_redis.process.send_signal(SIGCONT)


async def test_a_silent_redis_is_given_up_soon(mortal_redis: Valkey) -> None:
    async with open_redis(mortal_redis.url) as client:
        shared = SharedCache(client)
        while not await shared.open():
            pass
        mortal_redis.process.send_signal(SIGSTOP)
        try:
            async with asyncio.timeout(0.5):
                assert await shared.find_order(era_of(shared), uuid4()) is None
            assert shared.errors == 1
        finally:
            mortal_redis.process.send_signal(SIGCONT)
        await asyncio.sleep(CIRCUIT_OPEN_S)
        await shared.find_order(era_of(shared), uuid4())  # one asks, and then all may
        order_id = uuid4()
        await stored(shared.store_order, era_of(shared), order_id, order(1))
        assert await shared.find_order(era_of(shared), order_id) is not None
