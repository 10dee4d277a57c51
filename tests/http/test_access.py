"""Who may do what: scopes by route, and customers by key."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from litestar import Litestar, get
from litestar.exceptions import ImproperlyConfiguredException

from app.http.access import OPEN, check_routes, declared_routes
from app.http.operations import OPERATIONS, Operation
from app.settings import Settings
from app.web import Web
from commands.api_keys import SCOPES
from tests.http.conftest import Client, NewKey, Shop, client_of, order_body


def path_of(operation: Operation) -> str:
    path = operation.path.replace("{order_id}", str(uuid4()))
    return path.replace("{sku}", "MUG").replace("{location}", "main")


async def test_the_table_of_operations_is_the_routes(settings: Settings) -> None:
    async with Web(settings).running() as app:
        routes = {
            (method, path, handler.opt["scope"])
            for path, handler in declared_routes(app)
            for method in handler.http_methods
        }
        names = {handler.handler_name.split(".")[-1] for _, handler in declared_routes(app)}
    documented = {(each.method, each.path, each.scope or OPEN) for each in OPERATIONS}
    assert routes == documented
    assert names == {each.operation_id for each in OPERATIONS}


KEYED = [each for each in OPERATIONS if each.scope is not None]


async def test_a_scope_opens_its_routes_and_no_other(web: Web, new_key: NewKey) -> None:
    for scope in sorted(SCOPES):
        client = client_of(web, await new_key([scope]))
        async with client.http:
            for operation in KEYED:
                answer = await client.http.request(operation.method, path_of(operation))
                if operation.scope == scope:
                    assert answer.status_code not in {401, 403}, (scope, operation.operation_id)
                else:
                    assert answer.status_code == 403, (scope, operation.operation_id)
                    assert answer.json()["scope"] == operation.scope


async def test_nothing_is_open_without_a_key(stranger: Client) -> None:
    for operation in KEYED:
        path = path_of(operation)
        for authorization in (
            "",
            "Basic eDp5",
            "Bearer",
            "Bearer ",
            "Bearer nonsense",
            "bearer a b",
        ):
            answer = await stranger.http.request(
                operation.method, path, headers={"Authorization": authorization}
            )
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_only_the_documented_routes_are_open(stranger: Client) -> None:
    for path in ("/", "/v1", "/docs/x", "/health", "/metrics", "/problems", "//v1/orders"):
        assert (await stranger.get(path)).status_code == 401, path
    for path in ("/health/live", "/openapi.json", "/docs", "/problems/validation"):
        assert (await stranger.get(path)).status_code == 200, path


async def test_the_scheme_is_case_insensitive(web: Web, new_key: NewKey) -> None:
    client = client_of(web, None)
    async with client.http:
        answer = await client.get("/v1/stock", Authorization=f"bEaReR {await new_key()}")
        assert answer.status_code == 200
        twice = [("Authorization", f"Bearer {await new_key()}")] * 2
        assert (await client.http.get("/v1/stock", headers=twice)).status_code == 401


def test_a_route_without_a_scope_stops_the_start() -> None:
    @get("/v1/forgotten")
    async def forgotten() -> None: ...

    @get("/v1/misspelt", opt={"scope": "order:read"})
    async def misspelt() -> None: ...

    @get("/v1/open", opt={"scope": ""})
    async def opened() -> None: ...

    @get("/docs", opt={"scope": "orders:read"})
    async def closed() -> None: ...

    for handler in (forgotten, misspelt, opened, closed):
        with pytest.raises(ImproperlyConfiguredException, match="must declare"):
            check_routes(Litestar([handler], openapi_config=None))


@pytest.fixture
async def storefronts(web: Web, new_key: NewKey, shop: Shop) -> list[tuple[UUID, Client]]:
    """Two customers, each with a key of their own."""
    found: list[tuple[UUID, Client]] = []
    for _ in range(2):
        customer_id = await shop.customer()
        key = await new_key(["orders:read", "orders:write"], customer_id=customer_id)
        found.append((customer_id, client_of(web, key)))
    return found


async def test_a_storefront_sees_and_changes_its_own_orders_only(
    storefronts: list[tuple[UUID, Client]], shop: Shop, asyncpg_pool: asyncpg.Pool
) -> None:
    (mine, me), (theirs, _) = storefronts
    await shop.product(on_hand=10)
    own = (await me.post("/v1/orders", order_body(mine))).json()["order_id"]
    foreign = (await shop.order(theirs)).json()["order_id"]
    placed = await me.post("/v1/orders", order_body(theirs))
    assert (placed.status_code, placed.json()["code"]) == (422, "unknown-customer")
    before = await state_of(asyncpg_pool, foreign)
    hidden = [
        await me.get(f"/v1/orders/{foreign}"),
        await me.post(f"/v1/orders/{foreign}/cancel", {"reason": "mischief"}),
    ]
    absent = [
        await me.get(f"/v1/orders/{uuid4()}"),
        await me.post(f"/v1/orders/{uuid4()}/cancel", {"reason": "mischief"}),
    ]
    for one, other in zip(hidden, absent, strict=True):
        assert (one.status_code, one.json()["code"]) == (404, "not-found")
        assert one.json().keys() == other.json().keys()
    assert await state_of(asyncpg_pool, foreign) == before
    listed = await me.get(f"/v1/orders?customer_id={theirs}")
    assert listed.json()["data"] == []
    assert (await me.post(f"/v1/orders/{own}/cancel", {"reason": "mine"})).status_code == 200


async def state_of(pool: asyncpg.Pool, order_id: str) -> Any:
    return await pool.fetchrow("SELECT * FROM orders WHERE order_id = $1::uuid", order_id)
