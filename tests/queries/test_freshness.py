"""What a process knows of its read models: by push, by poll, and when it must stop believing."""

import asyncio
import time
from signal import SIGCONT, SIGSTOP
from typing import Any, cast
from uuid import uuid4

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from app.pools import open_redis
from app.servers import Valkey
from queries import freshness
from queries.freshness import Freshness, Postgres
from queries.read_side import ReadSide
from tests.queries.conftest import OpenReadSide, Shop, command
from tests.queries.waiting import until

MODEL = "order_view"


async def write(shop: Shop) -> int:
    return await shop.write(uuid4(), 1, await shop.customer())


async def test_a_push_tells_who_waits(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    waiting = asyncio.create_task(read_side.freshness.wait_for(MODEL, xid, 5))
    await until(lambda: read_side.freshness.waiting == 1)

    await shop.announce(await shop.apply())

    assert await waiting
    assert read_side.freshness.is_announced(MODEL, xid)
    assert read_side.freshness.waiting == 0


async def test_a_poll_tells_who_waits_when_nobody_pushes(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    waiting = asyncio.create_task(read_side.freshness.wait_for(MODEL, xid, 5))
    await until(lambda: read_side.freshness.waiting == 1)

    await shop.apply()
    began_s = time.monotonic()

    assert await waiting
    assert time.monotonic() - began_s < 0.3
    assert not read_side.freshness.is_announced(MODEL, xid)


async def test_without_redis_polls_do_it(shop: Shop) -> None:
    async with ReadSide(shop.pool, None) as read_side:
        xid = await write(shop)
        waiting = asyncio.create_task(read_side.freshness.wait_for(MODEL, xid, 5))
        await until(lambda: read_side.freshness.waiting == 1)
        await shop.apply()
        assert await waiting
        assert not read_side.freshness.is_open


async def test_waiting_ends_in_time(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    began_s = time.monotonic()
    assert not await read_side.freshness.wait_for(MODEL, xid, 0.1)
    assert 0.1 <= time.monotonic() - began_s < 0.5
    assert not await read_side.freshness.wait_for(MODEL, xid, 0)


async def test_polls_are_frequent_only_while_somebody_waits(
    shop: Shop, read_side: ReadSide
) -> None:
    known = read_side.freshness
    await asyncio.sleep(0.3)
    idle = known.polls
    await asyncio.sleep(1.2)
    assert known.polls - idle <= 2
    busy = known.polls
    xid = await write(shop)
    await asyncio.gather(*(known.wait_for(MODEL, xid, 0.4) for _ in range(50)))
    assert 3 <= known.polls - busy <= 0.4 / freshness.POLL_WAITING_S + 2


async def test_no_more_wait_than_can_be_told(
    shop: Shop, read_side: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "WAITERS_MAX", 3)
    xid = await write(shop)
    waiting = [asyncio.create_task(read_side.freshness.wait_for(MODEL, xid, 5)) for _ in range(3)]
    await until(lambda: read_side.freshness.waiting == 3)

    began_s = time.monotonic()
    assert not await read_side.freshness.wait_for(MODEL, xid, 5)
    assert time.monotonic() - began_s < 0.1
    assert read_side.freshness.waits_refused == 1

    await shop.announce(await shop.apply())
    assert await asyncio.gather(*waiting) == [True] * 3


async def test_who_gives_up_waiting_leaves_nothing_behind(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    waiting = asyncio.create_task(read_side.freshness.wait_for(MODEL, xid, 5))
    await until(lambda: read_side.freshness.waiting == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert read_side.freshness.waiting == 0
    await shop.announce(await shop.apply())


async def test_one_lane_is_not_all_of_them(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    change = await shop.apply()
    change.lanes = [3]
    pushes = read_side.freshness.pushes
    await shop.publish(msgspec.json.encode(change))
    await until(lambda: read_side.freshness.pushes > pushes)
    assert not read_side.freshness.is_announced(MODEL, xid)
    change.lanes = [lane for lane in range(16) if lane != 3]
    await shop.publish(msgspec.json.encode(change))
    await until(lambda: read_side.freshness.is_announced(MODEL, xid))


async def test_one_read_model_is_not_all_of_them(shop: Shop, read_side: ReadSide) -> None:
    xid = await write(shop)
    change = await shop.apply()
    change.models = ["order_list"]
    await shop.publish(msgspec.json.encode(change))
    await until(lambda: read_side.freshness.is_announced("order_list", xid))
    assert not read_side.freshness.is_announced(MODEL, xid)


async def test_a_message_that_comes_late_takes_nothing_back(
    shop: Shop, read_side: ReadSide
) -> None:
    early = await shop.apply()
    xid = await write(shop)
    await shop.announce(await shop.apply())
    await until(lambda: read_side.freshness.is_announced(MODEL, xid))
    pushes = read_side.freshness.pushes
    await shop.publish(msgspec.json.encode(early))
    await until(lambda: read_side.freshness.pushes > pushes)
    assert read_side.freshness.is_announced(MODEL, xid)


async def test_a_reset_empties_the_caches_and_begins_anew(shop: Shop, read_side: ReadSide) -> None:
    assert read_side.shared is not None
    shared = read_side.shared
    era = shared.era
    await shop.reset()
    await until(lambda: read_side.freshness.breaks == 1)
    await until(lambda: read_side.freshness.is_open)
    assert shared.era != era


async def test_a_change_that_finds_no_era_is_a_reset(shop: Shop, read_side: ReadSide) -> None:
    """After a flush, say. Nobody may go on in an era in which changes are not noted."""
    assert read_side.shared is not None
    shared = read_side.shared
    era = shared.era
    await command(shop.redis, "FLUSHDB")
    await shop.announce(await shop.apply())
    await until(lambda: read_side.freshness.breaks == 1)
    await until(lambda: read_side.freshness.is_open)
    assert shared.era not in (None, era)


@pytest.mark.parametrize("message", [b"{", b'{"lanes": 3}', b'{"lanes":[1],"models":["x"]}'])
async def test_a_message_that_cannot_be_read_breaks_continuity(
    shop: Shop, read_side: ReadSide, message: bytes
) -> None:
    await shop.publish(message)
    await until(lambda: read_side.freshness.breaks == 1)
    await until(lambda: read_side.freshness.is_open)


async def test_a_message_that_never_came_is_noticed(shop: Shop, read_side: ReadSide) -> None:
    """The worker says that it was published, and nobody has heard it."""
    await shop.apply()
    await shop.record_published()
    await until(lambda: read_side.freshness.breaks == 1)
    await until(lambda: read_side.freshness.is_open)


async def test_a_worker_that_cannot_publish_closes_the_caches(
    shop: Shop, read_side: ReadSide
) -> None:
    await shop.apply()
    await until(lambda: not read_side.freshness.is_open)
    await asyncio.sleep(1.2)
    assert not read_side.freshness.is_open
    await shop.reset()
    await until(lambda: read_side.freshness.is_open)


async def test_pushes_in_good_order_break_nothing(shop: Shop, read_side: ReadSide) -> None:
    for _ in range(25):
        await shop.announce(await shop.apply())
        await asyncio.sleep(0.1)
    assert read_side.freshness.breaks == 0
    assert read_side.freshness.is_open


async def test_a_silent_push_connection_is_a_broken_one(shop: Shop, mortal_redis: Valkey) -> None:
    async with open_redis(mortal_redis.url) as client, ReadSide(shop.pool, client) as read_side:
        await until(lambda: read_side.freshness.is_open)
        mortal_redis.process.send_signal(SIGSTOP)
        try:
            await until(lambda: not read_side.freshness.is_open)
        finally:
            mortal_redis.process.send_signal(SIGCONT)
        await until(lambda: read_side.freshness.is_open)


async def test_a_connection_that_was_made_anew_unnoticed_is_a_broken_one(
    shop: Shop, read_side: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As redis-py does if it finds its connection closed: the channel is subscribed to again."""
    subscribed = b'{"never": "sent"}'
    library: Any = PubSub
    honest = library.handle_message

    async def anew(*given: object, **options: object) -> Any:
        message = await honest(*given, **options)
        if message is not None and message["data"] == subscribed:
            return {**message, "type": "subscribe", "data": 1}
        return message

    monkeypatch.setattr(library, "handle_message", anew)
    await shop.publish(subscribed)
    await until(lambda: read_side.freshness.breaks == 1)
    await until(lambda: read_side.freshness.is_open)


class HeldPool:
    """A pool whose answers come late."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.gate = asyncio.Semaphore(0)
        self.held = 0

    async def fetch(self, statement: str) -> list[asyncpg.Record]:
        rows = await self._pool.fetch(statement)
        self.held += 1
        await self.gate.acquire()
        return rows


async def test_what_is_parked_while_a_poll_runs_stays_parked(
    shop: Shop, redis_client: Redis, read_side: ReadSide
) -> None:
    pool = HeldPool(shop.pool)
    async with Freshness(cast("Postgres", pool), redis_client, read_side) as known:
        await until(lambda: pool.held == 1 and vars(known)["_subscribed"])
        change = await shop.apply()
        change.parked = [(MODEL, "order", "x")]
        await shop.publish(msgspec.json.encode(change))
        await until(lambda: known.pushes == 1)
        pool.gate.release()
        await until(lambda: known.polls == 1)
        assert known.parked_at(MODEL, lambda _: True) is not None
        pool.gate.release()
        await until(lambda: known.parked_at(MODEL, lambda _: True) is None)


async def test_it_begins_while_postgresql_is_away(redis_client: Redis) -> None:
    pool = asyncpg.create_pool("postgresql://nobody@/none?host=/nonexistent", min_size=0)
    async with pool, ReadSide(pool, redis_client) as read_side:
        await until(lambda: read_side.freshness.poll_errors > 0)
        assert not await read_side.freshness.wait_for(MODEL, 5, 0.1)


async def test_read_models_that_come_later_are_taken_up(
    asyncpg_pool: asyncpg.Pool, redis_client: Redis, open_read_side: OpenReadSide
) -> None:
    shop = Shop(asyncpg_pool, redis_client)
    async with open_read_side() as read_side:
        await shop.open()
        xid = await write(shop)
        await shop.announce(await shop.apply())
        assert await read_side.freshness.wait_for(MODEL, xid, 2)
        await until(lambda: read_side.freshness.is_announced(MODEL, xid))
