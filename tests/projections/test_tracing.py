from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tests.projections.conftest import Pool, catch_up, projecting
from tests.projections.shop import Shop
from workers.tracing import LINKS_MAX, record

REQUEST = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def spans_of(shop: Shop, pool: Pool, *traceparents: str | None) -> tuple[ReadableSpan, ...]:
    """What is recorded of one batch with an order of each request."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with projecting(pool) as projector:
        await catch_up(projector)
        for traceparent in traceparents:
            await shop.run([shop.order()], traceparent=traceparent)
        applied = await projector.project()
    record(provider.get_tracer("test"), applied, ended_ns=applied[0].began_ns + 1_000_000)
    return exporter.get_finished_spans()


async def test_a_batch_without_sampled_requests_has_no_span(shop: Shop, psycopg_pool: Pool) -> None:
    assert await spans_of(shop, psycopg_pool, None, None) == ()


async def test_a_trace_leads_from_the_request_to_the_read_models(
    shop: Shop, psycopg_pool: Pool
) -> None:
    batch, within = await spans_of(shop, psycopg_pool, None, REQUEST)
    assert batch.name == "project"
    assert batch.kind is SpanKind.CONSUMER
    assert batch.parent is None
    assert [f"{link.context.trace_id:032x}" for link in batch.links] == [REQUEST.split("-")[1]]
    assert within.name == "project order_list, order_view, stock_availability"
    assert within.context is not None
    assert within.parent is not None
    assert f"{within.context.trace_id:032x}" == REQUEST.split("-")[1]
    assert f"{within.parent.span_id:016x}" == REQUEST.split("-")[2]
    assert within.attributes is not None
    assert within.attributes["waybill.projection.events"] == 6
    assert within.links[0].context == batch.context


async def test_links_are_bounded_and_every_request_has_its_span(
    shop: Shop, psycopg_pool: Pool
) -> None:
    requests = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 41)]
    batch, *within = await spans_of(shop, psycopg_pool, *requests)
    assert len(batch.links) == LINKS_MAX
    assert len(within) == 40
