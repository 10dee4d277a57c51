from uuid import uuid4

import asyncpg
import httpx
import pytest

from app.settings import Settings
from app.web import Web
from tests.http.conftest import Client, NewKey, Shop, client_of

PATIENT = "wait=20, handling=strict"


def token_of(answer: httpx.Response) -> str:
    token: str = answer.headers["consistency-token"]
    return token


@pytest.mark.usefixtures("worker")
async def test_a_read_with_a_token_shows_that_command(
    client: Client, shop: Shop, settings: Settings
) -> None:
    await shop.product(on_hand=10)
    customer_id = await shop.customer()
    placed = await shop.order(customer_id, quantity=2)
    path, token = placed.headers["location"], token_of(placed)

    order = await client.get(path, Consistency_Token=token, Prefer=PATIENT)
    assert order.status_code == 200
    assert order.headers["etag"] == '"v1"'
    assert order.headers["preference-applied"] == "wait=20, handling=strict"
    assert order.headers["cache-control"] == "private, no-cache"
    assert order.headers["vary"] == "Authorization"
    assert "projection-lag" not in order.headers
    expected = placed.json()
    assert order.json() == {
        **order.json(),
        **{name: expected[name] for name in ("order_id", "number", "status", "version")},
        "customer": {
            "customer_id": str(customer_id),
            "name": "Ada",
            "email": "a@b.example",
        },
        "allowed_actions": ["cancel"],
    }
    assert order.json()["lines"][0]["line_total_cents"] == 2580

    for if_none_match in ('"v1"', 'W/"v1"', "*", '"v7", "v1"'):
        known = await client.get(path, If_None_Match=if_none_match)
        assert (known.status_code, known.content) == (304, b"")
        assert known.headers["etag"] == '"v1"'
    head = await client.http.head(path)
    assert head.headers["content-length"] == str(len(order.content))

    cancelled = await client.post(f"{path}/cancel", {"reason": "r"}, If_Match='"v1"')
    # Another process, whose caches know nothing of it.
    other = Web(settings)
    async with other.running():
        elsewhere = client_of(other, client.http.headers["authorization"].split()[1])
        async with elsewhere.http:
            for each in (client, elsewhere):
                again = await each.get(
                    path,
                    Consistency_Token=token_of(cancelled),
                    Prefer=PATIENT,
                    If_None_Match='"v1"',
                )
                assert (again.status_code, again.json()["status"]) == (200, "cancelled")
                assert again.headers["etag"] == '"v2"'

    listed = await client.get(
        "/v1/orders?status=cancelled", Consistency_Token=token_of(cancelled), Prefer=PATIENT
    )
    assert [each["order_id"] for each in listed.json()["data"]] == [expected["order_id"]]
    stock = await client.get(
        "/v1/stock?sku=MUG&sku=POT", Consistency_Token=token_of(cancelled), Prefer=PATIENT
    )
    assert [each["available"] for each in stock.json()["data"]] == [10]
    projections = await client.get("/v1/projections")
    assert {each["state"] for each in projections.json()["data"]} == {"current"}
    assert (
        'waybill_projection_lag_seconds{read_model="order_view"} 0.0'
        in (await client.get("/metrics")).text
    )


@pytest.mark.usefixtures("worker")
async def test_pages_lead_to_each_other(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=100)
    customer_id = await shop.customer()
    placed = [await shop.order(customer_id) for _ in range(7)]
    ids = [each.json()["order_id"] for each in placed]
    found: list[str] = []
    path = "/v1/orders?limit=3&sort=placed_at&sku=MUG"
    while path:
        page = await client.get(path, Consistency_Token=token_of(placed[-1]), Prefer=PATIENT)
        found += [each["order_id"] for each in page.json()["data"]]
        cursor = page.json()["meta"]["next_cursor"]
        assert ("link" in page.headers) == (cursor is not None)
        path = page.links["next"]["url"] if "link" in page.headers else ""
        assert cursor is None or f"cursor={cursor}" in path
    assert found == ids
    other = await client.get(f"/v1/orders?limit=3&cursor={'x' * 10}")
    assert (other.status_code, other.json()["errors"][0]["parameter"]) == (400, "cursor")


@pytest.mark.usefixtures("worker")
async def test_no_cache_shows_an_order_to_a_stranger(
    web: Web, client: Client, shop: Shop, new_key: NewKey
) -> None:
    await shop.product(on_hand=10)
    mine, theirs = await shop.customer(), await shop.customer()
    placed = await shop.order(theirs)
    path, token = placed.headers["location"], token_of(placed)
    storefront = client_of(web, await new_key(["orders:read"], customer_id=mine))
    owner = client_of(web, await new_key(["orders:read"], customer_id=theirs))
    async with storefront.http, owner.http:
        for _ in range(2):
            for reader, status, orders in ((client, 200, 1), (owner, 200, 1), (storefront, 404, 0)):
                answer = await reader.get(path, Consistency_Token=token, Prefer=PATIENT)
                assert answer.status_code == status
                listed = await reader.get("/v1/orders", Consistency_Token=token, Prefer=PATIENT)
                assert len(listed.json()["data"]) == orders
        known = await storefront.get(path, If_None_Match='"v1"')
        assert known.status_code == 404


async def test_a_404_is_never_a_lie(client: Client, shop: Shop) -> None:
    """No worker runs: the order exists, and the read model will not have it."""
    await shop.product(on_hand=1)
    placed = await shop.order(await shop.customer())
    answer = await client.get(placed.headers["location"], Prefer="wait=0")
    assert (answer.status_code, answer.json()["code"]) == (503, "projection-lag")
    assert answer.json()["retryable"] is True
    assert float(answer.headers["projection-lag"]) >= 0
    assert answer.headers["retry-after"]
    assert (await client.get(f"/v1/orders/{uuid4()}")).status_code == 404


async def test_what_lags_says_so_unless_the_client_is_strict(
    client: Client, shop: Shop, asyncpg_pool: asyncpg.Pool
) -> None:
    """No worker runs, so no list will ever show the order."""
    await shop.product(on_hand=1)
    token = token_of(await shop.order(await shop.customer()))
    for path in ("/v1/orders", "/v1/stock"):
        late = await client.get(path, Consistency_Token=token, Prefer="wait=0.1")
        assert (late.status_code, late.json()["data"]) == (200, [])
        assert float(late.headers["projection-lag"]) > 0
        assert late.headers["preference-applied"] == "wait=0.1"
        strict = await client.get(
            path, Consistency_Token=token, Prefer="handling=strict; x=y, wait=0.1, wait=30"
        )
        assert (strict.status_code, strict.json()["code"]) == (503, "projection-lag")


async def test_a_token_that_is_none_is_refused(client: Client) -> None:
    for token in ["", "x", "1", "1.", ".1", "1.2.3", "-1.5", "1." + "9" * 20, "1.5 "]:
        for path in (f"/v1/orders/{uuid4()}", "/v1/orders", "/v1/stock"):
            answer = await client.get(path, Consistency_Token=token)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid-parameter"), token


async def test_a_token_of_another_timeline_proves_nothing(client: Client) -> None:
    answer = await client.get("/v1/stock", Consistency_Token="77.5")
    assert answer.status_code == 200
    assert "projection-lag" in answer.headers
    strict = await client.get("/v1/stock", Consistency_Token="77.5", Prefer="handling=strict")
    assert strict.status_code == 503


async def test_a_preference_that_makes_no_sense_is_ignored(client: Client) -> None:
    for prefer in ["", "wait", "wait=", "wait=-1", "wait=x", "respond-async", ",,=", "wait=1e9"]:
        answer = await client.get("/v1/stock", Prefer=prefer)
        assert answer.status_code == 200, prefer
        assert "preference-applied" not in answer.headers, prefer


async def test_waiting_has_an_end(client: Client) -> None:
    answer = await client.get("/v1/stock", Prefer="wait=86400")
    assert answer.headers["preference-applied"] == "wait=30"


async def test_a_parameter_that_cannot_be_used_is_named(client: Client) -> None:
    for path, parameter in [
        ("/v1/orders?limit=0", "limit"),
        ("/v1/orders?limit=101", "limit"),
        ("/v1/orders?limit=", "limit"),
        ("/v1/orders?limit=1&limit=2", "limit"),
        ("/v1/orders?status=lost", "status"),
        ("/v1/orders?sort=number", "sort"),
        ("/v1/orders?customer_id=me", "customer_id"),
        ("/v1/orders?placed_from=yesterday", "placed_from"),
        ("/v1/orders?placed_from=2026-01-01T00:00:00", "placed_from"),
        ("/v1/orders?colour=red", "colour"),
        ("/v1/orders?sku=%00", "sku"),
        ("/v1/orders?cursor=%00", "cursor"),
        ("/v1/stock?skus=A", "skus"),
        ("/v1/stock?location=a%20b", "location"),
        ("/v1/stock?cursor=abc", "cursor"),
    ]:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid-parameter"), (
            path,
            parameter,
        )
        assert answer.json()["errors"][0]["parameter"] == parameter, (path, parameter)


async def test_a_query_string_that_is_none_is_refused(client: Client) -> None:
    for query in ["sku=%ff", "&".join(["sku=A"] * 121)]:
        answer = await client.get(f"/v1/stock?{query}")
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid-parameter"), query


async def test_when_postgresql_is_away_a_read_says_so(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("app.http.orders.list_orders", away)
    answer = await client.get("/v1/orders")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
