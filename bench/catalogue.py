"""Who orders what: the customers, products and older orders that the load draws from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final
from uuid import UUID

from msgspec import Struct

from bench.requests import Answer, Requests

LOCATION: Final = "main"
CURRENCY: Final = "EUR"
PRODUCTS: Final = 50  # registered over HTTP where nothing was loaded before
CUSTOMERS: Final = 200
STOCK: Final = 1_000_000  # units of each product: no run sells that many

AskAll = Callable[[Iterable[bytes]], Sequence[Answer]]
"""Sends requests, several at a time, and returns the answers in order."""


class CatalogueError(Exception):
    """The server did not take the customers and products that the load needs."""


class Catalogue(Struct, frozen=True):
    """What there is to order, to order for and to look up."""

    skus: Sequence[str]  # the first are the most wanted
    customers: Sequence[str]  # the first order most
    orders: Sequence[str]  # the last are the newest


class Preloaded(Struct, frozen=True):
    """How many rows were loaded. Their ids follow from their numbers, so no list is handed over."""

    skus: int
    customers: int
    orders: int

    def catalogue(self) -> Catalogue:
        return Catalogue(
            [sku(number) for number in range(self.skus)],
            [str(customer_id(number)) for number in range(self.customers)],
            [str(order_id(number)) for number in range(self.orders)],
        )


def sku(number: int) -> str:
    return f"BENCH-{number:06d}"


def customer_id(number: int) -> UUID:
    return _uuid7(number, kind=1)


def order_id(number: int) -> UUID:
    return _uuid7(number, kind=2)


def _uuid7(number: int, *, kind: int) -> UUID:
    """A UUID of version 7 whose time is `number`: ascending, and far from any made by a clock."""
    return UUID(int=number << 80 | 7 << 76 | 2 << 62 | kind)


def register(requests: Requests, ask_all: AskAll) -> Catalogue:
    """Register products, their stock and customers over HTTP; names are unique to this run.

    Raises:
        CatalogueError: a request was not answered with 201.
    """
    skus = [f"B-{requests.run}-{number:03d}" for number in range(PRODUCTS)]
    _all_created(
        ask_all(
            requests.post(
                "/v1/products",
                {"sku": each, "name": each, "price_cents": 1000, "currency": CURRENCY},
                key=f"product-{each}",
            )
            for each in skus
        )
    )
    _all_created(
        ask_all(
            requests.post(
                f"/v1/stock/{each}/{LOCATION}/adjustments",
                {"delta": STOCK, "reason": "load test"},
                key=f"stock-{each}",
            )
            for each in skus
        )
    )
    customers = _all_created(
        ask_all(
            requests.post(
                "/v1/customers",
                {"email": f"{requests.run}-{number}@example.com", "name": f"Customer {number}"},
                key=f"customer-{number}",
            )
            for number in range(CUSTOMERS)
        )
    )
    return Catalogue(skus, [answer.json()["customer_id"] for answer in customers], [])


def _all_created(answers: Sequence[Answer]) -> Sequence[Answer]:
    for answer in answers:
        if answer.status != 201:
            said = answer.body[:300].decode(errors="replace") or "no answer"
            raise CatalogueError(f"set-up over HTTP failed: status {answer.status}: {said}")
    return answers
