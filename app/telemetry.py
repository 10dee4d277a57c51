"""Traces: the OpenTelemetry SDK of a process, and which requests are traced.

A request is sampled before anything else is done for it, and one that is not gets no span object at
all. That is why the instrumentation packages of OpenTelemetry stand aside: their ASGI middleware
builds a span, a context and a metrics record for each request and asks the sampler in between,
which cost two thirds of the throughput even at a ratio of zero, and Litestar's plugin names spans
after raw URLs. Used of them is what sampled requests alone call: the rule for a span's status.
"""

import os
import socket
from collections.abc import Mapping
from random import random
from time import monotonic, time_ns
from typing import Any, Final
from uuid import uuid4

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.utils import http_status_to_status_code
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    service_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import Span, SpanKind, Status
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.settings import Settings

TRACES_PATH: Final = "/v1/traces"  # OTLP/HTTP, below the endpoint
QUEUE_MAX: Final = 2048  # spans; more than that while the collector is away are dropped
EXPORT_TIMEOUT_S: Final = 5
SAMPLED: Final = tuple("13579bdf")  # how a traceparent ends whose flags have the lowest bit set
FORCED_PER_S: Final = 100  # requests per process that a client's own sampling decision may trace


def configure_tracing(settings: Settings, service_name: str) -> TracerProvider:
    """Set up the SDK of this process and return its provider, whose `shutdown` sends what is left.

    Call it after the last fork: the exporter is a thread. Without WAYBILL_OTLP_ENDPOINT spans go
    nowhere, and logs still carry the ids of sampled requests. Who starts a span has sampled before.
    """
    resource = Resource.create(
        {
            service_attributes.SERVICE_NAME: service_name,
            "service.namespace": "waybill",
            "service.instance.id": str(uuid4()),
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
        }
    )
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    if settings.otlp_endpoint is not None:
        endpoint = settings.otlp_endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH
        provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S),
                max_queue_size=QUEUE_MAX,
                schedule_delay_millis=1000,
                export_timeout_millis=1000 * EXPORT_TIMEOUT_S,
            )
        )
    return provider


class Tracing:
    """Which requests of the web process are traced, and their spans."""

    def __init__(self, provider: TracerProvider, *, ratio: float) -> None:
        self._ratio = ratio
        self._tracer = provider.get_tracer("waybill.web")
        self._propagator = TraceContextTextMapPropagator()
        self._second = 0
        self._forced = 0

    def by_chance(self) -> bool:
        """Whether a request that brings no trace is traced."""
        return random() < self._ratio  # noqa: S311  (sampling, no secret)

    def begin(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Span | None:
        """The SERVER span of a request that `by_chance` chose or that has a traceparent.

        A traceparent with the sampled flag is followed, `FORCED_PER_S` times a second at most, for
        it comes from outside; with any other one chance decides.
        """
        parent = self._parent(headers) if b"traceparent" in headers else None
        if parent is None and b"traceparent" in headers and not self.by_chance():
            return None
        return self._tracer.start_span(
            "HTTP",
            context=parent or Context(),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(scope, headers),
            start_time=time_ns(),
        )

    def child(self, span: Span, name: str, attributes: Mapping[str, str]) -> Span:
        """A span within the request's; the caller ends it."""
        return self._tracer.start_span(
            name, context=trace.set_span_in_context(span), attributes=dict(attributes)
        )

    def _parent(self, headers: Mapping[bytes, bytes]) -> Context | None:
        traceparent = headers[b"traceparent"].decode("latin-1")
        if not traceparent.endswith(SAMPLED) or not self._may_force():
            return None
        tracestate = headers.get(b"tracestate", b"").decode("latin-1")
        carrier = {"traceparent": traceparent, "tracestate": tracestate}
        parent = self._propagator.extract(carrier, Context())
        is_valid = trace.get_current_span(parent).get_span_context().is_valid
        return parent if is_valid else None

    def _may_force(self) -> bool:
        second = int(monotonic())
        if second != self._second:
            self._second, self._forced = second, 0
        self._forced += 1
        return self._forced <= FORCED_PER_S


def _request_attributes(
    scope: Mapping[str, Any], headers: Mapping[bytes, bytes]
) -> dict[str, str | int]:
    """HTTP server attributes by the stable semantic conventions."""
    attributes: dict[str, str | int] = {
        url_attributes.URL_PATH: scope["path"],
        url_attributes.URL_SCHEME: scope["scheme"],
        network_attributes.NETWORK_PROTOCOL_VERSION: scope["http_version"],
    }
    if server := scope.get("server"):
        attributes[server_attributes.SERVER_ADDRESS] = server[0]
        attributes[server_attributes.SERVER_PORT] = int(server[1] or 0)
    if client := scope.get("client"):
        attributes[client_attributes.CLIENT_ADDRESS] = client[0]
    if b"user-agent" in headers:
        user_agent = headers[b"user-agent"].decode("latin-1")
        attributes[user_agent_attributes.USER_AGENT_ORIGINAL] = user_agent
    return attributes


def finish(span: Span, *, method: str, route: str, status: int) -> None:
    """End a SERVER span: named after the route template, never after the path."""
    span.update_name(f"{method} {route}")
    span.set_attribute(http_attributes.HTTP_REQUEST_METHOD, method)
    span.set_attribute(http_attributes.HTTP_ROUTE, route)
    span.set_attribute(http_attributes.HTTP_RESPONSE_STATUS_CODE, status)
    if status >= 500:
        span.set_attribute(error_attributes.ERROR_TYPE, str(status))
    span.set_status(Status(http_status_to_status_code(status, server_span=True)))
    span.end()


def traceparent_of(span: Span) -> str:
    """W3C, with the sampled flag: what follows from this request is traced, too."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def trace_id_of(span: Span) -> str:
    return f"{span.get_span_context().trace_id:032x}"
