from pathlib import Path

from tests.promises.stack import running_stack
from tests.promises.tracing import receiver, trace_one_order


def test_one_trace_leads_from_the_request_to_the_read_model(tmp_path: Path) -> None:
    with receiver() as (endpoint, spans):
        settings = {"WAYBILL_OTLP_ENDPOINT": endpoint, "WAYBILL_TRACE_RATIO": "0"}
        with running_stack(tmp_path / "d", **settings) as stack:
            mine = trace_one_order(stack, spans)
    by_id = {span.span_id: span for span in mine}
    request = next(span for span in mine if span.name == "POST /v1/orders")
    projection = next(span for span in mine if span.name.startswith("project"))
    above = projection
    while above.parent_id in by_id:
        above = by_id[above.parent_id]
    assert above is request
    assert (request.service, projection.service) == ("waybill-web", "waybill-worker")
