import asyncio
from uuid import UUID, uuid4

import redis.asyncio

from queries.cache import WAKE_CHANNEL
from tests.http.conftest import Client, Shop, order_body


async def test_a_product_is_registered_once(client: Client) -> None:
    body = {"sku": "MUG", "name": "Mug", "price_cents": 1290, "currency": "EUR"}
    first = await client.post("/v1/products", body)
    assert (first.status_code, first.json()) == (201, {"sku": "MUG", "version": 1})
    assert first.headers["etag"] == '"v1"'
    assert first.headers["location"] == "/v1/products/MUG"
    again = await client.post("/v1/products", body)
    assert (again.status_code, again.json()["code"]) == (409, "duplicate-sku")
    assert again.json()["errors"][0]["pointer"] == "/sku"


async def test_a_customer_is_registered(client: Client) -> None:
    answer = await client.post("/v1/customers", {"email": "a@b.example", "name": "Ada"})
    assert answer.status_code == 201
    assert answer.json() == {"customer_id": answer.json()["customer_id"], "version": 1}
    assert answer.headers["location"] == f"/v1/customers/{answer.json()['customer_id']}"


async def test_stock_moves_by_a_delta_and_to_a_count(client: Client, shop: Shop) -> None:
    await shop.product()
    path = "/v1/stock/MUG/main/adjustments"
    delivered = await client.post(path, {"delta": 10, "reason": "delivery"})
    assert delivered.status_code == 201
    assert delivered.json() == {
        "sku": "MUG",
        "location": "main",
        "on_hand": 10,
        "allocated": 0,
        "reserved": 0,
        "available": 10,
        "version": 1,
    }
    assert delivered.headers["location"] == "/v1/stock?sku=MUG&location=main"
    counted = await client.post(path, {"set_to": 8, "expected_on_hand": 10, "reason": "count"})
    assert (counted.json()["on_hand"], counted.headers["etag"]) == (8, '"v2"')
    stale = await client.post(path, {"set_to": 7, "expected_on_hand": 10, "reason": "count"})
    assert (stale.status_code, stale.json()["code"]) == (409, "stale-quantity")
    assert stale.json()["on_hand"] == 8


async def test_promised_stock_is_not_written_off(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    assert (await shop.order(await shop.customer(), quantity=4)).status_code == 201
    answer = await client.post("/v1/stock/MUG/main/adjustments", {"delta": -2, "reason": "broken"})
    assert (answer.status_code, answer.json()["code"]) == (409, "would-breach-commitments")


async def test_a_level_of_no_product_is_not_found(client: Client) -> None:
    for path in ["/v1/stock/NONE/main/adjustments", "/v1/stock/a b/c/adjustments"]:
        answer = await client.post(path, {"delta": 1, "reason": "delivery"})
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path


async def test_an_order_is_placed(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    customer_id = await shop.customer()
    answer = await client.post(
        "/v1/orders",
        {**order_body(customer_id, quantity=2), "expected_total_cents": 2580},
    )
    assert answer.status_code == 201
    order = answer.json()
    assert order == {
        "order_id": order["order_id"],
        "number": order["number"],
        "status": "placed",
        "currency": "EUR",
        "total_cents": 2580,
        "version": 1,
        "placed_at": order["placed_at"],
    }
    assert order["placed_at"].endswith("Z")
    assert answer.headers["location"] == f"/v1/orders/{order['order_id']}"
    timeline, xid = answer.headers["consistency-token"].split(".")
    assert int(timeline) >= 1
    assert int(xid) > 0


async def test_what_is_short_is_told_per_line(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    answer = await shop.order(await shop.customer(), quantity=6)
    assert (answer.status_code, answer.json()["code"]) == (409, "insufficient-stock")
    assert answer.json()["lines"] == [
        {"line_no": 1, "sku": "MUG", "location": "main", "quantity": 6, "available": 5}
    ]
    assert answer.json()["errors"][0]["pointer"] == "/lines/0/quantity"


async def test_a_wrong_sum_is_refused(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    body = {**order_body(await shop.customer()), "expected_total_cents": 1}
    answer = await client.post("/v1/orders", body)
    assert (answer.status_code, answer.json()["code"]) == (409, "total-mismatch")
    assert answer.json()["total_cents"] == 1290


async def test_unknown_things_are_pointed_at(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    customer_id = await shop.customer()
    product = await client.post("/v1/orders", order_body(customer_id, sku="NONE"))
    assert (product.status_code, product.json()["code"]) == (422, "unknown-product")
    assert product.json()["errors"][0]["pointer"] == "/lines/0/sku"
    customer = await client.post("/v1/orders", order_body(uuid4()))
    assert (customer.status_code, customer.json()["code"]) == (422, "unknown-customer")
    dollars = {**order_body(customer_id), "currency": "USD"}
    currency = await client.post("/v1/orders", dollars)
    assert (currency.status_code, currency.json()["code"]) == (422, "currency-mismatch")


async def test_an_external_reference_is_taken_once(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    body = {**order_body(await shop.customer()), "external_reference": "shop-1"}
    assert (await client.post("/v1/orders", body)).status_code == 201
    again = await client.post("/v1/orders", body)
    assert (again.status_code, again.json()["code"]) == (409, "duplicate-external-reference")


async def test_an_order_is_cancelled_once(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    order_id = (await shop.order(await shop.customer())).json()["order_id"]
    path = f"/v1/orders/{order_id}/cancel"
    answer = await client.post(path, {"reason": "changed my mind"})
    assert answer.status_code == 200
    assert answer.json() == {"order_id": order_id, "status": "cancelled", "version": 2}
    assert answer.headers["etag"] == '"v2"'
    again = await client.post(path, {"reason": "changed my mind"})
    assert (again.status_code, again.json()["code"]) == (409, "invalid-transition")
    assert again.json()["order_status"] == "cancelled"


async def test_an_order_that_is_not_there_is_not_cancelled(client: Client) -> None:
    for order_id in [str(uuid4()), "nonsense", "%00", "%ff"]:
        answer = await client.post(f"/v1/orders/{order_id}/cancel", {"reason": "why not"})
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), order_id


async def test_a_refusal_is_replayed_byte_for_byte(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=1)
    body = order_body(await shop.customer(), quantity=2)
    first = await client.post("/v1/orders", body, key="refused")
    again = await client.post("/v1/orders", body, key="refused")
    assert first.status_code == again.status_code == 409
    assert first.content == again.content
    assert again.headers["idempotent-replayed"] == "true"
    assert first.json()["instance"] == "/v1/orders"


async def test_workers_are_woken_after_a_commit(
    client: Client, redis_client: redis.asyncio.Redis
) -> None:
    async with redis_client.pubsub() as push:  # pyright: ignore[reportUnknownMemberType]
        await push.subscribe(WAKE_CHANNEL)  # pyright: ignore[reportUnknownMemberType]
        assert await push.get_message(timeout=1) is not None  # that it is subscribed
        body = {"email": "a@b.example", "name": "Ada"}
        await asyncio.gather(*(client.post("/v1/customers", body) for _ in range(20)))
        assert await push.get_message(ignore_subscribe_messages=True, timeout=1) is not None


async def test_ids_are_as_they_were_given(client: Client, shop: Shop) -> None:
    answer = await client.post(
        "/v1/customers", {"email": "a@b.example", "name": "Ada"}, X_Request_Id="from-me-1"
    )
    assert answer.headers["x-request-id"] == "from-me-1"
    assert UUID((await client.get("/v1/stock", X_Request_Id="no good\x7f")).headers["x-request-id"])
