-- Expand. The write side: the normalized truth, the outbox, idempotency keys and API keys.

CREATE TABLE api_keys (
    key_id              uuid PRIMARY KEY,
    owner               text NOT NULL CHECK (owner <> ''),   -- the client; idempotency keys are scoped to it
    name                text NOT NULL,
    prefix              text NOT NULL,                       -- the first characters, to recognise a key by
    secret_hash         bytea NOT NULL UNIQUE,               -- SHA-256 of the whole key (256 random bits)
    scopes              text[] NOT NULL,
    customer_id         uuid,                                -- a storefront key sees this customer alone
    requests_per_minute integer NOT NULL CHECK (requests_per_minute > 0),
    created_at          timestamptz NOT NULL,
    expires_at          timestamptz,
    revoked_at          timestamptz
);

-- How much of each key's quota of the current minute has been leased to web processes.
CREATE TABLE rate_limit_windows (
    key_id       uuid PRIMARY KEY REFERENCES api_keys ON DELETE CASCADE,
    window_start timestamptz NOT NULL,
    leased       integer NOT NULL CHECK (leased >= 0)
) WITH (fillfactor = 50);

CREATE TABLE products (
    sku           text PRIMARY KEY CHECK (sku ~ '^[A-Za-z0-9._-]{1,64}$'),
    name          text NOT NULL CHECK (name <> ''),
    price_cents   bigint NOT NULL CHECK (price_cents >= 0),
    currency      text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    version       integer NOT NULL CHECK (version > 0),
    registered_at timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL
);

CREATE TABLE customers (
    customer_id   uuid PRIMARY KEY,
    email         text NOT NULL,
    name          text NOT NULL CHECK (name <> ''),
    version       integer NOT NULL CHECK (version > 0),
    registered_at timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL
);

CREATE SEQUENCE order_number START 1001;

CREATE TABLE orders (
    order_id           uuid PRIMARY KEY,
    number             bigint NOT NULL UNIQUE,
    customer_id        uuid NOT NULL REFERENCES customers,
    currency           text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    status             text NOT NULL CHECK (status IN (
                           'draft', 'placed', 'confirmed', 'completed', 'expired', 'cancelled')),
    payment_status     text NOT NULL CHECK (payment_status IN (
                           'unpaid', 'authorized', 'partially_paid', 'paid', 'overpaid',
                           'partially_refunded', 'refunded', 'voided')),
    fulfillment_status text NOT NULL CHECK (fulfillment_status IN (
                           'unfulfilled', 'partially_fulfilled', 'fulfilled', 'delivered')),
    return_status      text NOT NULL CHECK (return_status IN (
                           'none', 'requested', 'partially_returned', 'returned')),
    allowed_actions    text[] NOT NULL,                      -- what the rules allow in this state
    total_cents        bigint NOT NULL CHECK (total_cents >= 0),
    external_reference text,
    cancel_reason      text CHECK ((cancel_reason IS NOT NULL) = (status = 'cancelled')),
    version            integer NOT NULL CHECK (version > 0), -- +1 with each command
    placed_at          timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL
);
CREATE UNIQUE INDEX orders_external_reference ON orders (external_reference)
    WHERE external_reference IS NOT NULL;

CREATE TABLE order_lines (
    order_id         uuid NOT NULL REFERENCES orders,
    line_no          smallint NOT NULL CHECK (line_no BETWEEN 1 AND 100),
    sku              text NOT NULL REFERENCES products,
    location         text NOT NULL,
    name             text NOT NULL,                          -- the product's, as it was when ordered
    quantity         integer NOT NULL CHECK (quantity > 0),
    unit_price_cents bigint NOT NULL CHECK (unit_price_cents >= 0),
    line_total_cents bigint NOT NULL CHECK (line_total_cents = quantity * unit_price_cents),
    PRIMARY KEY (order_id, line_no)
);

CREATE TABLE stock_levels (
    sku             text NOT NULL REFERENCES products,
    location        text NOT NULL CHECK (location ~ '^[A-Za-z0-9._-]{1,64}$'),
    on_hand         integer NOT NULL CHECK (on_hand >= 0),
    allocated       integer NOT NULL CHECK (allocated >= 0),
    reserved        integer NOT NULL CHECK (reserved >= 0),
    safety_stock    integer NOT NULL DEFAULT 0 CHECK (safety_stock >= 0),
    backorder_limit integer NOT NULL DEFAULT 0 CHECK (backorder_limit >= 0),
    version         integer NOT NULL CHECK (version > 0),
    updated_at      timestamptz NOT NULL,
    PRIMARY KEY (sku, location),
    CONSTRAINT never_oversold CHECK (on_hand::bigint - allocated - reserved >= -backorder_limit)
) WITH (fillfactor = 50);                                    -- room for HOT updates of the hot rows

-- The ledger: the sums of its deltas are the levels.
CREATE TABLE stock_movements (
    movement_id     bigint GENERATED ALWAYS AS IDENTITY,
    sku             text NOT NULL,
    location        text NOT NULL,
    kind            text NOT NULL CHECK (kind IN (
                        'received', 'adjusted', 'allocated', 'released', 'shipped')),
    on_hand_delta   integer NOT NULL DEFAULT 0,
    allocated_delta integer NOT NULL DEFAULT 0,
    reserved_delta  integer NOT NULL DEFAULT 0,
    order_id        uuid,
    reason          text,
    occurred_at     timestamptz NOT NULL,
    PRIMARY KEY (sku, location, movement_id),
    FOREIGN KEY (sku, location) REFERENCES stock_levels,
    CHECK ((kind IN ('allocated', 'released')) <= (order_id IS NOT NULL))
);

CREATE TABLE idempotency_keys (
    owner       text NOT NULL,
    key         text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL,                              -- BLAKE2b-128 of kind and command
    status      smallint NOT NULL,                           -- the HTTP status of the first answer
    body        bytea NOT NULL,                              -- its body, byte for byte
    etag        text,
    location    text,
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),  -- its consistency token
    created_at  timestamptz NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX idempotency_keys_age ON idempotency_keys USING brin (created_at);

-- Append-only. Read by snapshot (docs/decisions/0002-snapshot-cursor.md), never by `id > last`.
-- Partitioned by id, so that old events leave by DROP; the worker keeps partitions ahead, the
-- default one catches what would otherwise be refused.
CREATE SEQUENCE outbox_id CACHE 1;
CREATE TABLE outbox (
    id                bigint NOT NULL DEFAULT nextval('outbox_id'),
    xid               xid8 NOT NULL DEFAULT pg_current_xact_id(),
    lane              smallint NOT NULL CHECK (lane BETWEEN 0 AND 15),
    aggregate         text NOT NULL,
    aggregate_id      text NOT NULL,
    aggregate_version integer NOT NULL,
    type              text NOT NULL,
    data              jsonb NOT NULL,
    actor             text NOT NULL,
    traceparent       text,                                  -- W3C; null when the request is not sampled
    occurred_at       timestamptz NOT NULL
) PARTITION BY RANGE (id);
CREATE INDEX outbox_cursor ON outbox (lane, xid, id);
CREATE TABLE outbox_default PARTITION OF outbox DEFAULT;
CREATE TABLE outbox_0 PARTITION OF outbox FOR VALUES FROM (0) TO (16777216);
CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM (16777216) TO (33554432);
CREATE UNIQUE INDEX outbox_0_version ON outbox_0 (aggregate_id, aggregate_version);
CREATE UNIQUE INDEX outbox_1_version ON outbox_1 (aggregate_id, aggregate_version);
CREATE UNIQUE INDEX outbox_default_version ON outbox_default (aggregate_id, aggregate_version);
