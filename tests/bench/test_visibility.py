"""The tight measure of commit to visible."""

from collections.abc import Callable

import msgspec
import uvloop

from bench.requests import Requests
from bench.visibility import Prober
from tests.bench.fake_waybill import Faults


def test_orders_are_placed_when_due_and_some_read_back(fake: Callable[[Faults], str]) -> None:
    url = fake(Faults(visible_after_s=0.05))
    requests = Requests(url, "key")
    numbers = iter(range(10_000))
    prober = Prober(requests, share=0.5, seed=1)
    uvloop.run(
        prober.run(
            url,
            100,
            1.0,
            lambda: requests.post("/v1/orders", {"customer_id": "c"}, key=str(next(numbers))),
        )
    )
    assert prober.offered > 60
    assert (prober.unanswered, prober.unseen) == (0, 0)
    assert 0.2 < len(prober.seen) / prober.offered < 0.8
    assert {each.xid for each in prober.seen} == {"7"}


def test_the_same_order_is_asked_for_once() -> None:
    requests = Requests("http://127.0.0.1:1", "key")
    again = Requests("http://127.0.0.1:1", "key")
    first, second = (each.post("/v1/orders", {}, key="1") for each in (requests, again))
    assert b"Idempotency-Key: " in first
    assert first != second, "another run is another order, with the same seed too"
    assert msgspec.json.decode(first.partition(b"\r\n\r\n")[2]) == {}
