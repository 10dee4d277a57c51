import asyncio

import asyncpg

from app.web import Web
from tests.http.conftest import Client, NewKey, Shop, client_of, order_body


async def test_fifty_at_once_with_one_key_are_one_order(
    client: Client, shop: Shop, asyncpg_pool: asyncpg.Pool
) -> None:
    await shop.product(on_hand=100)
    body = order_body(await shop.customer())
    answers = await asyncio.gather(
        *(client.post("/v1/orders", body, key="once") for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 49
    assert len({answer.headers["consistency-token"] for answer in answers}) == 1
    assert await asyncpg_pool.fetchval("SELECT count(*) FROM orders") == 1
    assert await asyncpg_pool.fetchval("SELECT allocated FROM stock_levels") == 1


async def test_another_request_under_the_key_is_refused(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=100)
    customer_id = await shop.customer()
    assert (await client.post("/v1/orders", order_body(customer_id), key="k")).status_code == 201
    other = await client.post("/v1/orders", order_body(customer_id, quantity=2), key="k")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")
    elsewhere = await client.post("/v1/customers", {"email": "a@b.c", "name": "Ada"}, key="k")
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (422, "idempotency-key-reused")


async def test_a_key_belongs_to_its_owner(
    client: Client, web: Web, new_key: NewKey, shop: Shop
) -> None:
    other = client_of(web, await new_key(owner="somebody else"))
    async with other.http:
        body = {"email": "a@b.c", "name": "Ada"}
        mine = await client.post("/v1/customers", body, key="k")
        theirs = await other.post("/v1/customers", body, key="k")
    assert mine.json()["customer_id"] != theirs.json()["customer_id"]


async def test_a_key_that_cannot_be_one_is_missing(client: Client) -> None:
    for key in ["", " ", "a b", "x" * 256, "a\tb", "a\x7f"]:
        answer = await client.post(
            "/v1/customers", {"email": "a@b.c", "name": "Ada"}, Idempotency_Key=key
        )
        assert (answer.status_code, answer.json()["code"]) == (400, "idempotency-key-missing"), key


async def test_every_command_needs_a_key(client: Client) -> None:
    for path in (
        "/v1/products",
        "/v1/customers",
        "/v1/orders",
        "/v1/stock/A/main/adjustments",
        "/v1/orders/019a2f4e-7c1b-7d3e-9f60-2b6d1c8e4a51/cancel",
    ):
        answer = await client.http.post(path, json={})
        assert (answer.status_code, answer.json()["code"]) == (400, "idempotency-key-missing")
