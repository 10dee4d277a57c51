"""Spans of projected batches: a trace leads from the HTTP request to the commit of the read model.

The outbox carries the contexts of sampled requests, so what happens here is decided there: a batch
without any has no span. Messaging conventions are in development (OpenTelemetry 1.44), so the names
of our own attributes do not pretend to follow them.
"""

from collections.abc import Sequence
from typing import Final

from opentelemetry.trace import Link, SpanKind, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from projections.engine import Applied

LINKS_MAX: Final = 32

_propagator: Final = TraceContextTextMapPropagator()


def record(tracer: Tracer, applied: Sequence[Applied], *, ended_ns: int) -> None:
    """Record the spans of a committed turn: one per batch, and one in the trace of each request."""
    for each in applied:
        if each.batch is not None and each.batch.traceparents and not each.is_again:
            _record_batch(tracer, each, ended_ns)


def _record_batch(tracer: Tracer, applied: Applied, ended_ns: int) -> None:
    assert applied.batch is not None
    batch = applied.batch
    contexts = [
        _propagator.extract({"traceparent": traceparent}) for traceparent in batch.traceparents
    ]
    attributes: dict[str, str | int | float | Sequence[str]] = {
        "waybill.projection.read_models": applied.models,
        "waybill.projection.events": batch.events,
    }
    if batch.oldest is not None:
        lag_ns = ended_ns - batch.oldest.timestamp() * 1e9
        attributes["waybill.projection.lag_ms"] = round(lag_ns / 1e6, 3)
    whole = tracer.start_span(
        "project",
        kind=SpanKind.CONSUMER,
        links=[Link(get_current_span(each).get_span_context()) for each in contexts[:LINKS_MAX]],
        attributes=attributes,
        start_time=applied.began_ns,
    )
    whole.end(ended_ns)
    for context in contexts:
        tracer.start_span(
            f"project {', '.join(applied.models)}",
            context=context,
            kind=SpanKind.CONSUMER,
            links=[Link(whole.get_span_context())],
            attributes=attributes,
            start_time=applied.began_ns,
        ).end(ended_ns)
