"""The zero-loss audit, on a dictionary instead of a server."""

from collections.abc import Iterable, Sequence

import msgspec

from bench.audit import audit
from bench.requests import Answer, Requests
from bench.scenario import Ledger
from bench.verdict import Audit

CUSTOMER, STRANGER = "c-1", "c-2"


class Shop:
    """Answers as the service does, and can be made to lose and to double."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, str]] = []  # (order, customer)
        self.unlisted: set[str] = set()
        self.failures = 0  # answers to come that are errors

    def ask_all(self, requests: Iterable[bytes]) -> Sequence[Answer]:
        return [self.ask(request) for request in requests]

    def ask(self, request: bytes) -> Answer:
        if self.failures:
            self.failures -= 1
            return Answer(503)
        method, path, _ = request.decode().split(" ", 2)
        if method == "POST":
            self.orders.append(("late", CUSTOMER))
            return Answer(201, body({"order_id": "late", "placed_at": "2026-01-02"}))
        if path.startswith("/v1/orders?"):
            rows = [
                {"order_id": order, "customer": {"customer_id": customer}}
                for order, customer in self.orders
                if order not in self.unlisted
            ]
            return Answer(200, body({"data": rows, "meta": {"next_cursor": None}}))
        order = path.rpartition("/")[2]
        known = order in {each for each, _ in self.orders}
        return Answer(200, body({"order_id": order})) if known else Answer(404)


def body(value: object) -> bytes:
    return msgspec.json.encode(value)


def acked(*orders: str) -> Ledger:
    ledger = Ledger()
    for number, order in enumerate(orders):
        ledger.ask(number, b"")
        answer = Answer(201, body({"order_id": order, "placed_at": "2026-01-01"}))
        ledger.settle(number, answer)
    return ledger


def audited(shop: Shop, ledger: Ledger) -> Audit:
    return audit(ledger, Requests("http://shop", "key"), shop.ask_all, [CUSTOMER])


def test_what_was_acknowledged_and_is_there_is_kept() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER), ("b", CUSTOMER), ("other", STRANGER)]
    assert audited(shop, acked("a", "b")) == Audit(acked=2, missing=0, doubled=0, unchecked=0)


def test_a_lost_order_is_missing() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER)]
    assert audited(shop, acked("a", "b")).missing == 1


def test_an_order_that_only_the_list_lacks_is_missing() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER), ("b", CUSTOMER)]
    shop.unlisted = {"b"}
    assert audited(shop, acked("a", "b")).missing == 1


def test_an_order_nobody_asked_for_is_one_too_many() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER), ("twin of a", CUSTOMER)]
    assert audited(shop, acked("a")).doubled == 1


def test_two_acknowledgements_of_one_order_are_one_too_many() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER)]
    assert audited(shop, acked("a", "a")).doubled == 1


def test_an_unknown_outcome_is_asked_for_again_and_then_held_to_the_same() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER)]
    ledger = acked("a")
    ledger.ask(99, b"POST /v1/orders HTTP/1.1\r\n\r\n")
    ledger.settle(99, Answer(0))
    assert audited(shop, ledger) == Audit(acked=2, missing=0, doubled=0, unchecked=0)


def test_a_refused_order_is_not_asked_for_again() -> None:
    ledger = Ledger()
    ledger.ask(1, b"")
    ledger.settle(1, Answer(409))
    assert audited(Shop(), ledger) == Audit(acked=0, missing=0, doubled=0, unchecked=0)


def test_what_cannot_be_read_is_not_checked_and_not_lost() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER)]
    shop.failures = 100
    assert audited(shop, acked("a")) == Audit(acked=1, missing=0, doubled=0, unchecked=1)


def test_a_passing_error_is_tried_again() -> None:
    shop = Shop()
    shop.orders = [("a", CUSTOMER)]
    shop.failures = 1
    assert audited(shop, acked("a")).unchecked == 0
