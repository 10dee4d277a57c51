"""Bodies that no honest client sends: a problem, never a 500, and nothing has changed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest

from app.http import submissions
from app.http.problems import located, unreadable
from commands.place_order import PlaceOrder
from tests.http.conftest import Client, Shop, order_body

HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "malformed-json"),
    "half of it": (b'{"email": "a@b.c", ', 400, "malformed-json"),
    "more than one": (b'{"email":"a@b.c","name":"A"} {}', 400, "malformed-json"),
    "not UTF-8": (b'{"email":"a@b.c","name":"\xff\xfe"}', 400, "malformed-json"),
    "a surrogate in UTF-8": (b'{"email":"a@b.c","name":"\xed\xa0\x80"}', 400, "malformed-json"),
    "half a surrogate pair": (b'{"email":"a@b.c","name":"\\ud800x"}', 400, "malformed-json"),
    "UTF-16": ('{"email":"a@b.c","name":"A"}'.encode("utf-16"), 400, "malformed-json"),
    "a byte order mark": (b'\xef\xbb\xbf{"email":"a@b.c","name":"A"}', 400, "malformed-json"),
    "NaN": (b'{"email":NaN,"name":"A"}', 400, "malformed-json"),
    "a list": (b"[]", 422, "validation"),
    "null": (b"null", 422, "validation"),
    "NUL": (b'{"email":"a@b.c","name":"a\\u0000b"}', 422, "validation"),
    "a control character": (b'{"email":"a@b.c","name":"a\\u0007"}', 422, "validation"),
    "a line break at the end": (b'{"email":"a@b.c","name":"a\\n"}', 422, "validation"),
    "a number for a name": (b'{"email":"a@b.c","name":1}', 422, "validation"),
    "a field too many": (b'{"email":"a@b.c","name":"A","version":9}', 422, "validation"),
    "a field too few": (b'{"email":"a@b.c"}', 422, "validation"),
    "a deep one": (b'{"email":' + b"[" * 100_000, 422, "validation"),
    "a deep one for a struct": (b"[" * 100_000, 422, "validation"),
    "a deep unknown one": (b'{"x":' + b'{"a":' * 100_000, 422, "validation"),
    "a huge number": (b'{"email":' + b"9" * 5000 + b',"name":"A"}', 422, "validation"),
    "a long name": (b'{"email":"a@b.c","name":"' + b"x" * 201 + b'"}', 422, "validation"),
    "a long field name": (b'{"' + b"x" * 10_000 + b'":1}', 422, "validation"),
}


async def test_a_hostile_body_changes_nothing(client: Client, asyncpg_pool: asyncpg.Pool) -> None:
    for name, (body, status, code) in HOSTILE.items():
        answer = await client.post("/v1/customers", body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), name
        assert len(answer.content) < 2_000, name
        assert await asyncpg_pool.fetchval("SELECT count(*) FROM customers") == 0, name
        assert await asyncpg_pool.fetchval("SELECT count(*) FROM idempotency_keys") == 0, name


async def test_a_hostile_sku_is_refused(client: Client) -> None:
    for sku in ["A\n", "", "a b", "x" * 65, "\u0000", "\u00e4", "A/B", "'; --"]:
        body = {"sku": sku, "name": "Mug", "price_cents": 1, "currency": "EUR"}
        answer = await client.post("/v1/products", body)
        assert (answer.status_code, answer.json()["code"]) == (422, "validation"), sku
        assert answer.json()["errors"][0]["pointer"] == "/sku", sku


async def test_a_hostile_quantity_is_pointed_at(client: Client, shop: Shop) -> None:
    order = order_body(await shop.customer())
    for quantity in (0, -1, 1.5, 2**31, 2**63, 10**400, "1", None, True, [1]):
        lines = [*order["lines"], {"sku": "MUG", "quantity": quantity}]
        answer = await client.post("/v1/orders", {**order, "lines": lines})
        assert (answer.status_code, answer.json()["code"]) == (422, "validation"), quantity
        assert answer.json()["errors"][0]["pointer"] == "/lines/1/quantity", quantity


SERVER_OWNED = ("order_id", "number", "status", "total_cents", "version", "placed_at", "owner")


async def test_fields_that_are_ours_are_refused(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=1)
    order = order_body(await shop.customer())
    for field in SERVER_OWNED:
        answer = await client.post("/v1/orders", {**order, field: 1})
        assert answer.status_code == 422, field
        assert answer.json()["errors"][0]["pointer"] == f"/{field}"


POINTED: dict[bytes, tuple[str, str]] = {
    b'{"lines":[{"sku":"A","quantity":0}]}': ("/lines/0/quantity", "invalid"),
    b'{"lines":[{"sku":"A"}]}': ("/lines/0/quantity", "missing-field"),
    b'{"lines":[{"sku":"A","quantity":1},{"sku":"A","quantity":1,"b/~":2}]}': (
        "/lines/1/b~1~0",
        "unknown-field",
    ),
    b'{"lines":[]}': ("/lines", "invalid"),
    b'{"currency":"EUR"}': ("/customer_id", "missing-field"),
    b'{"customer_id":"x"}': ("/customer_id", "invalid"),
    b"{}": ("/customer_id", "missing-field"),
    b"[]": ("", "invalid"),
}


@pytest.mark.parametrize("body", POINTED)
def test_a_fault_is_pointed_at(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=PlaceOrder)
    _, pointer, code = located(caught.value)
    assert (pointer, code) == POINTED[body]


def test_endless_nesting_is_no_bug() -> None:
    assert unreadable(RecursionError("maximum recursion depth")).status == 400


async def test_another_media_type_is_refused(client: Client) -> None:
    for content_type in [
        "",
        "text/plain",
        "application/xml",
        "application/json; charset=latin-1",
        "application/jsonx",
    ]:
        body = b'{"email":"a@b.c","name":"A"}'
        answer = await client.post("/v1/customers", body, Content_Type=content_type)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported-media-type"), (
            content_type
        )


async def test_json_by_another_spelling_is_json(client: Client) -> None:
    for content_type in [
        "Application/JSON",
        "application/json;charset=UTF-8",
        'application/json; charset="utf-8"',
    ]:
        body = b'{"email":"a@b.c","name":"A"}'
        answer = await client.post("/v1/customers", body, Content_Type=content_type)
        assert answer.status_code == 201, content_type


async def test_a_body_that_is_too_large_is_not_read(client: Client) -> None:
    answer = await client.post("/v1/customers", b" " * (submissions.BODY_MAX + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "payload-too-large")


async def test_a_body_without_a_length_is_measured(client: Client) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    request: Any = client.http.build_request(
        "POST", "/v1/customers", content=endless(), headers=headers
    )
    answer: httpx.Response = await client.http.send(request)
    assert answer.status_code == 413


async def test_a_body_that_does_not_come_is_not_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "BODY_TIMEOUT_S", 0.05)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    answer = await client.http.post("/v1/customers", content=stuck(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (408, "request-timeout")
