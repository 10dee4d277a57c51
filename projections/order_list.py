"""The read model `order_list`: one narrow row per order, for `GET /v1/orders` with its filters.

Follows the order events. Its indexes serve the sorts (time and total, each with the order's id to
break ties), the filters by customer and status together with the time, and the filter by SKU.
"""

from typing import Final

from commands.events import (
    AnyEvent,
    CustomerRegistered,
    OrderCancelled,
    OrderPlaced,
    ProductRegistered,
    StockAdjusted,
    StockAllocated,
    StockReleased,
)
from projections.read_model import ReadModel


def listens_to(event: type[AnyEvent]) -> bool:
    if issubclass(event, OrderPlaced | OrderCancelled):
        return True
    _ignored: type[
        StockAdjusted | StockAllocated | StockReleased | ProductRegistered | CustomerRegistered
    ] = event
    return False


# Rows: one per order placed.
PLACE: Final = """
INSERT INTO order_list (order_id, number, customer_id, customer_name, customer_email, currency,
                        status, payment_status, fulfillment_status, return_status, total_cents,
                        line_count, skus, external_reference, version, placed_at, updated_at)
SELECT placed.order_id, placed.number, placed.customer_id, placed.customer ->> 'name',
       placed.customer ->> 'email', placed.currency, placed.status, placed.payment_status,
       placed.fulfillment_status, placed.return_status, placed.total_cents,
       jsonb_array_length(placed.lines),
       ARRAY(SELECT DISTINCT line ->> 'sku' FROM jsonb_array_elements(placed.lines) AS line
             ORDER BY 1),
       placed.external_reference, batch.aggregate_version, batch.occurred_at, batch.occurred_at
FROM batch,
     jsonb_to_record(batch.data) AS placed (
         order_id uuid, number bigint, customer_id uuid, customer jsonb, currency text, status text,
         payment_status text, fulfillment_status text, return_status text, total_cents bigint,
         external_reference text, lines jsonb)
WHERE batch.type = 'order.placed'
ON CONFLICT (order_id) DO NOTHING
"""

# Rows: one per order with a later event.
FOLLOW: Final = """
WITH last AS (
    SELECT DISTINCT ON (aggregate_id) aggregate_id::uuid AS order_id, aggregate_version, data,
           occurred_at
    FROM batch
    WHERE aggregate = 'order' AND type <> 'order.placed'
    ORDER BY aggregate_id, aggregate_version DESC
)
UPDATE order_list
SET status = stands.status, payment_status = stands.payment_status,
    fulfillment_status = stands.fulfillment_status, return_status = stands.return_status,
    total_cents = stands.total_cents, version = last.aggregate_version,
    updated_at = last.occurred_at
FROM last,
     jsonb_to_record(last.data) AS stands (
         status text, payment_status text, fulfillment_status text, return_status text,
         total_cents bigint)
WHERE order_list.order_id = last.order_id AND order_list.version < last.aggregate_version
"""

CLEAR: Final = """
DELETE FROM order_list
WHERE $1::text[] IS NULL OR order_id = ANY ($1::text[]::uuid[])
"""

BOOTSTRAP: Final = """
WITH filled AS (
    INSERT INTO order_list (order_id, number, customer_id, customer_name, customer_email, currency,
                            status, payment_status, fulfillment_status, return_status, total_cents,
                            line_count, skus, external_reference, version, placed_at, updated_at)
    SELECT o.order_id, o.number, o.customer_id, c.name, c.email, o.currency, o.status,
           o.payment_status, o.fulfillment_status, o.return_status, o.total_cents, l.line_count,
           l.skus, o.external_reference, o.version, o.placed_at, o.updated_at
    FROM orders AS o
    JOIN customers AS c USING (customer_id)
    JOIN (SELECT order_id, count(*)::integer AS line_count,
                 array_agg(DISTINCT sku ORDER BY sku) AS skus
          FROM order_lines
          WHERE $1::text[] IS NULL OR order_id = ANY ($1::text[]::uuid[])
          GROUP BY order_id) AS l USING (order_id)
    WHERE $1::text[] IS NULL OR o.order_id = ANY ($1::text[]::uuid[])
)
SELECT pg_current_snapshot()::text
"""

STRETCH: Final = """
SELECT count(*), (array_agg(order_id::text ORDER BY order_id DESC))[1]
FROM (
    SELECT order_id
    FROM orders
    WHERE $1::text IS NULL OR order_id > $1::text::uuid
    ORDER BY order_id
    LIMIT $2::integer
) AS stretch
"""

AUDIT: Final = """
WITH expected AS (
    SELECT o.order_id, o.number, o.customer_id, c.name AS customer_name, c.email AS customer_email,
           o.currency, o.status, o.payment_status, o.fulfillment_status, o.return_status,
           o.total_cents,
           (SELECT count(*)::integer FROM order_lines AS l WHERE l.order_id = o.order_id)
               AS line_count,
           ARRAY(SELECT DISTINCT l.sku FROM order_lines AS l WHERE l.order_id = o.order_id
                 ORDER BY l.sku) AS skus,
           o.external_reference, o.version, o.placed_at, o.updated_at
    FROM orders AS o
    JOIN customers AS c USING (customer_id)
    WHERE ($1::text IS NULL OR o.order_id > $1::text::uuid)
      AND ($2::text IS NULL OR o.order_id <= $2::text::uuid)
), shown AS (
    SELECT order_id, number, customer_id, customer_name, customer_email, currency, status,
           payment_status, fulfillment_status, return_status, total_cents, line_count, skus,
           external_reference, version, placed_at, updated_at
    FROM order_list
    WHERE ($1::text IS NULL OR order_id > $1::text::uuid)
      AND ($2::text IS NULL OR order_id <= $2::text::uuid)
)
SELECT order_id::text, to_jsonb(expected), to_jsonb(shown)
FROM expected
FULL JOIN shown USING (order_id)
WHERE expected IS DISTINCT FROM shown AND order_id::text <> ALL ($3::text[])
LIMIT $4::integer
"""

ORDER_LIST: Final = ReadModel(
    name="order_list",
    version=1,
    listens_to=listens_to,
    apply=(PLACE, FOLLOW),
    clear=CLEAR,
    bootstrap=BOOTSTRAP,
    stretch=STRETCH,
    audit=AUDIT,
)
