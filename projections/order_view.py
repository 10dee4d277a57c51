"""The read model `order_view`: one order as one document, for `GET /v1/orders/{order_id}`.

Follows the order events. The lines and the customer are as they were when the order was placed; of
the rest every order event says how it stands, so the last one of an order wins.
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
INSERT INTO order_view (order_id, number, customer_id, customer, currency, status, payment_status,
                        fulfillment_status, return_status, allowed_actions, total_cents,
                        external_reference, lines, version, placed_at, updated_at)
SELECT placed.order_id, placed.number, placed.customer_id, placed.customer, placed.currency,
       placed.status, placed.payment_status, placed.fulfillment_status, placed.return_status,
       placed.allowed_actions, placed.total_cents, placed.external_reference, placed.lines,
       batch.aggregate_version, batch.occurred_at, batch.occurred_at
FROM batch,
     jsonb_to_record(batch.data) AS placed (
         order_id uuid, number bigint, customer_id uuid, customer jsonb, currency text, status text,
         payment_status text, fulfillment_status text, return_status text, allowed_actions text[],
         total_cents bigint, external_reference text, lines jsonb)
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
UPDATE order_view
SET status = stands.status, payment_status = stands.payment_status,
    fulfillment_status = stands.fulfillment_status, return_status = stands.return_status,
    allowed_actions = stands.allowed_actions, total_cents = stands.total_cents,
    version = last.aggregate_version, updated_at = last.occurred_at
FROM last,
     jsonb_to_record(last.data) AS stands (
         status text, payment_status text, fulfillment_status text, return_status text,
         allowed_actions text[], total_cents bigint)
WHERE order_view.order_id = last.order_id AND order_view.version < last.aggregate_version
"""

CLEAR: Final = """
DELETE FROM order_view
WHERE $1::text[] IS NULL OR order_id = ANY ($1::text[]::uuid[])
"""

BOOTSTRAP: Final = """
WITH filled AS (
    INSERT INTO order_view (order_id, number, customer_id, customer, currency, status,
                            payment_status, fulfillment_status, return_status, allowed_actions,
                            total_cents, external_reference, lines, version, placed_at, updated_at)
    SELECT o.order_id, o.number, o.customer_id,
           jsonb_build_object('customer_id', c.customer_id, 'name', c.name, 'email', c.email),
           o.currency, o.status, o.payment_status, o.fulfillment_status, o.return_status,
           o.allowed_actions, o.total_cents, o.external_reference, l.lines, o.version, o.placed_at,
           o.updated_at
    FROM orders AS o
    JOIN customers AS c USING (customer_id)
    JOIN (SELECT order_id,
                 jsonb_agg(jsonb_build_object(
                     'line_no', line_no, 'sku', sku, 'location', location, 'name', name,
                     'quantity', quantity, 'unit_price_cents', unit_price_cents,
                     'line_total_cents', line_total_cents) ORDER BY line_no) AS lines
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
    SELECT o.order_id, o.number, o.customer_id,
           jsonb_build_object('customer_id', c.customer_id, 'name', c.name, 'email', c.email)
               AS customer,
           o.currency, o.status, o.payment_status, o.fulfillment_status, o.return_status,
           o.allowed_actions, o.total_cents, o.external_reference,
           (SELECT jsonb_agg(jsonb_build_object(
                       'line_no', line_no, 'sku', sku, 'location', location, 'name', l.name,
                       'quantity', quantity, 'unit_price_cents', unit_price_cents,
                       'line_total_cents', line_total_cents) ORDER BY line_no)
            FROM order_lines AS l
            WHERE l.order_id = o.order_id) AS lines,
           o.version, o.placed_at, o.updated_at
    FROM orders AS o
    JOIN customers AS c USING (customer_id)
    WHERE ($1::text IS NULL OR o.order_id > $1::text::uuid)
      AND ($2::text IS NULL OR o.order_id <= $2::text::uuid)
), shown AS (
    SELECT order_id, number, customer_id, customer, currency, status, payment_status,
           fulfillment_status, return_status, allowed_actions, total_cents, external_reference,
           lines, version, placed_at, updated_at
    FROM order_view
    WHERE ($1::text IS NULL OR order_id > $1::text::uuid)
      AND ($2::text IS NULL OR order_id <= $2::text::uuid)
)
SELECT order_id::text, to_jsonb(expected), to_jsonb(shown)
FROM expected
FULL JOIN shown USING (order_id)
WHERE expected IS DISTINCT FROM shown AND order_id::text <> ALL ($3::text[])
LIMIT $4::integer
"""

ORDER_VIEW: Final = ReadModel(
    name="order_view",
    version=1,
    listens_to=listens_to,
    apply=(PLACE, FOLLOW),
    clear=CLEAR,
    bootstrap=BOOTSTRAP,
    stretch=STRETCH,
    audit=AUDIT,
)
