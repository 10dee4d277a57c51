import asyncio
import re
from typing import Any

import asyncpg
import pytest
from msgspec import structs
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from structlog.testing import capture_logs

from app.http import edge
from app.settings import Settings
from app.telemetry import FORCED_PER_S
from app.web import Web
from tests.http.conftest import Client, NewKey, Shop, client_of, order_body


async def test_a_path_that_leads_nowhere_is_a_problem(client: Client) -> None:
    for path in ["/nothing", "/v1/orders/a/b", "/v2/orders", "/v1/%2e%2e/orders"]:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
        assert answer.json()["instance"].startswith("/"), path


async def test_another_method_is_a_problem(client: Client) -> None:
    for method, path, allow in [
        ("DELETE", "/v1/orders", "GET, HEAD, POST"),
        ("OPTIONS", "/v1/orders", "GET, HEAD, POST"),
        ("GET", "/v1/products", "POST"),
        ("BREW", "/v1/stock", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
    ]:
        answer = await client.http.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (405, "method-not-allowed"), (
            method,
            path,
            allow,
        )
        assert answer.headers["allow"] == allow, (method, path, allow)


async def test_a_host_that_is_none_is_a_problem(client: Client) -> None:
    answer = await client.get("/v1/stock", Host="a b")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid-parameter")


async def test_a_bug_shows_nothing_of_itself(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def buggy(*_: Any, **__: Any) -> None:
        raise RuntimeError("SELECT secret FROM vault")

    monkeypatch.setattr("app.http.stock.list_stock", buggy)
    with capture_logs() as lines:
        answer = await client.get("/v1/stock")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    (bug,) = [line for line in lines if line["event"] == "bug"]
    assert bug["request_id"] == answer.headers["x-request-id"]
    assert bug["exc_info"]


async def test_too_many_at_once_are_shed_before_anything_is_done(
    client: Client, stranger: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "IN_FLIGHT_MAX", 0)
    answer = await client.get("/v1/stock")
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert answer.json()["retryable"] is True
    assert answer.headers["retry-after"] == "1"
    assert (await stranger.get("/health/live")).status_code == 200


async def test_a_full_queue_is_shed(
    client: Client, asyncpg_pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.executor.QUEUE_MAX", 3)
    body = {"email": "a@b.c", "name": "Ada"}
    answers = await asyncio.gather(*(client.post("/v1/customers", body) for _ in range(60)))
    shed = [answer for answer in answers if answer.status_code == 503]
    done = [answer for answer in answers if answer.status_code == 201]
    assert shed
    assert len(shed) + len(done) == 60
    assert {answer.json()["code"] for answer in shed} == {"overloaded"}
    assert await asyncpg_pool.fetchval("SELECT count(*) FROM customers") == len(done)
    assert 'waybill_http_shed_total{full="queue"}' in (await client.get("/metrics")).text


async def test_paths_do_not_make_metrics(client: Client) -> None:
    for number in range(50):
        await client.get(f"/v1/orders/{number}")
        await client.get(f"/nothing/{number}")
        await client.http.request(f"M{number}", "/v1/stock")
    page = (await client.get("/metrics")).text
    routes = set(re.findall(r'waybill_http_request_seconds_count\{.*?route="([^"]+)"', page))
    methods = set(re.findall(r'waybill_http_request_seconds_count\{method="([^"]+)"', page))
    assert routes == {"/v1/orders/{order_id}", "unmatched"}
    assert methods == {"GET", "_OTHER"}


async def test_only_what_is_worth_a_line_has_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with capture_logs() as lines:
        assert (await client.get("/v1/stock")).status_code == 200
        assert (await client.get("/v1/stock?limit=0")).status_code == 400
    assert lines == []
    monkeypatch.setattr(edge, "IN_FLIGHT_MAX", 0)
    with capture_logs() as lines:
        for _ in range(20):
            await client.get("/v1/stock")
    assert 1 <= len(lines) <= 3
    assert {line["code"] for line in lines} == {"overloaded"}
    monkeypatch.undo()
    monkeypatch.setattr(edge, "SLOW_S", 0)
    with capture_logs() as lines:
        await client.get("/v1/stock")
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/stock", 200)]


class Traced:
    """A web process whose spans stay here."""

    def __init__(self, settings: Settings) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.web = Web(settings, provider=provider)


TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"


async def test_a_trace_goes_on_through_the_command_into_the_outbox(
    settings: Settings, new_key: NewKey, asyncpg_pool: asyncpg.Pool
) -> None:
    traced = Traced(settings)
    async with traced.web.running():
        client = client_of(traced.web, await new_key())
        shop = Shop(client)
        await shop.product(on_hand=5)
        customer_id = await shop.customer()
        assert traced.exporter.get_finished_spans() == ()
        with capture_logs() as lines:
            answer = await client.post(
                "/v1/orders", order_body(customer_id), traceparent=SAMPLED, tracestate="a=b"
            )
        await client.http.aclose()
    assert answer.status_code == 201
    command, request = traced.exporter.get_finished_spans()
    assert (request.name, request.kind) == ("POST /v1/orders", SpanKind.SERVER)
    assert ids(request)[0] == ids(command)[0] == TRACE_ID
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert command.name == "command place_order"
    assert command.parent is not None
    assert f"{command.parent.span_id:016x}" == ids(request)[1]
    assert request.attributes is not None
    assert request.attributes["http.route"] == "/v1/orders"
    assert request.attributes["http.request.method"] == "POST"
    assert request.attributes["http.response.status_code"] == 201
    assert [line["status"] for line in lines if line["event"] == "request"] == [201]
    handed_on = await asyncpg_pool.fetch(
        "SELECT DISTINCT traceparent FROM outbox WHERE traceparent IS NOT NULL"
    )
    assert [row[0] for row in handed_on] == [f"00-{TRACE_ID}-{ids(command)[1]}-01"]


def ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


async def test_a_problem_names_its_trace(settings: Settings, new_key: NewKey) -> None:
    traced = Traced(settings)
    async with traced.web.running():
        client = client_of(traced.web, await new_key())
        async with client.http:
            unknown = order_body(customer_id=(await Shop(client).customer()), sku="NONE")
            refused = await client.post("/v1/orders", unknown, traceparent=SAMPLED)
            absent = await client.get("/nothing", traceparent=SAMPLED)
            untraced = await client.get("/nothing")
    assert refused.json()["trace_id"] == absent.json()["trace_id"] == TRACE_ID
    assert "trace_id" not in untraced.json()


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{TRACE_ID}-b7ad6b7169203331-00",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "ff-nonsense-01",
        "01",
        "\x7f1",
    ],
)
async def test_what_asks_for_no_trace_has_none(
    settings: Settings, new_key: NewKey, traceparent: str
) -> None:
    traced = Traced(settings)
    async with traced.web.running():
        client = client_of(traced.web, await new_key())
        async with client.http:
            assert (await client.get("/v1/stock", traceparent=traceparent)).status_code == 200
    assert traced.exporter.get_finished_spans() == ()


async def test_strangers_cannot_have_everything_traced(settings: Settings) -> None:
    traced = Traced(settings)
    async with traced.web.running():
        client = client_of(traced.web, None)
        async with client.http:
            for _ in range(3 * FORCED_PER_S):
                await client.get("/health/live", traceparent=SAMPLED)
    seconds_at_most = 3
    assert len(traced.exporter.get_finished_spans()) <= seconds_at_most * FORCED_PER_S


async def test_chance_traces_a_share(settings: Settings) -> None:
    always = Traced(structs.replace(settings, trace_ratio=1.0))
    async with always.web.running():
        client = client_of(always.web, None)
        async with client.http:
            await client.get("/docs")
    (span,) = always.exporter.get_finished_spans()
    assert (span.name, span.parent) == ("GET /docs", None)
