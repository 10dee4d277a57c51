"""A shop that writes through the real handlers, one transaction per call, as slowly as is asked."""

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from commands.adjust_stock import AdjustStock, adjust_stock_levels
from commands.cancel_order import CancelOrder, cancel_orders
from commands.command import Command, Handle, Principal, Submission
from commands.events import OrderPlaced
from commands.place_order import OrderedLine, PlaceOrder, place_orders
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

# What the executor does first: the transaction has its id before it locks anything.
TAKE_XID = "SELECT pg_current_xact_id()::text::bigint"


class Shop:
    """So many products with stock enough, and so many customers."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self.pool = pool
        self.skus: list[str] = []
        self.customers: list[UUID] = []
        self.placed: list[UUID] = []

    async def open(self, *, products: int = 10, customers: int = 10) -> None:
        self.skus = [f"SKU-{number:04}" for number in range(products)]
        await self.run([RegisterProduct(sku, f"Product {sku}", 1990, "EUR") for sku in self.skus])
        await self.run([AdjustStock(sku, "main", "opening", delta=10**6) for sku in self.skus])
        registered = await self.run(
            [
                RegisterCustomer(f"buyer{number}@example.com", f"Buyer {number}")
                for number in range(customers)
            ]
        )
        self.customers = [event.customer_id for event in registered]

    async def run(
        self,
        commands: Sequence[Command],
        *,
        pauses_s: tuple[float, float] = (0, 0),
        traceparent: str | None = None,
    ) -> list[Any]:
        """One transaction, with a pause before the locks are taken and one before the commit."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.fetchval(TAKE_XID)
            await asyncio.sleep(pauses_s[0])
            handle = HANDLERS[type(commands[0])]
            batch = [
                Submission(each, BACK_OFFICE, str(uuid4()), traceparent=traceparent)
                for each in commands
            ]
            outcomes = list(await handle(batch, connection=connection, now=datetime.now(UTC)))
            await asyncio.sleep(pauses_s[1])
        self.placed += [each.order_id for each in outcomes if isinstance(each, OrderPlaced)]
        return outcomes

    def order(self, chance: random.Random | None = None, *, lines: int = 2) -> PlaceOrder:
        chance = chance or random.Random()
        skus = chance.sample(self.skus, lines)
        ordered = tuple(OrderedLine(sku, chance.randint(1, 3)) for sku in skus)
        return PlaceOrder(chance.choice(self.customers), "EUR", ordered)

    async def place(self, orders: int, *, lines: int = 2) -> list[UUID]:
        outcomes = await self.run([self.order(lines=lines) for _ in range(orders)])
        return [each.order_id for each in outcomes]

    async def cancel(self, *order_ids: UUID) -> None:
        await self.run([CancelOrder(order_id, "changed their mind") for order_id in order_ids])

    async def adjust(self, sku: str, delta: int = 1) -> None:
        await self.run([AdjustStock(sku, "main", "count", delta=delta)])

    async def trade(self, seconds: float, *, writers: int = 6, seed: int = 1) -> int:
        """Place, cancel and count from several connections; returns the number of transactions."""
        until = asyncio.get_running_loop().time() + seconds
        done = 0

        async def write(chance: random.Random) -> None:
            nonlocal done
            while asyncio.get_running_loop().time() < until:
                pauses = (chance.choice((0, 0, 0.01)), chance.choice((0, 0, 0.01)))
                dice = chance.random()
                if dice < 0.5 or not self.placed:
                    await self.run(
                        [self.order(chance) for _ in range(chance.randint(1, 5))], pauses_s=pauses
                    )
                elif dice < 0.7:
                    order_id = self.placed.pop(chance.randrange(len(self.placed)))
                    await self.run([CancelOrder(order_id, "no")], pauses_s=pauses)
                else:
                    sku = chance.choice(self.skus)
                    await self.run([AdjustStock(sku, "main", "count", delta=1)], pauses_s=pauses)
                done += 1

        await asyncio.gather(*(write(random.Random(seed * 100 + n)) for n in range(writers)))
        return done
