-- What POST /v1/orders does, one order at a time: the same rows, the same locks in the same order,
-- the same tables. Run by pgbench in prepared mode; `limits` passes :skus and :customers.
-- Three different products, one of each third of the catalogue, all drawn uniformly, as `limits`
-- orders them over HTTP.
\set third :skus / 3
\set a random(0, :third - 1)
\set b random(:third, 2 * :third - 1)
\set c random(2 * :third, 3 * :third - 1)
\set who random(0, :customers - 1)
\set key random(1, 9000000000000000000)

BEGIN;

-- The idempotency key: claim it, and see whether it has been answered.
SELECT pg_try_advisory_xact_lock(:key) AS mine, pg_current_xact_id()::text AS xid,
       (SELECT status FROM idempotency_keys WHERE owner = 'pgbench' AND key = :key::text) AS status;

-- The customer and the order's number.
SELECT nextval('order_number') AS number, uuidv7() AS order_id, customer_id, name, email,
       'BENCH-' || lpad(:a::text, 6, '0') AS first,
       'BENCH-' || lpad(:b::text, 6, '0') AS second,
       'BENCH-' || lpad(:c::text, 6, '0') AS third_one
FROM customers
WHERE customer_id = (lpad(to_hex(:who::bigint), 12, '0') || '70008000000000000001')::uuid \gset

-- The stock, locked in order, with prices.
SELECT level.sku, level.location, level.on_hand, level.allocated, level.reserved,
       level.safety_stock, level.backorder_limit, level.version, product.name,
       product.price_cents, product.currency
FROM stock_levels AS level
JOIN products AS product USING (sku)
WHERE level.sku IN (:first, :second, :third_one) AND level.location = 'main'
ORDER BY level.sku, level.location
FOR UPDATE OF level;

-- The order and its lines.
WITH line AS (
    SELECT row_number() OVER (ORDER BY sku) AS line_no, sku, name, price_cents
    FROM products
    WHERE sku IN (:first, :second, :third_one)
), placed AS (
    INSERT INTO orders (order_id, number, customer_id, currency, status, payment_status,
                        fulfillment_status, return_status, allowed_actions, total_cents, version,
                        placed_at, updated_at)
    SELECT :order_id::uuid, :number::bigint, :customer_id::uuid, 'EUR', 'placed', 'unpaid',
           'unfulfilled', 'none', '{cancel}', sum(price_cents), 1, now(), now()
    FROM line
)
INSERT INTO order_lines (order_id, line_no, sku, location, name, quantity, unit_price_cents,
                         line_total_cents)
SELECT :order_id::uuid, line_no, sku, 'main', name, 1, price_cents, price_cents
FROM line;

-- The stock taken, and the ledger.
WITH moved AS (
    UPDATE stock_levels
    SET allocated = allocated + 1, version = version + 1, updated_at = now()
    WHERE sku IN (:first, :second, :third_one) AND location = 'main'
    RETURNING sku, location
)
INSERT INTO stock_movements (sku, location, kind, allocated_delta, order_id, occurred_at)
SELECT sku, location, 'allocated', 1, :order_id::uuid, now()
FROM moved;

-- The events: one of the order, one of each level.
WITH level AS (
    SELECT sku, location, on_hand, allocated, reserved, version, sku || '@' || location AS id
    FROM stock_levels
    WHERE sku IN (:first, :second, :third_one) AND location = 'main'
)
INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                    occurred_at)
SELECT crc32(convert_to(:order_id, 'UTF8')) % 16, 'order', :order_id, 1, 'order.placed',
       ('{"version": 1, "occurred_at": "2026-01-01T00:00:00.000000Z", "order_id": "' || :order_id
        || '", "customer_id": "' || :customer_id || '", "status": "placed", "payment_status": '
        '"unpaid", "fulfillment_status": "unfulfilled", "return_status": "none", '
        '"allowed_actions": ["cancel"], "total_cents": 12345, "number": ' || :number
        || ', "customer": {"customer_id": "' || :customer_id || '", "name": "' || :name
        || '", "email": "' || :email || '"}, "currency": "EUR", "external_reference": null, '
        '"lines": [' || (
            SELECT string_agg('{"line_no": 1, "sku": "' || sku || '", "location": "main", "name": '
                              '"Product 1234", "quantity": 1, "unit_price_cents": 4115, '
                              '"line_total_cents": 4115}', ', ')
            FROM level) || ']}')::jsonb,
       'pgbench', now()
UNION ALL
SELECT crc32(convert_to(id, 'UTF8')) % 16, 'stock', id, version, 'stock.allocated',
       ('{"version": ' || version || ', "occurred_at": "2026-01-01T00:00:00.000000Z", "sku": "'
        || sku || '", "location": "main", "on_hand": ' || on_hand || ', "allocated": '
        || allocated || ', "reserved": ' || reserved || ', "available": 999999, '
        '"shares": [{"order_id": "' || :order_id || '", "quantity": 1}]}')::jsonb,
       'pgbench', now()
FROM level;

-- The answer, under its key.
INSERT INTO idempotency_keys (owner, key, fingerprint, status, body, etag, location, created_at)
VALUES ('pgbench', :key::text, '\x000102030405060708090a0b0c0d0e0f', 201,
        convert_to('{"order_id":"' || :order_id || '","number":' || :number || ',"status":"placed",'
                   '"currency":"EUR","total_cents":12345,"version":1,'
                   '"placed_at":"2026-01-01T00:00:00.000000Z"}', 'UTF8'),
        '"v1"', '/v1/orders/' || :order_id, now());

COMMIT;
