"""Published events: what happened, in the words of the publisher. The only language of the outbox.

An order event carries the whole status part of its order, a stock event the whole level after it,
so a reader that has the last event of an aggregate has its state. Fields are added with defaults,
never renamed or removed.
"""

from datetime import datetime
from typing import Annotated, ClassVar, TypeAlias
from uuid import UUID

from msgspec import Meta, Struct


class Event(Struct, frozen=True, kw_only=True):
    """One fact about one aggregate. `version` is the aggregate's after it, from 1 without gaps."""

    type: ClassVar[str]
    aggregate: ClassVar[str]

    version: Annotated[int, Meta(ge=1)]
    occurred_at: datetime

    @property
    def aggregate_id(self) -> str:
        """The aggregate's key, unique over all kinds of aggregates."""
        raise NotImplementedError


class OrderEvent(Event, frozen=True, kw_only=True):
    """What every order event says: the order's status after it."""

    aggregate: ClassVar[str] = "order"

    order_id: UUID
    customer_id: UUID
    status: str
    payment_status: str
    fulfillment_status: str
    return_status: str
    allowed_actions: tuple[str, ...]
    total_cents: int

    @property
    def aggregate_id(self) -> str:
        return str(self.order_id)


class Line(Struct, frozen=True):
    """One order line, priced; `name` and `unit_price_cents` are the product's at that moment."""

    line_no: int
    sku: str
    location: str
    name: str
    quantity: int
    unit_price_cents: int
    line_total_cents: int


class Buyer(Struct, frozen=True):
    """The customer as known when the order was placed."""

    customer_id: UUID
    name: str
    email: str


class OrderPlaced(OrderEvent, frozen=True, kw_only=True):
    """A new order holds its stock and waits for payment."""

    type: ClassVar[str] = "order.placed"

    number: int
    customer: Buyer
    currency: str
    external_reference: str | None
    lines: tuple[Line, ...]


class OrderCancelled(OrderEvent, frozen=True, kw_only=True):
    """The order is off; its stock has been released."""

    type: ClassVar[str] = "order.cancelled"

    reason: str


class StockEvent(Event, frozen=True, kw_only=True):
    """What every stock event says: the level after it, in units."""

    aggregate: ClassVar[str] = "stock"

    sku: str
    location: str
    on_hand: int
    allocated: int
    reserved: int
    available: int

    @property
    def aggregate_id(self) -> str:
        return f"{self.sku}@{self.location}"


class Share(Struct, frozen=True):
    """The part of one order in a movement, in units."""

    order_id: UUID
    quantity: int


class StockAdjusted(StockEvent, frozen=True, kw_only=True):
    """Somebody counted, received or wrote off."""

    type: ClassVar[str] = "stock.adjusted"

    delta: int
    reason: str


class StockAllocated(StockEvent, frozen=True, kw_only=True):
    """Orders took units; one event for all the orders of one transaction."""

    type: ClassVar[str] = "stock.allocated"

    shares: tuple[Share, ...]


class StockReleased(StockEvent, frozen=True, kw_only=True):
    """Orders gave units back; one event for all the orders of one transaction."""

    type: ClassVar[str] = "stock.released"

    shares: tuple[Share, ...]


class ProductRegistered(Event, frozen=True, kw_only=True):
    """A product can be ordered from now on."""

    type: ClassVar[str] = "product.registered"
    aggregate: ClassVar[str] = "product"

    sku: str
    name: str
    price_cents: int
    currency: str

    @property
    def aggregate_id(self) -> str:
        return self.sku


class CustomerRegistered(Event, frozen=True, kw_only=True):
    """A customer can order from now on."""

    type: ClassVar[str] = "customer.registered"
    aggregate: ClassVar[str] = "customer"

    customer_id: UUID
    name: str
    email: str

    @property
    def aggregate_id(self) -> str:
        return str(self.customer_id)


AnyEvent: TypeAlias = (
    OrderPlaced
    | OrderCancelled
    | StockAdjusted
    | StockAllocated
    | StockReleased
    | ProductRegistered
    | CustomerRegistered
)
