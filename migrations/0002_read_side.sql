-- Expand. The read side: read tables, their checkpoints, and what is parked. No foreign keys here.

CREATE TABLE order_view (
    order_id           uuid PRIMARY KEY,
    number             bigint NOT NULL,
    customer_id        uuid NOT NULL,
    customer           jsonb NOT NULL,                       -- {customer_id, name, email}
    currency           text NOT NULL,
    status             text NOT NULL,
    payment_status     text NOT NULL,
    fulfillment_status text NOT NULL,
    return_status      text NOT NULL,
    allowed_actions    text[] NOT NULL,
    total_cents        bigint NOT NULL,
    external_reference text,
    lines              jsonb NOT NULL,                       -- [{line_no, sku, name, quantity, ...}]
    version            integer NOT NULL,
    placed_at          timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL
) WITH (fillfactor = 90);

CREATE TABLE order_list (
    order_id           uuid PRIMARY KEY,
    number             bigint NOT NULL,
    customer_id        uuid NOT NULL,
    customer_name      text NOT NULL,
    customer_email     text NOT NULL,
    currency           text NOT NULL,
    status             text NOT NULL,
    payment_status     text NOT NULL,
    fulfillment_status text NOT NULL,
    return_status      text NOT NULL,
    total_cents        bigint NOT NULL,
    line_count         integer NOT NULL,
    skus               text[] NOT NULL,                      -- sorted, each once
    external_reference text,
    version            integer NOT NULL,
    placed_at          timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL
) WITH (fillfactor = 90);
CREATE INDEX order_list_newest ON order_list (placed_at, order_id);
CREATE INDEX order_list_largest ON order_list (total_cents, order_id);
CREATE INDEX order_list_customer ON order_list (customer_id, placed_at, order_id);
CREATE INDEX order_list_status ON order_list (status, payment_status, fulfillment_status, placed_at, order_id);
-- New entries wait in a list that an insert empties when it is full: 4 MB, the default, would hold a
-- batch up for some 0.4 s once in 80 thousand orders; 512 kB do for 60 ms once in 10 thousand.
CREATE INDEX order_list_sku ON order_list USING gin (skus) WITH (gin_pending_list_limit = 512);

CREATE TABLE stock_availability (
    sku        text NOT NULL,
    location   text NOT NULL,
    on_hand    integer NOT NULL,
    allocated  integer NOT NULL,
    reserved   integer NOT NULL,
    available  integer NOT NULL,                             -- what an order may still take
    version    integer NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (sku, location)
) WITH (fillfactor = 50);

-- The read models that are filled, by code of which version, and from which server's outbox.
CREATE TABLE projection_models (
    read_model text PRIMARY KEY,
    version    integer NOT NULL,
    system_id  bigint NOT NULL                               -- pg_control_system(): refuses a restored copy
);

-- Where they stand. Every batch writes one row for all lanes of all read models that it moved, and
-- deletes the one that it found, so a turn costs the same with three read models and with thirty. Of
-- a lane of a read model the newest row counts that names both. Whoever writes for it holds the
-- advisory lock (hashtext('waybill:' || read_model), lane) until the end of the transaction, and a row
-- is deleted by whoever holds all that it names. There is no index: a few rows are alive, and of the
-- dead ones, which a stranger's open transaction preserves, an index would have an entry each.
CREATE SEQUENCE projection_position_id;
CREATE TABLE projection_positions (
    position_id bigint NOT NULL DEFAULT nextval('projection_position_id'),
    read_models text[] NOT NULL,
    lanes       smallint[] NOT NULL,
    snapshot    pg_snapshot NOT NULL,                        -- what the read tables contain, exactly
    target      pg_snapshot,                                 -- while a backlog is paged: its end,
    last_id     bigint NOT NULL DEFAULT 0,                   -- and the last event that is applied
    published   pg_snapshot NOT NULL,                        -- what readers were told of
    moved_at    timestamptz NOT NULL,
    CHECK (target IS NOT NULL OR last_id = 0)
);

CREATE VIEW projection_checkpoints AS
SELECT DISTINCT ON (read_model, lane)
       read_model, lane, model.version, position.snapshot, position.target, position.last_id,
       position.published, model.system_id, position.moved_at
FROM projection_positions AS position
CROSS JOIN unnest(position.read_models) AS read_model
CROSS JOIN unnest(position.lanes) AS lane
JOIN projection_models AS model USING (read_model)
ORDER BY read_model, lane, position.position_id DESC;

-- An aggregate with an event that cannot be applied waits here, and its later events with it.
CREATE TABLE projection_parked (
    read_model   text NOT NULL,
    aggregate    text NOT NULL,
    aggregate_id text NOT NULL,
    lane         smallint NOT NULL,
    event_id     bigint NOT NULL,                            -- the event that could not be applied
    error        text NOT NULL,
    attempts     integer NOT NULL,
    parked_at    timestamptz NOT NULL,
    PRIMARY KEY (read_model, aggregate_id)
);
CREATE TABLE projection_parked_events (                      -- that event, and those after it
    read_model   text NOT NULL,
    aggregate_id text NOT NULL,
    event_id     bigint NOT NULL,
    PRIMARY KEY (read_model, aggregate_id, event_id)
);

-- A worker counts `started` when it takes a lane for the first time, and sets `finished` to it with
-- its first batch there. So an event that kills every worker shows as a difference that grows, and
-- then the lane's next events, up to `alone_until`, are applied one by one: `alone_id` was tried
-- `alone_tries` times so.
CREATE TABLE projection_attempts (
    read_model  text NOT NULL,
    lane        smallint NOT NULL,
    started     integer NOT NULL DEFAULT 0,
    finished    integer NOT NULL DEFAULT 0,
    alone_until bigint,
    alone_id    bigint,
    alone_tries smallint NOT NULL DEFAULT 0,
    PRIMARY KEY (read_model, lane)
);
