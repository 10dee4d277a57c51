"""What a first visitor finds: a small shop in an empty database, a key, three things to try."""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar
from uuid import UUID

from uuid_utils.compat import uuid7

from app.pools import open_postgres
from app.settings import Settings, client_url
from app.stack import read_demo_key, write_demo
from commands.adjust_stock import AdjustStock, adjust_stock_levels
from commands.api_keys import SCOPES, find_principal, hash_key, issue_api_key
from commands.cancel_order import CancelOrder, cancel_orders
from commands.command import (
    DEFAULT_LOCATION,
    Command,
    Connection,
    Outcome,
    Principal,
    Submission,
)
from commands.events import CustomerRegistered, OrderPlaced
from commands.place_order import OrderedLine, PlaceOrder, place_orders
from commands.refusals import Refusal
from commands.register_customer import RegisterCustomer, register_customers
from commands.register_product import RegisterProduct, register_products

# Far above what one machine can do; the limit is checked all the same.
DEMO_REQUESTS_PER_MINUTE: Final = 60_000_000

CURRENCY: Final = "EUR"
STOCK_EACH: Final = 500

PRODUCTS: Final = (
    ("MUG-BLUE", "Enamel mug, blue", 1290),
    ("MUG-WHITE", "Enamel mug, white", 1290),
    ("POT-1L", "Teapot, one litre", 3450),
    ("TEA-ASSAM", "Assam, 250 g", 1180),
    ("TEA-SENCHA", "Sencha, 100 g", 1490),
    ("TIN-S", "Tea tin, small", 690),
    ("TIN-L", "Tea tin, large", 990),
    ("SIEVE", "Steel sieve", 850),
    ("SPOON-2", "Two measuring spoons", 540),
    ("TRAY-OAK", "Oak tray", 4200),
    ("CLOTH", "Linen cloth", 1650),
    ("KETTLE", "Kettle with thermometer", 7900),
)

CUSTOMERS: Final = (
    ("ada@example.com", "Ada Brandt"),
    ("bo@example.com", "Bo Lindqvist"),
    ("chidi@example.com", "Chidi Okafor"),
    ("dana@example.com", "Dana Petrova"),
    ("emil@example.com", "Emil Roussel"),
)

ORDERS: Final = 20
CANCELLED_EACH: Final = 7
"""Every seventh order is called off."""

# Held until the transaction ends, so that two starts at once load the shop once.
TAKE_DEMO_LOCK: Final = "SELECT pg_advisory_xact_lock(7305417227013)"

IS_EMPTY: Final = "SELECT NOT EXISTS (SELECT FROM products) AND NOT EXISTS (SELECT FROM customers)"

# Something to try the curl lines on; no row in a database that has seen no shop yet.
FIND_EXAMPLE: Final = """
SELECT customer.customer_id, level.sku, product.currency
FROM stock_levels AS level
JOIN products AS product USING (sku)
CROSS JOIN (SELECT customer_id FROM customers ORDER BY registered_at, customer_id LIMIT 1)
     AS customer
WHERE level.location = $1 AND level.on_hand - level.allocated - level.reserved >= 2
ORDER BY level.sku
LIMIT 1
"""

C = TypeVar("C", bound=Command)


async def prepare_demo(settings: Settings, postgres_url: str) -> str:
    """Load the shop and issue the demo key, each unless it is there, and say what to try.

    Address and key go to `demo.env` in the data directory, readable by its owner alone.
    """
    known = read_demo_key(settings.data_dir)
    async with (
        open_postgres(postgres_url, application_name="waybill-commands", size=1) as pool,
        pool.acquire() as connection,
    ):
        async with connection.transaction():
            await connection.execute(TAKE_DEMO_LOCK)
            if await connection.fetchval(IS_EMPTY):
                await load_shop(connection, datetime.now(UTC))
        key = await demo_key(connection, known)
        example = await connection.fetchrow(FIND_EXAMPLE, DEFAULT_LOCATION)
    url = client_url(settings)
    file = write_demo(settings.data_dir, url=url, key=key)
    text = f"Waybill is up: {url}\nDemo key:      {key}\n               (both in {file})"
    return text + ("" if example is None else things_to_try(url, key, *example))


async def load_shop(connection: Connection, now: datetime) -> None:
    """Register products and customers, fill the shelves, place orders, cancel some.

    The transaction is the caller's: the shop is there whole or not at all.
    """
    goods = [RegisterProduct(sku, name, cents, CURRENCY) for sku, name, cents in PRODUCTS]
    _done(await register_products(_batch(goods), connection=connection, now=now))
    people = [RegisterCustomer(email, name) for email, name in CUSTOMERS]
    registered = _done(await register_customers(_batch(people), connection=connection, now=now))
    customers = [each.customer_id for each in registered if isinstance(each, CustomerRegistered)]
    deliveries = [
        AdjustStock(sku, DEFAULT_LOCATION, "opening stock", delta=STOCK_EACH)
        for sku, _, _ in PRODUCTS
    ]
    _done(await adjust_stock_levels(_batch(deliveries), connection=connection, now=now))
    wishes = [_wish(number, customers[number % len(customers)]) for number in range(ORDERS)]
    outcomes = _done(await place_orders(_batch(wishes), connection=connection, now=now))
    placed = [each.order_id for each in outcomes if isinstance(each, OrderPlaced)]
    regrets = [CancelOrder(each, "ordered twice") for each in placed[::CANCELLED_EACH]]
    _done(await cancel_orders(_batch(regrets), connection=connection, now=now))


async def demo_key(connection: Connection, known: str | None) -> str:
    """Return the key of the last start if it still opens this database, else a new one."""
    now = datetime.now(UTC)
    if known and await find_principal(connection, secret_hash=hash_key(known), now=now):
        return known
    _, key = await issue_api_key(
        connection,
        owner="demo",
        name="made by waybill up",
        scopes=sorted(SCOPES),
        customer_id=None,
        requests_per_minute=DEMO_REQUESTS_PER_MINUTE,
        expires_at=None,
        now=now,
    )
    return key


def things_to_try(url: str, key: str, customer_id: UUID, sku: str, currency: str) -> str:
    """Three lines to paste into a shell; the second one places a new order after each start."""
    auth = f"-H 'Authorization: Bearer {key}'"
    order = (
        f'{{"customer_id":"{customer_id}","currency":"{currency}",'
        f'"lines":[{{"sku":"{sku}","quantity":2}}]}}'
    )
    post = f"-H 'Content-Type: application/json' -H 'Idempotency-Key: {secrets.token_hex(4)}'"
    return f"""

See the stock, order two (mind the Consistency-Token), and find the order in the list:

  curl -s '{url}/v1/stock?sku={sku}' {auth}
  curl -si '{url}/v1/orders' {auth} {post} -d '{order}'
  curl -s '{url}/v1/orders?limit=1' {auth}"""


def _batch(commands: Sequence[C]) -> list[Submission[C]]:
    principal = Principal(uuid7(), "demo", SCOPES, None, DEMO_REQUESTS_PER_MINUTE)
    return [Submission(each, principal, f"demo-{at}") for at, each in enumerate(commands)]


def _wish(number: int, customer_id: UUID) -> PlaceOrder:
    # One to three different products; 5 and 7 share no factor with the number of products.
    skus = {PRODUCTS[(number * 5 + step * 7) % len(PRODUCTS)][0] for step in range(number % 3 + 1)}
    lines = tuple(OrderedLine(sku, number % 4 + 1) for sku in sorted(skus))
    return PlaceOrder(customer_id, CURRENCY, lines, external_reference=f"demo-{number + 1}")


def _done(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    for outcome in outcomes:
        assert not isinstance(outcome, Refusal), outcome.detail
    return outcomes
