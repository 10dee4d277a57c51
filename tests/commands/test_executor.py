"""A batch that breaks: alone the guilty one fails, and nothing acknowledged is lost or doubled."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg
import pytest

from commands import executor
from commands.command import Batch, Connection, Outcome
from commands.executor import OutcomeUnknown, Overloaded
from commands.place_order import PlaceOrder, place_orders
from tests.commands.conftest import HANDLERS, House, buy, open_house, violations


async def test_commands_that_arrive_together_share_a_transaction(house: House) -> None:
    await house.product("pen", on_hand=1000)
    ada = await house.customer()
    house.batches.clear()
    await asyncio.gather(*(house.submit(buy(ada, ("pen", 1))) for _ in range(40)))
    assert sum(house.batches) == 40
    assert max(house.batches) > 1


async def test_a_poisonous_command_fails_alone(postgres_url: str) -> None:
    async def choke_on_thirteen(
        batch: Batch[PlaceOrder], *, connection: Connection, now: datetime
    ) -> Sequence[Outcome]:
        outcomes = await place_orders(batch, connection=connection, now=now)
        if any(line.quantity == 13 for each in batch for line in each.command.lines):
            await connection.execute("SELECT 1 / 0")
        return outcomes

    async with open_house(postgres_url, {**HANDLERS, PlaceOrder: choke_on_thirteen}) as house:
        await house.product("pen", on_hand=1000)
        ada = await house.customer()
        results: list[Any] = await asyncio.gather(
            *(house.submit(buy(ada, ("pen", quantity))) for quantity in range(1, 21)),
            return_exceptions=True,
        )
        failed = [each for each in results if isinstance(each, BaseException)]
        assert [type(each) for each in failed] == [asyncpg.DivisionByZeroError]
        assert await house.pool.fetchval("SELECT count(*) FROM orders") == 19
        assert await violations(house.pool) == []


async def test_connections_killed_at_random_lose_and_double_nothing(house: House) -> None:
    await house.product("pen", on_hand=100_000)
    ada = await house.customer()
    acknowledged: set[str] = set()
    unknown = 0
    stop = asyncio.Event()

    async def client(number: int) -> None:
        nonlocal unknown
        for turn in range(40):
            key = f"{number}-{turn}"
            try:
                answer = await house.submit(buy(ada, ("pen", 1)), key=key)
            except (OutcomeUnknown, Overloaded):
                unknown += 1
            else:
                assert answer.status == 201
                acknowledged.add(key)

    async def assassin() -> int:
        kills = 0
        while not stop.is_set():
            kills += await house.pool.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND state <> 'idle' AND query NOT LIKE 'SELECT count(pg_term%'"
            )
            await asyncio.sleep(0.02)
        return kills

    killing = asyncio.create_task(assassin())
    await asyncio.gather(*(client(number) for number in range(16)))
    stop.set()
    assert await killing > 0
    stored = {row["key"] for row in await house.pool.fetch("SELECT key FROM idempotency_keys")}
    assert acknowledged <= stored
    placed = await house.pool.fetchval("SELECT count(*) FROM orders")
    answers = await house.pool.fetchval(
        "SELECT count(*) FROM idempotency_keys WHERE key ~ '^[0-9]+-[0-9]+$' AND status = 201"
    )
    assert placed == answers >= len(acknowledged)
    assert await violations(house.pool) == []


async def test_a_full_queue_sheds(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.product("pen", on_hand=1000)
    ada = await house.customer()
    monkeypatch.setattr(executor, "QUEUE_MAX", 10)
    results = await asyncio.gather(
        *(house.submit(buy(ada, ("pen", 1))) for _ in range(30)), return_exceptions=True
    )
    shed = sum(isinstance(each, Overloaded) for each in results)
    assert shed == 20
    assert await house.pool.fetchval("SELECT count(*) FROM orders") == 10


async def test_a_command_whose_client_has_gone_is_not_run(house: House) -> None:
    await house.product("pen", on_hand=1000)
    ada = await house.customer()
    gone = asyncio.ensure_future(house.submit(buy(ada, ("pen", 1))))
    await asyncio.sleep(0)
    gone.cancel()
    await house.submit(buy(ada, ("pen", 1)))
    assert await house.pool.fetchval("SELECT count(*) FROM orders") == 1
