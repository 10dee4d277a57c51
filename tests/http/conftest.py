"""Web processes in this one, clients whose answers are held against the contract, and a shop."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from app.settings import ROOT, Settings
from app.web import Web
from commands.api_keys import SCOPES, issue_api_key
from tests.http.contract import judge

PLENTY = 1_000_000
"""Requests per minute that no test comes near."""


class Client:
    """One key's HTTP client."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers=_headers(headers))

    async def post(
        self, path: str, body: Any, *, key: str | None = None, **headers: str
    ) -> httpx.Response:
        """Post a command; `body` is JSON, or the bytes to send as they are."""
        sent = {
            "Idempotency-Key": key or str(uuid4()),
            "Content-Type": "application/json",
            **_headers(headers),
        }
        if isinstance(body, bytes):
            return await self.http.post(path, content=body, headers=sent)
        return await self.http.post(path, json=body, headers=sent)


class Shop:
    """What orders need, set up over HTTP."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def product(self, sku: str = "MUG", *, on_hand: int = 0, price_cents: int = 1290) -> str:
        body = {"sku": sku, "name": f"The {sku}", "price_cents": price_cents, "currency": "EUR"}
        assert (await self.client.post("/v1/products", body)).status_code == 201
        if on_hand:
            adjustment = {"delta": on_hand, "reason": "delivery"}
            path = f"/v1/stock/{sku}/main/adjustments"
            assert (await self.client.post(path, adjustment)).status_code == 201
        return sku

    async def customer(self) -> UUID:
        answer = await self.client.post("/v1/customers", {"email": "a@b.example", "name": "Ada"})
        return UUID(answer.json()["customer_id"])

    async def order(self, customer_id: UUID, sku: str = "MUG", quantity: int = 1) -> httpx.Response:
        return await self.client.post("/v1/orders", order_body(customer_id, sku, quantity))


def order_body(customer_id: UUID, sku: str = "MUG", quantity: int = 1) -> dict[str, Any]:
    return {
        "customer_id": str(customer_id),
        "currency": "EUR",
        "lines": [{"sku": sku, "quantity": quantity}],
    }


NewKey = Callable[..., Awaitable[str]]


@pytest.fixture
def settings(postgres_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return Settings(
        postgres_url=postgres_url, redis_url=redis_url, data_dir=tmp_path, trace_ratio=0
    )


@pytest.fixture
async def web(settings: Settings) -> AsyncGenerator[Web]:
    """One web process."""
    web = Web(settings)
    async with web.running():
        yield web


@pytest.fixture
def new_key(asyncpg_pool: asyncpg.Pool) -> NewKey:
    """Issue a key: scopes, customer_id, requests_per_minute, owner."""

    async def new(
        scopes: Sequence[str] = sorted(SCOPES),
        *,
        customer_id: UUID | None = None,
        requests_per_minute: int = PLENTY,
        owner: str = "tests",
    ) -> str:
        async with asyncpg_pool.acquire() as connection:
            _, key = await issue_api_key(
                connection,
                owner=owner,
                name="a test's",
                scopes=scopes,
                customer_id=customer_id,
                requests_per_minute=requests_per_minute,
                expires_at=None,
                now=datetime.now(UTC),
            )
        return key

    return new


@pytest.fixture
async def worker(settings: Settings) -> AsyncGenerator[None]:
    """A worker process: what is written becomes visible."""
    environ = {
        **os.environ,
        "WAYBILL_POSTGRES_URL": str(settings.postgres_url),
        "WAYBILL_REDIS_URL": str(settings.redis_url),
        "WAYBILL_DATA_DIR": str(settings.data_dir),
    }
    log = settings.data_dir / "worker.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "workers", cwd=ROOT, env=environ, stderr=output
        )
        yield
        process.terminate()
        await process.wait()


def client_of(web: Web, key: str | None) -> Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return Client(
        httpx.AsyncClient(
            transport=httpx.ASGITransport(cast("Any", web)),
            base_url="http://waybill",
            headers=headers,
            event_hooks={"response": [judge]},
        )
    )


@pytest.fixture
async def client(web: Web, new_key: NewKey) -> AsyncGenerator[Client]:
    """A client that may do everything."""
    client = client_of(web, await new_key())
    async with client.http:
        yield client


@pytest.fixture
async def stranger(web: Web) -> AsyncGenerator[Client]:
    """A client without a key."""
    client = client_of(web, None)
    async with client.http:
        yield client


@pytest.fixture
def shop(client: Client) -> Shop:
    return Shop(client)


def _headers(named: Mapping[str, str]) -> dict[str, str]:
    """`if_match=...` is If-Match."""
    return {name.replace("_", "-"): value for name, value in named.items()}
