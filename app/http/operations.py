"""Every operation of the API, as it is documented: shapes, examples, and the problems it can have.

A test holds this table against the routes, and every answer that the tests see against it.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from msgspec import Struct

from app.http.answers import (
    AdjustedLevel,
    CancelledOrder,
    PlacedOrder,
    RegisteredCustomer,
    RegisteredProduct,
)
from app.http.health import Dependency, Liveness, Readiness
from app.http.orders import Cancellation
from app.http.stock import StockAdjustment
from commands.place_order import PlaceOrder
from commands.refusals import (
    Refusal,
    currency_mismatch,
    duplicate,
    insufficient_stock,
    invalid_transition,
    precondition_failed,
    stale_quantity,
    total_mismatch,
    unknown_customer,
    unknown_products,
    would_breach_commitments,
)
from commands.register_customer import RegisterCustomer
from commands.register_product import RegisterProduct
from queries import get_order, list_orders, list_projections, list_stock

ORDER_ID: Final = UUID("019a2f4e-7c1b-7d3e-9f60-2b6d1c8e4a51")
CUSTOMER_ID: Final = UUID("019a2f4d-11a0-7b55-8a3c-90e2f7d0c6b4")
PLACED_AT: Final = datetime(2026, 3, 14, 9, 26, 53, 589793, tzinfo=UTC)
SKU: Final = "MUG-BLUE"


class Success(Struct, frozen=True):
    """A good answer. `example` is an instance of what is sent, or text."""

    status: int
    says: str
    example: Any = None
    headers: tuple[str, ...] = ()


class Operation(Struct, frozen=True, kw_only=True):
    """One method of one path. `scope` None: no key is needed."""

    operation_id: str
    method: str
    path: str
    summary: str
    says: str
    scope: str | None
    takes: tuple[str, ...] = ()  # header parameters
    query: type[Struct] | None = None
    body: type[Struct] | None = None
    examples: Mapping[str, Any] = {}  # of the body, by name
    successes: tuple[Success, ...]
    problems: tuple[str, ...]


OPEN: Final = ("invalid-parameter", "internal")
KEYED: Final = (
    *OPEN,
    "unauthenticated",
    "insufficient-scope",
    "rate-limited",
    "overloaded",
    "unavailable",
)
COMMAND: Final = (
    *KEYED,
    "idempotency-key-missing",
    "malformed-json",
    "request-timeout",
    "payload-too-large",
    "unsupported-media-type",
    "validation",
    "idempotency-key-reused",
    "idempotency-in-progress",
    "outcome-unknown",
)
READ: Final = (*KEYED, "projection-lag")

CREATED: Final = ("ETag", "Location", "Consistency-Token", "Idempotent-Replayed")
CHANGED: Final = ("ETag", "Consistency-Token", "Idempotent-Replayed")
FRESHNESS: Final = ("Preference-Applied", "Projection-Lag")

_ORDER: Final = get_order.Order(
    order_id=ORDER_ID,
    number=1042,
    status="placed",
    payment_status="unpaid",
    fulfillment_status="unfulfilled",
    return_status="none",
    customer=get_order.Customer(CUSTOMER_ID, "Ada Brandt", "ada@example.com"),
    currency="EUR",
    total_cents=2580,
    lines=[get_order.Line(1, SKU, "main", "Enamel mug, blue", 2, 1290, 2580)],
    allowed_actions=["cancel"],
    external_reference=None,
    version=1,
    placed_at=PLACED_AT,
    updated_at=PLACED_AT,
)
_LISTED: Final = list_orders.ListedOrder(
    order_id=ORDER_ID,
    number=1042,
    status="placed",
    payment_status="unpaid",
    fulfillment_status="unfulfilled",
    return_status="none",
    customer=list_orders.Customer(CUSTOMER_ID, "Ada Brandt", "ada@example.com"),
    currency="EUR",
    total_cents=2580,
    line_count=1,
    external_reference=None,
    version=1,
    placed_at=PLACED_AT,
    updated_at=PLACED_AT,
)

OPERATIONS: Final = (
    Operation(
        operation_id="place_order",
        method="POST",
        path="/v1/orders",
        summary="Place an order",
        says="Prices the lines, takes the stock of all or of none, and announces the order. The "
        "prices are the products' own; `expected_total_cents` guards against a change of them. A "
        "storefront key places orders for its own customer only.",
        scope="orders:write",
        takes=("Idempotency-Key",),
        body=PlaceOrder,
        examples={
            "two mugs": {
                "customer_id": CUSTOMER_ID,
                "currency": "EUR",
                "lines": [{"sku": SKU, "quantity": 2}],
            },
            "guarded": {
                "customer_id": CUSTOMER_ID,
                "currency": "EUR",
                "lines": [{"sku": SKU, "quantity": 2, "location": "main"}],
                "expected_total_cents": 2580,
                "external_reference": "shop-7731",
            },
        },
        successes=(
            Success(
                201,
                "The order is placed and holds its stock.",
                PlacedOrder(ORDER_ID, 1042, "placed", "EUR", 2580, 1, PLACED_AT),
                CREATED,
            ),
        ),
        problems=(
            *COMMAND,
            "unknown-customer",
            "unknown-product",
            "currency-mismatch",
            "total-mismatch",
            "insufficient-stock",
            "duplicate-external-reference",
        ),
    ),
    Operation(
        operation_id="show_orders",
        method="GET",
        path="/v1/orders",
        summary="List orders",
        says="All filters hold at once. The next page is at `Link`, or at `meta.next_cursor`. A "
        "storefront key sees its own customer's orders only.",
        scope="orders:read",
        takes=("Consistency-Token", "Prefer"),
        query=list_orders.ListOrders,
        successes=(
            Success(
                200,
                "A page of orders.",
                list_orders.OrderPage([_LISTED], list_orders.Page(20, None)),
                ("Link", *FRESHNESS),
            ),
        ),
        problems=READ,
    ),
    Operation(
        operation_id="show_order",
        method="GET",
        path="/v1/orders/{order_id}",
        summary="Show an order",
        says="The whole order. One that was just placed is never denied: the read waits for it.",
        scope="orders:read",
        takes=("Consistency-Token", "Prefer", "If-None-Match"),
        successes=(
            Success(200, "The order.", _ORDER, ("ETag", *FRESHNESS)),
            Success(304, "The client's copy is the current one.", None, ("ETag", *FRESHNESS)),
        ),
        problems=(*READ, "not-found"),
    ),
    Operation(
        operation_id="cancel_order",
        method="POST",
        path="/v1/orders/{order_id}/cancel",
        summary="Cancel an order",
        says="Calls the whole order off and gives its stock back.",
        scope="orders:write",
        takes=("Idempotency-Key", "If-Match"),
        body=Cancellation,
        examples={"a change of mind": {"reason": "the customer changed their mind"}},
        successes=(
            Success(
                200, "The order is cancelled.", CancelledOrder(ORDER_ID, "cancelled", 2), CHANGED
            ),
        ),
        problems=(*COMMAND, "not-found", "precondition-failed", "invalid-transition"),
    ),
    Operation(
        operation_id="register_product",
        method="POST",
        path="/v1/products",
        summary="Register a product",
        says="The SKU can be ordered from now on, at this price.",
        scope="products:write",
        takes=("Idempotency-Key",),
        body=RegisterProduct,
        examples={
            "a mug": {
                "sku": SKU,
                "name": "Enamel mug, blue",
                "price_cents": 1290,
                "currency": "EUR",
            }
        },
        successes=(Success(201, "The product is sold.", RegisteredProduct(SKU, 1), CREATED),),
        problems=(*COMMAND, "duplicate-sku"),
    ),
    Operation(
        operation_id="adjust_stock",
        method="POST",
        path="/v1/stock/{sku}/{location}/adjustments",
        summary="Adjust a stock level",
        says="By a difference (`delta`), or to a count (`set_to`) if `expected_on_hand` is still "
        "right. A location needs no registration; a shop with one warehouse uses `main`.",
        scope="stock:write",
        takes=("Idempotency-Key", "If-Match"),
        body=StockAdjustment,
        examples={
            "a delivery": {"delta": 24, "reason": "delivery 4711"},
            "a count": {"set_to": 118, "expected_on_hand": 120, "reason": "yearly count"},
        },
        successes=(
            Success(
                201,
                "The level after the adjustment.",
                AdjustedLevel(SKU, "main", 144, 6, 0, 138, 9),
                CREATED,
            ),
        ),
        problems=(
            *COMMAND,
            "not-found",
            "precondition-failed",
            "stale-quantity",
            "would-breach-commitments",
        ),
    ),
    Operation(
        operation_id="show_stock",
        method="GET",
        path="/v1/stock",
        summary="List stock levels",
        says="What can be ordered of which product where, by SKU and location. `sku` may be given "
        "100 times.",
        scope="stock:read",
        takes=("Consistency-Token", "Prefer"),
        query=list_stock.ListStock,
        successes=(
            Success(
                200,
                "A page of levels.",
                list_stock.StockPage(
                    [list_stock.StockLevel(SKU, "main", 144, 6, 0, 138, 9, PLACED_AT)],
                    list_stock.Page(20, None),
                ),
                ("Link", *FRESHNESS),
            ),
        ),
        problems=READ,
    ),
    Operation(
        operation_id="register_customer",
        method="POST",
        path="/v1/customers",
        summary="Register a customer",
        says="Somebody can order from now on. An e-mail address may be registered more than once.",
        scope="customers:write",
        takes=("Idempotency-Key",),
        body=RegisterCustomer,
        examples={"a person": {"email": "ada@example.com", "name": "Ada Brandt"}},
        successes=(Success(201, "The customer.", RegisteredCustomer(CUSTOMER_ID, 1), CREATED),),
        problems=COMMAND,
    ),
    Operation(
        operation_id="show_projections",
        method="GET",
        path="/v1/projections",
        summary="Show the read models",
        says="How far each read model is behind the commands, and what is parked in it, now.",
        scope="operations:read",
        successes=(
            Success(
                200,
                "Every read model.",
                list_projections.Projections(
                    [
                        list_projections.Projection(
                            read_model="order_view",
                            version=1,
                            state="parked",
                            lag_s=0.0,
                            lag_events=0,
                            parked_count=1,
                            parked=[
                                list_projections.ParkedAggregate(
                                    "order", str(ORDER_ID), 88121, 5, PLACED_AT, "ValueError: ..."
                                )
                            ],
                        )
                    ]
                ),
            ),
        ),
        problems=KEYED,
    ),
    Operation(
        operation_id="show_metrics",
        method="GET",
        path="/metrics",
        summary="Metrics for Prometheus",
        says="The text format of Prometheus. With several processes on one port each scrape meets "
        "one of them, named by the label `process`.",
        scope="operations:read",
        successes=(
            Success(200, "All metrics.", 'waybill_command_queue{command="place_order"} 0.0\n'),
        ),
        problems=KEYED,
    ),
    Operation(
        operation_id="show_liveness",
        method="GET",
        path="/health/live",
        summary="Does a restart help?",
        says="503 when a task of the process has ended that should run.",
        scope=None,
        successes=(
            Success(200, "It lives.", Liveness("alive")),
            Success(503, "Restart it.", Liveness("broken", ("place_order",))),
        ),
        problems=OPEN,
    ),
    Operation(
        operation_id="show_readiness",
        method="GET",
        path="/health/ready",
        summary="Should requests come here?",
        says="Each dependency's state. Without Redis it is ready and degraded: reads come from "
        "PostgreSQL.",
        scope=None,
        successes=(
            Success(200, "Yes.", Readiness("ready", Dependency("up"), Dependency("up"))),
            Success(
                503,
                "No: PostgreSQL is away or lacks migrations, or the process is about to stop.",
                Readiness("unavailable", Dependency("down", "OSError"), Dependency("up")),
            ),
        ),
        problems=OPEN,
    ),
    Operation(
        operation_id="show_openapi",
        method="GET",
        path="/openapi.json",
        summary="This document",
        says="OpenAPI 3.1.",
        scope=None,
        successes=(Success(200, "The document.", {"openapi": "3.1.0"}),),
        problems=OPEN,
    ),
    Operation(
        operation_id="show_docs",
        method="GET",
        path="/docs",
        summary="This document as a page",
        says="One page of HTML that loads nothing.",
        scope=None,
        successes=(Success(200, "The page.", "<!doctype html>..."),),
        problems=OPEN,
    ),
    Operation(
        operation_id="show_problem",
        method="GET",
        path="/problems/{code}",
        summary="What a problem means",
        says="A problem document's `type` leads here.",
        scope=None,
        successes=(Success(200, "The page.", "<!doctype html>..."),),
        problems=(*OPEN, "not-found"),
    ),
)

# What a refusal looks like, by the functions that make them.
REFUSED: Final[tuple[Refusal, ...]] = (
    insufficient_stock([(0, SKU, "main", 2, 1)]),
    total_mismatch(expected_cents=2480, total_cents=2580),
    stale_quantity(expected=120, on_hand=119),
    would_breach_commitments(on_hand=4, committed=6),
    invalid_transition(action="cancel", status="cancelled"),
    duplicate("sku", SKU),
    duplicate("external_reference", "shop-7731"),
    precondition_failed(expected=1, current=2),
    unknown_products([(0, "MUG-BLEU")]),
    unknown_customer(CUSTOMER_ID),
    currency_mismatch(0, sku=SKU, asked="USD", priced="EUR"),
)
