"""Orders of the past: by COPY into the normalized tables, by rebuild into the read models.

Every tenth order is cancelled. Customers and products are drawn as the load draws them, so the
popular ones have long histories. Ledger and levels agree. Nothing is appended to the outbox: the
read models are filled from the normalized tables, as by any rebuild.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, LiteralString, NamedTuple, TypeAlias

import psycopg

from bench.catalogue import CURRENCY, LOCATION, STOCK, Preloaded, customer_id, order_id, sku
from bench.plan import skewed, skewed_distinct
from bench.stack import Stack, run_waybill

PRODUCTS: Final = 2_000
CUSTOMERS: Final = 10_000
LINES: Final = 3
HISTORY: Final = timedelta(days=90)
CANCELLED_EVERY: Final = 10
BATCH: Final = 5_000  # orders per transaction: about 37,000 rows
READ_MODELS: Final = ("order_view", "order_list", "stock_availability")
BAR: Final = 30  # characters

Connection: TypeAlias = psycopg.Connection[Any]
Say = Callable[[str], None]

# $1 how many. Takes numbers from the sequence and returns the last one.
TAKE_NUMBERS: Final = "SELECT setval('order_number', nextval('order_number') + $1)"
COPY_PRODUCTS: Final = """
COPY products (sku, name, price_cents, currency, version, registered_at, updated_at) FROM STDIN
"""
COPY_CUSTOMERS: Final = """
COPY customers (customer_id, email, name, version, registered_at, updated_at) FROM STDIN
"""
COPY_LEVELS: Final = """
COPY stock_levels (sku, location, on_hand, allocated, reserved, version, updated_at) FROM STDIN
"""
COPY_MOVEMENTS: Final = """
COPY stock_movements (sku, location, kind, on_hand_delta, allocated_delta, order_id, reason,
                      occurred_at) FROM STDIN
"""
COPY_ORDERS: Final = """
COPY orders (order_id, number, customer_id, currency, status, payment_status, fulfillment_status,
             return_status, allowed_actions, total_cents, cancel_reason, version, placed_at,
             updated_at) FROM STDIN
"""
COPY_LINES: Final = """
COPY order_lines (order_id, line_no, sku, location, name, quantity, unit_price_cents,
                  line_total_cents) FROM STDIN
"""
# Outside of a transaction: statistics for the planner, hint bits, and no dirty page left to write,
# so that neither autovacuum nor a checkpoint falls into a measurement on account of the load.
TIDY: Final = ("VACUUM (ANALYZE)", "CHECKPOINT")


class Past(NamedTuple):
    """One order of the past, in numbers of the catalogue; one unit of each product."""

    number: int
    customer: int
    products: Sequence[int]

    @property
    def is_cancelled(self) -> bool:
        return self.number % CANCELLED_EVERY == CANCELLED_EVERY - 1


def load(postgres_url: str, orders: int, say: Say, show: Say) -> Preloaded:
    """Load products, customers, stock and `orders` into the normalized tables.

    One transaction per BATCH orders; a load that breaks off leaves what it has loaded, and cannot
    be repeated on the same database.
    """
    past = draw_past(orders)
    began_at = datetime.now(UTC) - HISTORY - timedelta(hours=1)
    started = time.monotonic()
    with psycopg.connect(
        postgres_url,
        application_name="waybill-bench",
        autocommit=True,
        cursor_factory=psycopg.RawCursor,
    ) as link:
        with link.transaction():
            _load_catalogue(link, past, began_at.isoformat())
        last_number = int(link.execute(TAKE_NUMBERS, [orders]).fetchall()[0][0])
        for first in range(0, orders, BATCH):
            with link.transaction():
                _load_orders(
                    link, past[first : first + BATCH], began_at, last_number - orders, orders
                )
            show(_progress(min(orders, first + BATCH), orders, time.monotonic() - started))
    elapsed_s = time.monotonic() - started
    show("")
    say(f"loaded {orders:,} orders in {elapsed_s:.1f} s, {orders / elapsed_s:,.0f} orders/s")
    return Preloaded(PRODUCTS, CUSTOMERS, orders)


def rebuild_read_models(stack: Stack, say: Say) -> None:
    """Fill the read models from the normalized tables, while the stack serves.

    Raises:
        StackError: a rebuild failed, or it is not our own stack.
    """
    for name in READ_MODELS:
        started = time.monotonic()
        run_waybill(stack, "projections", "rebuild", name)
        say(f"rebuilt {name} in {time.monotonic() - started:.1f} s")


def tidy(postgres_url: str) -> None:
    """Do what the server would otherwise do later, in mid-measurement. Needs a superuser."""
    with psycopg.connect(postgres_url, autocommit=True) as link:
        for statement in TIDY:
            link.execute(statement)


def draw_past(orders: int) -> list[Past]:
    """Draw who ordered what; the same for the same number of orders."""
    random = Random(orders)  # noqa: S311  reproducible on purpose
    return [
        Past(
            number,
            skewed(random.random(), CUSTOMERS),
            sorted(skewed_distinct([random.random() for _ in range(LINES)], PRODUCTS)),
        )
        for number in range(orders)
    ]


def _load_catalogue(link: Connection, past: Sequence[Past], at: str) -> None:
    taken = Counter(product for each in past for product in each.products)
    released = Counter(product for each in past if each.is_cancelled for product in each.products)
    _copy(
        link,
        COPY_PRODUCTS,
        (
            f"{sku(n)}\t{_product_name(n)}\t{_price_cents(n)}\t{CURRENCY}\t1\t{at}\t{at}\n"
            for n in range(PRODUCTS)
        ),
    )
    _copy(
        link,
        COPY_CUSTOMERS,
        (
            f"{customer_id(n)}\tcustomer-{n}@example.com\tCustomer {n}\t1\t{at}\t{at}\n"
            for n in range(CUSTOMERS)
        ),
    )
    _copy(
        link,
        COPY_LEVELS,
        (
            f"{sku(n)}\t{LOCATION}\t{STOCK}\t{taken[n] - released[n]}\t0"
            f"\t{1 + taken[n] + released[n]}\t{at}\n"
            for n in range(PRODUCTS)
        ),
    )
    _copy(
        link,
        COPY_MOVEMENTS,
        (
            f"{sku(n)}\t{LOCATION}\treceived\t{STOCK}\t0\t\\N\tfirst delivery\t{at}\n"
            for n in range(PRODUCTS)
        ),
    )


def _load_orders(
    link: Connection, batch: Sequence[Past], began_at: datetime, before_number: int, orders: int
) -> None:
    placed_at = [(began_at + HISTORY * (each.number / orders)).isoformat() for each in batch]
    ids = [order_id(each.number) for each in batch]
    _copy(
        link,
        COPY_ORDERS,
        (
            f"{key}\t{before_number + each.number + 1}\t{customer_id(each.customer)}\t{CURRENCY}"
            f"\t{'cancelled' if each.is_cancelled else 'placed'}\tunpaid\tunfulfilled\tnone"
            f"\t{'{}' if each.is_cancelled else '{cancel}'}"
            f"\t{sum(map(_price_cents, each.products))}"
            f"\t{'changed their mind' if each.is_cancelled else NULL}"
            f"\t{2 if each.is_cancelled else 1}\t{at}\t{at}\n"
            for each, key, at in zip(batch, ids, placed_at, strict=True)
        ),
    )
    _copy(
        link,
        COPY_LINES,
        (
            f"{key}\t{line_no}\t{sku(n)}\t{LOCATION}\t{_product_name(n)}\t1\t{_price_cents(n)}"
            f"\t{_price_cents(n)}\n"
            for each, key in zip(batch, ids, strict=True)
            for line_no, n in enumerate(each.products, 1)
        ),
    )
    _copy(
        link,
        COPY_MOVEMENTS,
        (
            f"{sku(n)}\t{LOCATION}\t{kind}\t0\t{delta}\t{key}\t{NULL}\t{at}\n"
            for each, key, at in zip(batch, ids, placed_at, strict=True)
            for kind, delta in (ALLOCATED, RELEASED)[: 1 + each.is_cancelled]
            for n in each.products
        ),
    )


NULL: Final = "\\N"  # COPY's text format
ALLOCATED: Final = ("allocated", 1)
RELEASED: Final = ("released", -1)


def _copy(link: Connection, statement: LiteralString, rows: Iterable[str]) -> None:
    with link.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write("".join(rows))  # 30,000 rows of 100 bytes


def _product_name(number: int) -> str:
    return f"Product {number}"


def _price_cents(number: int) -> int:
    return 500 + number * 37 % 20_000


def _progress(done: int, orders: int, elapsed_s: float) -> str:
    filled = BAR * done // orders
    return (
        f"loading [{'#' * filled}{'.' * (BAR - filled)}] {done:,} of {orders:,} orders,"
        f" {done / elapsed_s:,.0f} orders/s"
    )
