"""Answers: what each command's outcome looks like to its client, now and on every replay."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec import Struct

from app.http.problems import refused
from commands.adjust_stock import AdjustStock
from commands.cancel_order import CancelOrder
from commands.command import Command, Outcome, Submission
from commands.events import (
    CustomerRegistered,
    Event,
    OrderCancelled,
    OrderPlaced,
    ProductRegistered,
    StockAdjusted,
)
from commands.executor import Rendered
from commands.place_order import PlaceOrder
from commands.refusals import Refusal
from commands.register_customer import RegisterCustomer
from commands.register_product import RegisterProduct


class PlacedOrder(Struct, frozen=True):
    """The order as placed."""

    order_id: UUID
    number: int
    status: str
    currency: str
    total_cents: int
    version: int
    placed_at: datetime


class CancelledOrder(Struct, frozen=True):
    """The order as it is now."""

    order_id: UUID
    status: str
    version: int


class AdjustedLevel(Struct, frozen=True):
    """The level after the adjustment, in units."""

    sku: str
    location: str
    on_hand: int
    allocated: int
    reserved: int
    available: int
    version: int


class RegisteredProduct(Struct, frozen=True):
    """The product can be ordered."""

    sku: str
    version: int


class RegisteredCustomer(Struct, frozen=True):
    """The customer can order."""

    customer_id: UUID
    version: int


def render(submission: Submission[Any], outcome: Outcome) -> Rendered:
    """Status, body, ETag and Location. The body is stored, so it names this request for ever."""
    if isinstance(outcome, Refusal):
        return _refused(submission, outcome)
    return _done(outcome)


def _done(event: Event) -> Rendered:
    etag = f'"v{event.version}"'
    match event:
        case OrderPlaced():
            placed = PlacedOrder(
                event.order_id,
                event.number,
                event.status,
                event.currency,
                event.total_cents,
                event.version,
                event.occurred_at,
            )
            return Rendered(201, _encode(placed), etag, f"/v1/orders/{event.order_id}")
        case OrderCancelled():
            cancelled = CancelledOrder(event.order_id, event.status, event.version)
            return Rendered(200, _encode(cancelled), etag)
        case StockAdjusted():
            level = AdjustedLevel(
                event.sku,
                event.location,
                event.on_hand,
                event.allocated,
                event.reserved,
                event.available,
                event.version,
            )
            where = f"/v1/stock?sku={event.sku}&location={event.location}"
            return Rendered(201, _encode(level), etag, where)
        case ProductRegistered():
            product = RegisteredProduct(event.sku, event.version)
            return Rendered(201, _encode(product), etag, f"/v1/products/{event.sku}")
        case CustomerRegistered():
            customer = RegisteredCustomer(event.customer_id, event.version)
            return Rendered(201, _encode(customer), etag, f"/v1/customers/{event.customer_id}")
        case _:
            raise AssertionError(f"no command comes to {event.type}")


def _refused(submission: Submission[Any], refusal: Refusal) -> Rendered:
    status, body = refused(
        refusal,
        instance=path_of(submission.command),
        request_id=submission.request_id,
        trace_id=submission.traceparent.split("-")[1] if submission.traceparent else None,
    )
    # RFC 9110, 13.1.1: who was refused by If-Match learns which version is the current one.
    current = refusal.facts.get("current_version")
    return Rendered(status, body, None if current is None else f'"v{current}"')


def path_of(command: Command) -> str:
    """The path that the command was posted to."""
    match command:
        case PlaceOrder():
            return "/v1/orders"
        case CancelOrder():
            return f"/v1/orders/{command.order_id}/cancel"
        case AdjustStock():
            return f"/v1/stock/{command.sku}/{command.location}/adjustments"
        case RegisterProduct():
            return "/v1/products"
        case RegisterCustomer():
            return "/v1/customers"
        case _:
            raise AssertionError(f"{type(command).__name__} is posted nowhere")


_encode: Final = msgspec.json.Encoder().encode
