"""The scenario: a shopper browses, places an order, reads it back, looks orders up and lists them.

A story yields one step at a time and is sent the answer to it. It knows nothing of clocks, sockets
or greenlets, so any client can play it.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Final, NamedTuple, TypeAlias

from bench.catalogue import CURRENCY, Catalogue
from bench.plan import Arrival, skewed, skewed_distinct
from bench.requests import Answer, Requests
from bench.slo import BROWSE, LIST_CUSTOMER, LIST_STATUS, PLACE, READ, READ_BACK, Probe, seconds

LINES: Final = 3


class Step(NamedTuple):
    """One request, and what the body of a good answer holds."""

    operation: str
    request: bytes
    holds: bytes
    wait_s: int = 0  # how long the server may hold it
    witness: bytes = b""  # the same read without waiting; set where lag is measured


Story: TypeAlias = Generator[Step, Answer, None]


class Ledger:
    """What was promised: written before sending and after answering, audited at the end."""

    def __init__(self) -> None:
        self.orders: list[str] = []  # acknowledged, oldest first
        self.open: dict[int, bytes] = {}  # by arrival: requests not answered for sure
        self.first_placed_at: str | None = None
        self.token: str | None = None  # of the last order acknowledged

    def ask(self, number: int, request: bytes) -> None:
        self.open[number] = request

    def settle(self, number: int, answer: Answer) -> None:
        """Take note of an answer. No answer, or a 5xx, leaves it open whether there is an order."""
        if answer.status == 0 or answer.status >= 500:
            return
        del self.open[number]
        if answer.status == 201:
            order = answer.json()
            self.orders.append(order["order_id"])
            self.token = answer.header("Consistency-Token")
            placed_at = str(order["placed_at"])
            self.first_placed_at = min(placed_at, self.first_placed_at or placed_at)


class Shopper:
    """Tells the story of each arrival."""

    def __init__(
        self, requests: Requests, catalogue: Catalogue, ledger: Ledger, probe: Probe | None
    ) -> None:
        self._requests = requests
        self._catalogue = catalogue
        self._ledger = ledger
        self._probe = probe
        self._stories: dict[str, Callable[[Arrival], Story]] = {
            BROWSE: self.browse_stock,
            PLACE: self.place_order,
            READ: self.read_order,
            LIST_CUSTOMER: self.list_customer_orders,
            LIST_STATUS: self.list_placed_orders,
        }

    def story_of(self, arrival: Arrival) -> Story:
        return self._stories[arrival.operation](arrival)

    def browse_stock(self, arrival: Arrival) -> Story:
        """How many are left of this product?"""
        sku = self._sku(arrival.draws[0])
        yield Step(BROWSE, self._requests.get(f"/v1/stock?sku={sku}"), sku.encode())

    def place_order(self, arrival: Arrival) -> Story:
        """Order three products; some shoppers look at their order at once."""
        customer, *products, looks = arrival.draws
        body = {
            "customer_id": self._customer(customer),
            "currency": CURRENCY,
            "lines": [{"sku": sku, "quantity": 1} for sku in self._skus(products[:LINES])],
        }
        request = self._requests.post("/v1/orders", body, key=str(arrival.number))
        self._ledger.ask(arrival.number, request)
        answer = yield Step(PLACE, request, b'"order_id"')
        self._ledger.settle(arrival.number, answer)
        if answer.status == 201 and self._probe is not None and looks < self._probe.sample:
            yield self._read_back(answer, self._probe)

    def _read_back(self, placed: Answer, probe: Probe) -> Step:
        """Here is my order: shown even if the read model has to catch up first."""
        order_id = placed.json()["order_id"]
        path, token = f"/v1/orders/{order_id}", placed.header("Consistency-Token")
        wait_s = int(seconds(probe.timeout))
        return Step(
            READ_BACK,
            self._requests.get(path, token=token, wait_s=wait_s),
            order_id.encode(),
            wait_s=wait_s,
            witness=self._requests.get(path, token=token, wait_s=0),
        )

    def read_order(self, arrival: Arrival) -> Story:
        """Where is that order? The newest are asked for most."""
        known = self._catalogue.orders or self._ledger.orders
        if known:
            order_id = known[-1 - skewed(arrival.draws[0], len(known))]
            yield Step(READ, self._requests.get(f"/v1/orders/{order_id}"), order_id.encode())
        else:
            yield from self.browse_stock(arrival)

    def list_customer_orders(self, arrival: Arrival) -> Story:
        """What has this customer ordered?"""
        customer = self._customer(arrival.draws[0])
        path = f"/v1/orders?customer_id={customer}&limit=20"
        yield Step(LIST_CUSTOMER, self._requests.get(path), b'"data"')

    def list_placed_orders(self, _arrival: Arrival) -> Story:
        """What is there to pack?"""
        request = self._requests.get("/v1/orders?status=placed&limit=20")
        yield Step(LIST_STATUS, request, b'"data"')

    def _sku(self, draw: float) -> str:
        return self._catalogue.skus[skewed(draw, len(self._catalogue.skus))]

    def _skus(self, draws: Sequence[float]) -> list[str]:
        skus = self._catalogue.skus
        return [skus[index] for index in skewed_distinct(draws, len(skus))]

    def _customer(self, draw: float) -> str:
        return self._catalogue.customers[skewed(draw, len(self._catalogue.customers))]
