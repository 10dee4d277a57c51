"""The yardstick for orders writes what the service writes for one, and keeps the same books."""

import os

import psycopg

from bench.cost import Meter
from bench.dataset import load
from bench.pgbench import place_orders
from tests.bench.test_dataset import UNEXPLAINED

COUNT = """
SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM order_lines),
       (SELECT count(*) FROM stock_movements WHERE kind = 'allocated'),
       (SELECT count(*) FROM outbox WHERE type = 'order.placed'),
       (SELECT count(*) FROM outbox WHERE type = 'stock.allocated'),
       (SELECT count(*) FROM idempotency_keys)
"""


def test_pgbench_places_whole_orders(postgres_url: str) -> None:
    preloaded = load(postgres_url, 10, lambda _: None, lambda _: None)
    with Meter({"generator": [os.getpid()]}, postgres_url) as meter:
        placed = place_orders(postgres_url, preloaded, connections=2, seconds=1, meter=meter)
    with psycopg.connect(postgres_url) as database:
        (counts,) = database.execute(COUNT).fetchall()
        assert database.execute(UNEXPLAINED).fetchall() == []
    orders = counts[0] - 10
    assert orders > 0
    assert counts == (10 + orders, 30 + 3 * orders, 30 + 3 * orders, orders, 3 * orders, orders)
    assert placed.per_second > 0
    assert placed.client_us > 0
