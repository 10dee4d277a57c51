"""The preloaded past agrees with itself."""

import psycopg

from bench.catalogue import order_id
from bench.dataset import PRODUCTS, draw_past, load

ORDERS = 150

# What the levels say, and what the ledger says, where they differ.
UNEXPLAINED = """
SELECT level.sku
FROM stock_levels AS level
LEFT JOIN (
    SELECT sku, location, sum(on_hand_delta) AS on_hand, sum(allocated_delta) AS allocated,
           count(*) AS version
    FROM stock_movements GROUP BY sku, location
) AS ledger USING (sku, location)
WHERE (level.on_hand, level.allocated, level.version)
      IS DISTINCT FROM (ledger.on_hand, ledger.allocated, ledger.version)
"""
COUNT = """
SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM order_lines),
       (SELECT count(*) FROM orders WHERE status = 'cancelled'),
       (SELECT count(*) FROM orders AS placed WHERE total_cents <> (
           SELECT sum(line_total_cents) FROM order_lines AS line
           WHERE line.order_id = placed.order_id)),
       (SELECT max(number) FROM orders)
"""


def test_ledger_levels_and_totals_agree(postgres_url: str) -> None:
    said: list[str] = []
    shown: list[str] = []
    preloaded = load(postgres_url, ORDERS, said.append, shown.append)
    with psycopg.connect(postgres_url) as database:
        assert database.execute(UNEXPLAINED).fetchall() == []
        ((orders, lines, cancelled, wrong, last_number),) = database.execute(COUNT).fetchall()
        (next_number,) = database.execute("SELECT nextval('order_number')").fetchall()[0]
        (newest,) = database.execute(
            "SELECT order_id FROM orders ORDER BY placed_at DESC LIMIT 1"
        ).fetchall()[0]
    assert (orders, lines, cancelled, wrong) == (ORDERS, 3 * ORDERS, ORDERS // 10, 0)
    assert next_number > last_number
    assert newest == order_id(ORDERS - 1)
    assert preloaded.catalogue().orders[-1] == str(newest)
    assert any("] 150 of 150 orders" in each for each in shown)
    assert said[-1].startswith("loaded 150 orders in ")


def test_the_past_is_the_same_each_time() -> None:
    past = draw_past(50)
    assert past == draw_past(50)
    assert all(len(set(each.products)) == 3 for each in past)
    assert max(max(each.products) for each in past) < PRODUCTS
