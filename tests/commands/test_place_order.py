from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from commands.command import Principal, Submission
from commands.events import OrderPlaced
from commands.place_order import Numbered, OrderedLine, PlaceOrder, Product, Shop, place_order
from commands.refusals import Refusal
from commands.stock import Shelf, Shelves

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ADA = uuid4()
BUYER = Numbered(1001, "Ada Lovelace", "ada@example.org")
NOBODY = Numbered(1001, None, None)
BACK_OFFICE = Principal(uuid4(), "back-office", frozenset(), None, 1000)


def shop(**on_hand: int) -> Shop:
    products = {sku: Product(f"The {sku}", 250, "EUR") for sku in (*on_hand, "unstocked")}
    shelves = [Shelf(sku, "main", units, 0, 0, 0, 0, 1) for sku, units in on_hand.items()]
    return Shop(products, Shelves(shelves), {"taken"})


def decide(
    command: PlaceOrder,
    at: Shop,
    *,
    buyer: Numbered = BUYER,
    principal: Principal = BACK_OFFICE,
) -> OrderPlaced | Refusal:
    return place_order(Submission(command, principal, "key"), buyer, at, NOW)


def order(*lines: tuple[str, int], currency: str = "EUR", **more: Any) -> PlaceOrder:
    wanted = tuple(OrderedLine(sku, quantity) for sku, quantity in lines)
    return PlaceOrder(ADA, currency, wanted, **more)


def refusal(outcome: OrderPlaced | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal)
    return outcome


def test_lines_are_priced_from_the_product() -> None:
    placed = decide(order(("pen", 2), ("ink", 1)), shop(pen=5, ink=5))
    assert isinstance(placed, OrderPlaced)
    assert [
        (each.line_no, each.unit_price_cents, each.line_total_cents) for each in placed.lines
    ] == [
        (1, 250, 500),
        (2, 250, 250),
    ]
    assert placed.total_cents == 750
    assert placed.allowed_actions == ("cancel",)


def test_a_unit_taken_by_one_order_is_gone_for_the_next() -> None:
    at = shop(pen=3)
    assert isinstance(decide(order(("pen", 2)), at), OrderPlaced)
    assert refusal(decide(order(("pen", 2)), at)).facts["lines"][0]["available"] == 1


def test_two_lines_of_one_product_are_added_up_before_they_are_checked() -> None:
    at = shop(pen=3)
    refused = refusal(decide(order(("pen", 2), ("pen", 2)), at))
    assert refused.code == "insufficient-stock"
    assert [fault.pointer for fault in refused.errors] == ["/lines/0/quantity", "/lines/1/quantity"]


def test_a_refused_order_takes_nothing() -> None:
    at = shop(pen=3, ink=0)
    assert refusal(decide(order(("pen", 1), ("ink", 1)), at)).code == "insufficient-stock"
    assert isinstance(decide(order(("pen", 3)), at), OrderPlaced)


def test_a_product_without_a_shelf_has_nothing_available() -> None:
    refused = refusal(decide(order(("unstocked", 1)), shop()))
    assert refused.facts["lines"] == [
        {"line_no": 1, "sku": "unstocked", "location": "main", "quantity": 1, "available": 0}
    ]


def test_unknown_products_are_named_by_their_lines() -> None:
    refused = refusal(decide(order(("pen", 1), ("nope", 1)), shop(pen=1)))
    assert (refused.code, refused.errors[0].pointer) == ("unknown-product", "/lines/1/sku")


def test_an_unknown_customer_is_refused() -> None:
    refused = refusal(decide(order(("pen", 1)), shop(pen=1), buyer=NOBODY))
    assert (refused.code, refused.errors[0].pointer) == ("unknown-customer", "/customer_id")


def test_a_storefront_key_orders_for_its_own_customer_alone() -> None:
    grace = Principal(uuid4(), "storefront", frozenset(), uuid4(), 1000)
    assert (
        refusal(decide(order(("pen", 1)), shop(pen=1), principal=grace)).code == "unknown-customer"
    )
    ada = Principal(uuid4(), "storefront", frozenset(), ADA, 1000)
    assert isinstance(decide(order(("pen", 1)), shop(pen=1), principal=ada), OrderPlaced)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"expected_total_cents": 249}, "total-mismatch"),
        ({"currency": "USD"}, "currency-mismatch"),
        ({"external_reference": "taken"}, "duplicate-external-reference"),
    ],
)
def test_what_the_client_believes_is_checked(more: dict[str, Any], code: str) -> None:
    assert refusal(decide(order(("pen", 1), **more), shop(pen=1))).code == code


def test_an_order_that_costs_nothing_may_be_expected_to() -> None:
    at = shop(pen=1)
    at.products["pen"] = Product("A gift", 0, "EUR")
    assert isinstance(decide(order(("pen", 1), expected_total_cents=0), at), OrderPlaced)


def test_one_reference_is_used_once_within_a_batch_too() -> None:
    at = shop(pen=2)
    assert isinstance(decide(order(("pen", 1), external_reference="A-1"), at), OrderPlaced)
    again = refusal(decide(order(("pen", 1), external_reference="A-1"), at))
    assert again.code == "duplicate-external-reference"
