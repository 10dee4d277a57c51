"""What the read side lives on: rows as the write side leaves them, and a worker in slow motion."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
import redis.asyncio

from app.pools import open_redis
from app.servers import Valkey
from queries.cache import APPLIED_CHANNEL, publish_changes, reset
from queries.read_side import ReadSide
from tests.conftest import temporary_directory
from tests.queries.waiting import until

MODELS = ("order_view", "order_list", "stock_availability")
LANES = 16

WRITE_ORDER = """
INSERT INTO orders (order_id, number, customer_id, currency, status, payment_status,
                    fulfillment_status, return_status, allowed_actions, total_cents, version,
                    placed_at, updated_at)
VALUES ($1, nextval('order_number'), $2, 'EUR', 'placed', 'unpaid', 'unfulfilled', 'none',
        '{cancel}', 1000, $3, $4, $4)
ON CONFLICT (order_id) DO UPDATE SET version = $3, updated_at = $4
"""
WRITE_EVENT = """
INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                    occurred_at)
VALUES (0, 'order', $1, $2, 'order.placed', '{}', 'test', $3)
RETURNING xid::text::bigint
"""
APPLY_VIEW = """
INSERT INTO order_view (order_id, number, customer_id, customer, currency, status, payment_status,
                        fulfillment_status, return_status, allowed_actions, total_cents, lines,
                        version, placed_at, updated_at)
SELECT o.order_id, o.number, o.customer_id,
       jsonb_build_object('customer_id', c.customer_id, 'name', c.name, 'email', c.email),
       o.currency, o.status, o.payment_status, o.fulfillment_status, o.return_status,
       o.allowed_actions, o.total_cents,
       '[{"line_no": 1, "sku": "MUG", "location": "main", "name": "Mug", "quantity": 2,
          "unit_price_cents": 500, "line_total_cents": 1000}]',
       o.version, o.placed_at, o.updated_at
FROM orders AS o JOIN customers AS c USING (customer_id)
WHERE o.order_id = ANY ($1::uuid[])
ON CONFLICT (order_id) DO UPDATE
SET version = EXCLUDED.version, updated_at = EXCLUDED.updated_at
RETURNING order_id::text, version, customer_id::text
"""
APPLY_LIST = """
INSERT INTO order_list (order_id, number, customer_id, customer_name, customer_email, currency,
                        status, payment_status, fulfillment_status, return_status, total_cents,
                        line_count, skus, version, placed_at, updated_at)
SELECT o.order_id, o.number, o.customer_id, c.name, c.email, o.currency, o.status,
       o.payment_status, o.fulfillment_status, o.return_status, o.total_cents, 1, '{MUG}',
       o.version, o.placed_at, o.updated_at
FROM orders AS o JOIN customers AS c USING (customer_id)
WHERE o.order_id = ANY ($1::uuid[])
ON CONFLICT (order_id) DO UPDATE
SET version = EXCLUDED.version, updated_at = EXCLUDED.updated_at
"""
APPLY_STOCK = """
INSERT INTO stock_availability (sku, location, on_hand, allocated, reserved, available, version,
                                updated_at)
VALUES ($1, $2, $3, 0, 0, $3, $4, now())
ON CONFLICT (sku, location) DO UPDATE
SET on_hand = EXCLUDED.on_hand, available = EXCLUDED.available, version = EXCLUDED.version
"""
OPEN_CHECKPOINTS = """
WITH models AS (
    INSERT INTO projection_models (read_model, version, system_id)
    SELECT read_model, 1, 1 FROM unnest($1::text[]) AS read_model
)
INSERT INTO projection_positions (read_models, lanes, snapshot, published, moved_at)
SELECT $1, array_agg(lane), pg_current_snapshot(), pg_current_snapshot(), now()
FROM generate_series(0, 15) AS lane
"""
MOVE_CHECKPOINTS = """
UPDATE projection_positions
SET snapshot = pg_current_snapshot(), moved_at = now()
RETURNING snapshot::text
"""
RECORD_PUBLISHED = """
UPDATE projection_positions
SET published = snapshot
"""
PARK = """
INSERT INTO projection_parked (read_model, aggregate, aggregate_id, lane, event_id, error, attempts,
                               parked_at)
VALUES ($1, $2, $3, 0, 1, 'no', 3, now())
"""


class Change(msgspec.Struct):
    """What one commit of the worker has changed: the push that follows it."""

    lanes: list[int]
    models: list[str]
    snapshot: str
    orders: list[tuple[str, int]]
    customers: list[str]
    skus: list[str]
    parked: list[tuple[str, str, str]]


async def command(client: redis.asyncio.Redis, *words: str | bytes) -> Any:
    execute = cast("Any", client.execute_command)  # pyright: ignore[reportUnknownMemberType]
    return await execute(*words)


class Shop:
    """The write side and the worker, each step by itself."""

    def __init__(self, pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
        self.pool = pool
        self.redis = client

    async def open(self) -> None:
        await self.pool.execute(OPEN_CHECKPOINTS, MODELS)

    async def customer(self) -> UUID:
        customer_id = uuid4()
        await self.pool.execute(
            "INSERT INTO customers (customer_id, email, name, version, registered_at, updated_at)"
            " VALUES ($1, 'ada@example.com', 'Ada', 1, now(), now())",
            customer_id,
        )
        return customer_id

    async def write(self, order_id: UUID, version: int, customer_id: UUID) -> int:
        """Commit one version of an order with its event; the transaction is its token."""
        now = datetime.now(UTC)
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(WRITE_ORDER, order_id, customer_id, version, now)
            xid: int = await connection.fetchval(WRITE_EVENT, str(order_id), version, now)
            return xid

    async def apply(
        self, *order_ids: UUID, stock: tuple[str, str, int, int] | None = None
    ) -> Change:
        """Commit what the worker would: rows and checkpoints. Nobody has been told yet."""
        async with (
            self.pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read"),
        ):
            rows = await connection.fetch(APPLY_VIEW, order_ids)
            await connection.execute(APPLY_LIST, order_ids)
            if stock is not None:
                await connection.execute(APPLY_STOCK, *stock)
            snapshot: str = await connection.fetchval(MOVE_CHECKPOINTS)
        return Change(
            lanes=list(range(LANES)),
            models=list(MODELS),
            snapshot=snapshot,
            orders=[(row[0], row[1]) for row in rows],
            customers=sorted({row[2] for row in rows}),
            skus=[stock[0]] if stock is not None else [],
            parked=[],
        )

    async def announce(self, change: Change) -> None:
        await publish_changes(self.redis, msgspec.json.encode(change))
        await self.record_published()

    async def record_published(self) -> None:
        await self.pool.execute(RECORD_PUBLISHED)

    async def reset(self) -> None:
        await reset(self.redis)
        await self.record_published()

    async def publish(self, message: bytes) -> None:
        """A push without tombstones and epochs."""
        await command(self.redis, "PUBLISH", APPLIED_CHANNEL, message)

    async def cut(self, kind: str) -> None:
        """Break all connections of a kind: normal or pubsub."""
        await command(self.redis, "CLIENT", "KILL", "TYPE", kind)

    async def place(self, customer_id: UUID | None = None) -> UUID:
        """An order that is everywhere already."""
        order_id = uuid4()
        await self.write(order_id, 1, customer_id or await self.customer())
        await self.announce(await self.apply(order_id))
        return order_id

    async def change(self, order_id: UUID, version: int) -> int:
        """A new version, everywhere already. Returns its token."""
        customer_id = await self.owner(order_id)
        xid = await self.write(order_id, version, customer_id)
        await self.announce(await self.apply(order_id))
        return xid

    async def owner(self, order_id: UUID) -> UUID:
        owner: UUID = await self.pool.fetchval(
            "SELECT customer_id FROM orders WHERE order_id = $1", order_id
        )
        return owner

    async def park(self, model: str, aggregate: str, aggregate_id: str) -> None:
        await self.pool.execute(PARK, model, aggregate, aggregate_id)


@pytest.fixture
async def shop(asyncpg_pool: asyncpg.Pool, redis_client: redis.asyncio.Redis) -> Shop:
    shop = Shop(asyncpg_pool, redis_client)
    await shop.open()
    return shop


OpenReadSide = Callable[[], AbstractAsyncContextManager[ReadSide]]


@pytest.fixture
def open_read_side(asyncpg_pool: asyncpg.Pool, redis_url: str) -> OpenReadSide:
    """One process's read side, with a Redis client of its own, when pushes have begun."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[ReadSide]:
        async with (
            open_redis(redis_url) as client,
            ReadSide(asyncpg_pool, client) as read_side,
        ):
            await until(lambda: read_side.freshness.is_open)
            yield read_side

    return opened


@pytest.fixture
async def read_side(shop: Shop, open_read_side: OpenReadSide) -> AsyncGenerator[ReadSide]:
    async with open_read_side() as read_side:
        yield read_side


@pytest.fixture
async def other(shop: Shop, open_read_side: OpenReadSide) -> AsyncGenerator[ReadSide]:
    """The read side of another process."""
    async with open_read_side() as read_side:
        yield read_side


@pytest.fixture
def mortal_redis() -> Generator[Valkey]:
    """A Redis of this test's own, which may be killed and started again."""
    with temporary_directory() as directory:
        server = Valkey(directory)
        server.start()
        server.wait_ready()
        try:
            yield server
        finally:
            server.stop()
