import asyncio
from functools import partial
from typing import Any, cast

import asyncpg
import pytest
from msgspec import structs

from app.http.health import Health
from app.settings import Settings
from app.web import Web
from tests.http.conftest import Client, NewKey, Shop, client_of

NOWHERE = "postgresql://waybill@127.0.0.1:1/waybill"


async def readiness(settings: Settings) -> tuple[int, dict[str, Any]]:
    web = Web(settings)
    async with web.running():
        client = client_of(web, None)
        async with client.http:
            answer = await client.get("/health/ready")
    return answer.status_code, answer.json()


async def test_all_is_well(settings: Settings) -> None:
    status, report = await readiness(settings)
    assert (status, report["status"]) == (200, "ready")
    assert report["postgres"]["status"] == report["redis"]["status"] == "up"


async def test_without_redis_it_is_ready_and_degraded(settings: Settings, new_key: NewKey) -> None:
    settings = structs.replace(settings, redis_url="redis://127.0.0.1:1")
    status, report = await readiness(settings)
    assert (status, report["status"], report["redis"]["status"]) == (200, "degraded", "down")
    web = Web(settings)
    async with web.running():
        client = client_of(web, await new_key())
        async with client.http:
            await Shop(client).product(on_hand=3)
            assert (await client.get("/v1/stock")).status_code == 200


async def test_without_postgresql_it_is_not_ready(settings: Settings) -> None:
    status, report = await readiness(structs.replace(settings, postgres_url=NOWHERE))
    assert (status, report["status"]) == (503, "unavailable")
    assert report["postgres"]["status"] == "down"


async def test_without_postgresql_every_answer_is_a_problem(settings: Settings) -> None:
    web = Web(structs.replace(settings, postgres_url=NOWHERE))
    async with web.running():
        client = client_of(web, "wb_some_key")
        async with client.http:
            for answer in (
                await client.get("/v1/stock"),
                await client.post("/v1/customers", {"email": "a@b.c", "name": "Ada"}),
            ):
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert (await client.get("/health/live")).status_code == 200


async def test_a_database_without_migrations_is_not_ready(
    settings: Settings, asyncpg_pool: asyncpg.Pool
) -> None:
    await asyncpg_pool.execute("DELETE FROM schema_migrations WHERE name LIKE '0002%'")
    status, report = await readiness(settings)
    assert (status, report["postgres"]["status"]) == (503, "migrations missing")
    assert "0002_read_side.sql" in report["postgres"]["detail"]
    await asyncpg_pool.execute("DROP TABLE schema_migrations")
    assert (await readiness(settings))[0] == 503


def test_a_task_that_has_ended_is_told() -> None:
    running = {"wake": True, "place_order": True}
    is_running = {name: partial(running.__getitem__, name) for name in running}
    health = Health(cast("Any", None), cast("Any", None), is_running)
    assert health.liveness().status == "alive"
    running["place_order"] = False
    assert health.liveness().ended == ("place_order",)


async def test_a_broken_process_asks_for_a_restart(
    web: Web, stranger: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queries.freshness.Freshness.is_running", property(lambda _: False))
    answer = await stranger.get("/health/live")
    assert (answer.status_code, answer.json()["ended"]) == (503, ["read_side"])


async def test_metrics_tell_of_everything_inside(settings: Settings, new_key: NewKey) -> None:
    web = Web(structs.replace(settings, webs=2))
    async with web.running():
        client = client_of(web, await new_key())
        async with client.http:
            await Shop(client).product()
            page = (await client.get("/metrics")).text
    for name in (
        'waybill_command_queue{command="place_order"',
        'waybill_command_batch_size_bucket{command="register_product"',
        'waybill_pool_open_connections{pool="commands"',
        'waybill_pool_idle_connections{pool="queries"',
        'waybill_cache_events_total{event="local_hit"',
        "waybill_cache_state{",
        'waybill_http_rate_limited_total{process="',
        "process_cpu_seconds_total{",
    ):
        assert name in page, name
    samples = [line for line in page.splitlines() if line and not line.startswith("#")]
    assert all("process=" in line for line in samples)


async def test_a_process_ends_in_good_order(settings: Settings) -> None:
    before = asyncio.all_tasks()
    async with Web(settings).running():
        assert asyncio.all_tasks() - before
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before == set()
