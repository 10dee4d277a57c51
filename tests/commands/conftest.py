"""A house of executors on a fresh database; two of them stand for two web processes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from commands.adjust_stock import AdjustStock, adjust_stock_levels
from commands.cancel_order import CancelOrder, cancel_orders
from commands.command import Command, Handle, Outcome, Principal, Submission
from commands.executor import Answer, Executor, Rendered
from commands.place_order import OrderedLine, PlaceOrder, place_orders
from commands.refusals import Refusal
from commands.register_customer import RegisterCustomer, register_customers
from commands.register_product import RegisterProduct, register_products

HANDLERS: dict[type[Command], Handle] = {
    PlaceOrder: place_orders,
    CancelOrder: cancel_orders,
    AdjustStock: adjust_stock_levels,
    RegisterProduct: register_products,
    RegisterCustomer: register_customers,
}
BACK_OFFICE = Principal(uuid4(), "back-office", frozenset(), None, 1_000_000)


def render(_submission: Submission[Any], outcome: Outcome) -> Rendered:
    if isinstance(outcome, Refusal):
        return Rendered(409, msgspec.json.encode(outcome))
    body = msgspec.json.encode({"aggregate_id": outcome.aggregate_id, "version": outcome.version})
    return Rendered(201, body, etag=f'"v{outcome.version}"')


class House:
    """What one web process runs of the write side."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", handlers: dict[type[Command], Handle]
    ) -> None:
        self.pool = pool
        self.batches: list[int] = []
        self.executors: dict[type[Command], Executor[Any]] = {
            kind: Executor(
                handle,
                postgres=pool,
                render=render,
                committed=lambda: None,
                observe=lambda size, _seconds: self.batches.append(size),
            )
            for kind, handle in handlers.items()
        }

    async def submit(
        self,
        command: Command,
        *,
        key: str | None = None,
        principal: Principal = BACK_OFFICE,
        expected_version: int | None = None,
    ) -> Answer:
        submission = Submission(command, principal, key or str(uuid4()), expected_version)
        return await self.executors[type(command)].submit(submission)

    async def product(self, sku: str, *, on_hand: int = 0, price_cents: int = 1000) -> None:
        answer = await self.submit(RegisterProduct(sku, f"The {sku}", price_cents, "EUR"))
        assert answer.status == 201, answer
        if on_hand:
            answer = await self.submit(AdjustStock(sku, "main", "delivery", delta=on_hand))
            assert answer.status == 201, answer

    async def customer(self) -> UUID:
        answer = await self.submit(RegisterCustomer("ada@example.org", "Ada Lovelace"))
        return UUID(msgspec.json.decode(answer.body)["aggregate_id"])


@asynccontextmanager
async def open_house(
    url: str, handlers: dict[type[Command], Handle] | None = None
) -> AsyncGenerator[House, None]:
    async with asyncpg.create_pool(url, min_size=1, max_size=10) as pool:
        house = House(pool, handlers or HANDLERS)
        tasks = [asyncio.create_task(each.run()) for each in house.executors.values()]
        try:
            yield house
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def house(postgres_url: str) -> AsyncGenerator[House, None]:
    async with open_house(postgres_url) as opened:
        yield opened


@pytest.fixture
async def other_house(postgres_url: str) -> AsyncGenerator[House, None]:
    async with open_house(postgres_url) as opened:
        yield opened


def buy(customer_id: UUID, *wanted: tuple[str, int], **more: Any) -> PlaceOrder:
    lines = tuple(OrderedLine(sku, quantity) for sku, quantity in wanted)
    return PlaceOrder(customer_id, "EUR", lines, **more)


# What must hold on the write side whatever happened. Rows: violations, none when all is well.
VIOLATIONS = """
SELECT 'ledger differs from level' AS what, level.sku AS which
FROM stock_levels AS level
LEFT JOIN (SELECT sku, location, sum(on_hand_delta) AS on_hand, sum(allocated_delta) AS allocated
           FROM stock_movements GROUP BY 1, 2) AS ledger USING (sku, location)
WHERE (level.on_hand, level.allocated)
      IS DISTINCT FROM (coalesce(ledger.on_hand, 0), coalesce(ledger.allocated, 0))
UNION ALL
SELECT 'allocated more than there is', sku
FROM stock_levels WHERE on_hand - allocated - reserved < -backorder_limit
UNION ALL
SELECT 'line without its allocation', line.order_id::text
FROM order_lines AS line JOIN orders AS o USING (order_id)
LEFT JOIN (SELECT order_id, sku, location, sum(allocated_delta) AS allocated
           FROM stock_movements GROUP BY 1, 2, 3) AS ledger USING (order_id, sku, location)
WHERE coalesce(ledger.allocated, 0) <> CASE o.status WHEN 'cancelled' THEN 0 ELSE (
    SELECT sum(quantity) FROM order_lines AS same
    WHERE (same.order_id, same.sku, same.location) = (line.order_id, line.sku, line.location)) END
UNION ALL
SELECT 'allocation without an order', ledger.order_id::text
FROM stock_movements AS ledger LEFT JOIN orders AS o USING (order_id)
WHERE ledger.order_id IS NOT NULL AND o.order_id IS NULL
UNION ALL
SELECT 'total differs from lines', order_id::text
FROM orders AS o
WHERE total_cents <> (SELECT sum(line_total_cents) FROM order_lines AS l
                      WHERE l.order_id = o.order_id)
UNION ALL
SELECT 'versions have a gap', aggregate_id
FROM outbox GROUP BY aggregate_id
HAVING max(aggregate_version) <> count(*) OR min(aggregate_version) <> 1
UNION ALL
SELECT 'version differs from events', o.order_id::text
FROM orders AS o
WHERE version <> (SELECT count(*) FROM outbox WHERE aggregate_id = o.order_id::text)
"""


async def violations(pool: "asyncpg.Pool[asyncpg.Record]") -> list[tuple[str, str]]:
    return [(row["what"], row["which"]) for row in await pool.fetch(VIOLATIONS)]
