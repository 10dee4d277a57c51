"""Follow one order through the house: print its trace as a tree.

    python -m tests.promises.tracing

Starts a Waybill that samples everything and exports by OTLP to a small receiver in this process,
places an order, reads it back with its token, and prints what was exported.
"""

import gzip
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import httpx
from msgspec import Struct
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from tests.promises.stack import Stack, running_stack

WAIT_S = 20.0  # for the batch exporters, which send every 5 s


class Span(Struct, frozen=True):
    """One exported span; ids in hex, times in nanoseconds since the epoch."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    start_ns: int
    end_ns: int
    links: tuple[str, ...]  # trace ids


@contextmanager
def receiver() -> Generator[tuple[str, list[Span]]]:
    """An OTLP/HTTP endpoint on a free port, and the spans it was sent."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = attribute(resource.resource.attributes, "service.name")
                for scope in resource.scope_spans:
                    spans.extend(span_of(each, service) for each in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def span_of(span: ProtoSpan, service: str) -> Span:
    return Span(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        service,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        tuple(link.trace_id.hex() for link in span.links),
    )


def attribute(attributes: Iterable[KeyValue], key: str) -> str:
    for each in attributes:
        if each.key == key:
            return str(each.value.string_value)
    return ""


def trace_one_order(stack: Stack, spans: list[Span]) -> list[Span]:
    """Place an order in a trace of our own and wait for the spans of both sides."""
    trace_id = uuid4().hex
    headers = {
        "Authorization": f"Bearer {stack.api_key}",
        "traceparent": f"00-{trace_id}-{uuid4().hex[:16]}-01",
        "Idempotency-Key": str(uuid4()),
    }
    with httpx.Client(base_url=stack.url, headers=headers, timeout=10) as http:
        order = http.get("/v1/orders?limit=1").json()["data"][0]
        level = http.get("/v1/stock").json()["data"][0]
        body = {
            "customer_id": order["customer"]["customer_id"],
            "currency": order["currency"],
            "lines": [{"sku": level["sku"], "quantity": 1}],
        }
        placed = http.post("/v1/orders", json=body)
        assert placed.status_code == 201, placed.text
        http.get(
            f"/v1/orders/{placed.json()['order_id']}",
            headers={"Consistency-Token": placed.headers["Consistency-Token"]},
        )
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        mine = [span for span in spans if span.trace_id == trace_id]
        if any("project" in span.name for span in mine) and any("POST" in s.name for s in mine):
            return mine
        time.sleep(0.1)
    return [span for span in spans if span.trace_id == trace_id]


def tree(spans: list[Span]) -> list[str]:
    """One line per span: indented by depth, ordered by start."""
    known = {span.span_id for span in spans}
    began = min(span.start_ns for span in spans)

    def lines(parent_id: str | None, depth: int) -> Generator[str]:
        for span in sorted(spans, key=lambda each: each.start_ns):
            is_root = parent_id is None and span.parent_id not in known
            if is_root or span.parent_id == parent_id:
                at_ms, took_ms = (span.start_ns - began) / 1e6, (span.end_ns - span.start_ns) / 1e6
                name = "  " * depth + span.name
                yield f"{name:46} {span.kind:9} {span.service:16} +{at_ms:.2f} ms, {took_ms:.2f} ms"
                yield from lines(span.span_id, depth + 1)

    return list(lines(None, 0))


def main() -> int:
    with receiver() as (endpoint, spans), tempfile.TemporaryDirectory() as directory:
        settings = {"WAYBILL_OTLP_ENDPOINT": endpoint, "WAYBILL_TRACE_RATIO": "1"}
        with running_stack(Path(directory) / "d", **settings) as stack:
            found = trace_one_order(stack, spans)
    print("\n".join(tree(found)) if found else "no span arrived")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
