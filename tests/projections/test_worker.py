"""The worker process, as it is started."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, cast
from uuid import UUID

import asyncpg
import msgspec
import redis.asyncio

from app.pools import open_redis
from app.servers import Valkey
from app.settings import ROOT
from projections.outbox import Connection
from queries.cache import APPLIED_CHANNEL, ERA_KEY, WAKE_CHANNEL
from tests.conftest import temporary_directory
from tests.projections.conftest import differences, unapplied
from tests.projections.shop import Shop
from workers.housekeeping import keep_house

PATIENCE_S = 10.0


@contextmanager
def worker(
    postgres_url: str, redis_url: str, log: Path, **settings: str
) -> Generator[subprocess.Popen[bytes]]:
    """A worker process; it is killed if it still runs in the end."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("WAYBILL_")}
    environ |= {"WAYBILL_POSTGRES_URL": postgres_url, "WAYBILL_REDIS_URL": redis_url, **settings}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers"], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def operate(postgres_url: str, redis_url: str, *arguments: str) -> tuple[int, str, str]:
    environ = {**os.environ, "WAYBILL_POSTGRES_URL": postgres_url, "WAYBILL_REDIS_URL": redis_url}
    done = subprocess.run(
        [sys.executable, "-m", "workers", "projections", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def is_projected(reader: Connection, patience_s: float = PATIENCE_S) -> float:
    """Wait until every read model has everything; returns the seconds."""
    began = monotonic()
    while monotonic() - began < patience_s:
        count = await reader.execute("SELECT count(*) FROM projection_checkpoints")
        if (await count.fetchone() or (0,))[0] == 48 and await unapplied(reader) == 0:
            return monotonic() - began
        await asyncio.sleep(0.005)
    raise AssertionError(f"{await unapplied(reader)} events are not applied")


@asynccontextmanager
async def hearing(client: redis.asyncio.Redis) -> AsyncGenerator[list[dict[str, Any]]]:
    """What the worker tells readers, as it comes."""
    heard: list[dict[str, Any]] = []
    subscribed = asyncio.Event()

    async def listen() -> None:
        async with client.pubsub() as subscription:  # pyright: ignore[reportUnknownMemberType]
            await subscription.subscribe(APPLIED_CHANNEL)  # pyright: ignore[reportUnknownMemberType]
            while True:
                message = cast("Any", await subscription.get_message(timeout=0.5))
                if message is not None and message["type"] == "message":
                    heard.append(msgspec.json.decode(message["data"]))
                subscribed.set()

    listening = asyncio.create_task(listen())
    await subscribed.wait()
    try:
        yield heard
    finally:
        listening.cancel()
        await asyncio.wait({listening})


async def call(client: redis.asyncio.Redis) -> None:
    """What a web process does after a commit."""
    await client.publish(WAKE_CHANNEL, b"")  # pyright: ignore[reportUnknownMemberType]


async def until_told(heard: list[dict[str, Any]], order_id: UUID) -> dict[str, Any]:
    """Wait for the message that says that an order was placed."""
    for _ in range(5_000):
        for each in heard:
            if [str(order_id), 1] in each.get("orders", ()):
                return each
        await asyncio.sleep(0.001)
    raise AssertionError("readers were not told")


async def test_a_call_is_answered_at_once_and_readers_are_told(
    shop: Shop,
    postgres_url: str,
    redis_url: str,
    redis_client: redis.asyncio.Redis,
    reader: Connection,
    tmp_path: Path,
) -> None:
    with worker(postgres_url, redis_url, tmp_path / "log") as process:
        await is_projected(reader)
        await asyncio.sleep(0.3)
        async with hearing(redis_client) as heard:
            waits: list[float] = []
            for _ in range(10):
                await shop.place(1)
                began = monotonic()
                await call(redis_client)
                await until_told(heard, shop.placed[-1])
                waits.append(monotonic() - began)
            (placed,) = await shop.run([shop.order(lines=1)])
            await call(redis_client)
            told = await until_told(heard, placed.order_id)
        assert told["lanes"] == list(range(16))
        assert sorted(told["models"]) == ["order_list", "order_view", "stock_availability"]
        assert told["customers"] == [str(placed.customer_id)]
        assert told["skus"] == [placed.lines[0].sku]
        assert told["parked"] == []
        assert sorted(waits)[5] < 0.5
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert await differences(reader) == []


async def test_it_stops_within_five_seconds_under_load_and_loses_nothing(
    shop: Shop,
    postgres_url: str,
    redis_url: str,
    redis_client: redis.asyncio.Redis,
    reader: Connection,
    tmp_path: Path,
) -> None:
    trading = asyncio.create_task(shop.trade(4.0))
    for number in range(2):
        log = tmp_path / f"log{number}"
        with worker(postgres_url, redis_url, log) as process:
            while b'"projecting"' not in log.read_bytes():
                await call(redis_client)
                await asyncio.sleep(0.02)
            for _ in range(30):
                await asyncio.sleep(0.02)
                await call(redis_client)
            began = monotonic()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 5) == 0
            assert monotonic() - began < 5
    await trading
    with worker(postgres_url, redis_url, tmp_path / "log"):
        await is_projected(reader)
    assert await differences(reader) == []


async def test_workers_killed_at_any_moment_leave_nothing_wrong(
    shop: Shop, postgres_url: str, redis_url: str, reader: Connection, tmp_path: Path
) -> None:
    trading = asyncio.create_task(shop.trade(6.0, writers=3))
    chance = random.Random(7)
    kills = 0
    while not trading.done():
        with (
            worker(postgres_url, redis_url, tmp_path / "log"),
            worker(postgres_url, redis_url, tmp_path / "log"),
        ):
            await asyncio.sleep(chance.uniform(1.0, 2.0))
            kills += 2
    await trading
    with worker(postgres_url, redis_url, tmp_path / "log"):
        await is_projected(reader)
    assert kills >= 6
    assert await differences(reader) == []
    parked = await reader.execute("SELECT count(*) FROM projection_parked")
    assert await parked.fetchone() == (0,)


async def test_redis_may_go_and_come_back(
    shop: Shop, postgres_url: str, reader: Connection, tmp_path: Path
) -> None:
    with temporary_directory() as directory:
        server = Valkey(directory)
        server.start()
        server.wait_ready()
        try:
            with worker(postgres_url, server.url, tmp_path / "log") as process:
                await is_projected(reader)
                server.stop()
                await asyncio.sleep(0.5)
                for _ in range(5):
                    await shop.place(2)
                    assert await is_projected(reader) < 2.0
                server.start()
                server.wait_ready()
                async with open_redis(server.url) as client:
                    began = monotonic()
                    while await client.get(ERA_KEY) is None:
                        assert monotonic() - began < PATIENCE_S, "readers were not told"
                        await asyncio.sleep(0.02)
                    async with hearing(client) as heard:
                        await shop.place(1)
                        await call(client)
                        await is_projected(reader)
                        await asyncio.sleep(0.3)
                assert heard
                assert process.poll() is None
        finally:
            server.stop()
    assert await differences(reader) == []


async def test_checkpoints_of_another_server_end_it_with_one_line(
    shop: Shop, postgres_url: str, redis_url: str, reader: Connection, tmp_path: Path
) -> None:
    with worker(postgres_url, redis_url, tmp_path / "first"):
        await is_projected(reader)
    await reader.execute("UPDATE projection_models SET system_id = 42")
    with worker(postgres_url, redis_url, tmp_path / "second") as process:
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 1
    complaint = (tmp_path / "second").read_text().splitlines()[-1]
    assert complaint.startswith("waybill: ")
    assert "42" in complaint
    assert "rebuild --all" in complaint
    code, _, _ = operate(postgres_url, redis_url, "rebuild", "--all")
    assert code == 0
    with worker(postgres_url, redis_url, tmp_path / "third"):
        await shop.place(1)
        await is_projected(reader)
    assert await differences(reader) == []


async def test_what_was_told_is_written_down_when_it_gets_quiet(
    shop: Shop,
    postgres_url: str,
    redis_url: str,
    redis_client: redis.asyncio.Redis,
    reader: Connection,
    tmp_path: Path,
) -> None:
    with worker(postgres_url, redis_url, tmp_path / "log"):
        await is_projected(reader)
        await shop.place(1)
        await call(redis_client)
        await is_projected(reader)
        for _ in range(300):
            rows = await reader.execute(
                "SELECT bool_and(published::text = snapshot::text) FROM projection_checkpoints"
            )
            if await rows.fetchone() == (True,):
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("published stays behind")


async def test_its_numbers_can_be_scraped(
    shop: Shop, postgres_url: str, redis_url: str, reader: Connection, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {"WAYBILL_WORKER_METRICS_PORT": port}
    with worker(postgres_url, redis_url, tmp_path / "log", **settings):
        await is_projected(reader)
        await shop.place(3)
        await is_projected(reader)
        await asyncio.sleep(1.2)
        page = await asyncio.to_thread(scrape, port)
    assert 'waybill_projection_lag_seconds{read_model="order_view"} 0.0' in page
    assert 'waybill_projection_parked{read_model="order_list"} 0.0' in page
    assert 'waybill_projection_events_total{read_model="order_view"}' in page


def scrape(port: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


async def test_operators_see_and_repair(
    shop: Shop, postgres_url: str, redis_url: str, reader: Connection, tmp_path: Path
) -> None:
    order_ids = await shop.place(5)
    with worker(postgres_url, redis_url, tmp_path / "log"):
        await is_projected(reader)
        code, out, _ = operate(postgres_url, redis_url, "status")
        assert code == 0
        assert "order_view" in out
        await reader.execute(
            "UPDATE order_view SET total_cents = 7 WHERE order_id = $1", [order_ids[0]]
        )
        code, out, _ = operate(postgres_url, redis_url, "audit", "order_view")
        assert code == 1
        assert f"{order_ids[0]}: total_cents is 7" in out
        assert "5 compared" in out
        assert operate(postgres_url, redis_url, "audit", "--repair")[0] == 0
        code, out, _ = operate(postgres_url, redis_url, "audit")
        assert code == 0
    (bad,) = await shop.place(1)
    await reader.execute(
        "UPDATE outbox SET data = data - 'number' WHERE aggregate_id = $1", [str(bad)]
    )
    with worker(postgres_url, redis_url, tmp_path / "log"):
        await is_projected(reader)
        code, out, _ = operate(postgres_url, redis_url, "parked")
        assert code == 1
        assert f"order_view order {bad}" in out
        assert operate(postgres_url, redis_url, "status")[0] == 1
        code, out, _ = operate(postgres_url, redis_url, "retry", "order_view", str(bad))
        assert code == 1
        assert "failed" in out
        assert operate(postgres_url, redis_url, "rederive", "order_view", str(bad))[0] == 0
        assert operate(postgres_url, redis_url, "skip", "order_list", str(bad))[0] == 0
        assert operate(postgres_url, redis_url, "parked")[0] == 0
    code, _, err = operate(postgres_url, redis_url, "retry", "order_view", "nobody")
    assert (code, err) == (1, "waybill: nobody is not parked in order_view\n")


async def test_the_house_is_kept(
    asyncpg_pool: "asyncpg.Pool[asyncpg.Record]", reader: Connection
) -> None:
    await asyncpg_pool.execute(
        "INSERT INTO idempotency_keys (owner, key, fingerprint, status, body, created_at)"
        " SELECT 'o', 'old-' || n, '', 201, '', now() - interval '49 hours'"
        " FROM generate_series(1, 12000) AS n"
    )
    await asyncpg_pool.execute(
        "INSERT INTO idempotency_keys (owner, key, fingerprint, status, body, created_at)"
        " VALUES ('o', 'new', '', 201, '', now() - interval '47 hours')"
    )
    await asyncpg_pool.execute("SELECT setval('outbox_id', 16777216 * 4 + 5)")
    await asyncpg_pool.execute(
        "INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,"
        " occurred_at) VALUES (1, 'order', 'late', 1, 'order.placed', '{}', 'x', now())"
    )
    await keep_house(reader)
    await keep_house(reader)
    assert await asyncpg_pool.fetchval("SELECT count(*) FROM idempotency_keys") == 1
    for number in (5, 6):
        unique = await asyncpg_pool.fetchval(
            "SELECT count(*) FROM pg_indexes WHERE tablename = $1", f"outbox_{number}"
        )
        assert unique == 2
    await asyncpg_pool.execute("SELECT setval('outbox_id', 16777216 * 5)")
    await asyncpg_pool.execute(
        "INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,"
        " occurred_at) VALUES (1, 'order', 'later', 1, 'order.placed', '{}', 'x', now())"
    )
    assert await asyncpg_pool.fetchval("SELECT count(*) FROM outbox_5") == 1
