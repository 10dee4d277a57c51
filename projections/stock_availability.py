"""The read model `stock_availability`: what can be ordered where, for `GET /v1/stock`.

Follows the stock events. Each says the whole level after it, so the last one of a level wins.
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
    if issubclass(event, StockAdjusted | StockAllocated | StockReleased):
        return True
    _ignored: type[OrderPlaced | OrderCancelled | ProductRegistered | CustomerRegistered] = event
    return False


# Rows: one per level that has moved.
SET_LEVELS: Final = """
INSERT INTO stock_availability (sku, location, on_hand, allocated, reserved, available, version,
                                updated_at)
SELECT DISTINCT ON (batch.aggregate_id)
       level.sku, level.location, level.on_hand, level.allocated, level.reserved, level.available,
       batch.aggregate_version, batch.occurred_at
FROM batch,
     jsonb_to_record(batch.data) AS level (
         sku text, location text, on_hand integer, allocated integer, reserved integer,
         available integer)
WHERE batch.aggregate = 'stock'
ORDER BY batch.aggregate_id, batch.aggregate_version DESC
ON CONFLICT (sku, location) DO UPDATE
SET on_hand = excluded.on_hand, allocated = excluded.allocated, reserved = excluded.reserved,
    available = excluded.available, version = excluded.version, updated_at = excluded.updated_at
WHERE stock_availability.version < excluded.version
"""

CLEAR: Final = """
DELETE FROM stock_availability
WHERE $1::text[] IS NULL
   OR (sku, location) IN (SELECT split_part(id, '@', 1), split_part(id, '@', 2)
                          FROM unnest($1::text[]) AS id)
"""

BOOTSTRAP: Final = """
WITH filled AS (
    INSERT INTO stock_availability (sku, location, on_hand, allocated, reserved, available, version,
                                    updated_at)
    SELECT sku, location, on_hand, allocated, reserved,
           greatest(0, on_hand - allocated - reserved - safety_stock + backorder_limit), version,
           updated_at
    FROM stock_levels
    WHERE $1::text[] IS NULL
       OR (sku, location) IN (SELECT split_part(id, '@', 1), split_part(id, '@', 2)
                              FROM unnest($1::text[]) AS id)
)
SELECT pg_current_snapshot()::text
"""

STRETCH: Final = """
SELECT count(*), (array_agg(sku || '@' || location ORDER BY sku DESC, location DESC))[1]
FROM (
    SELECT sku, location
    FROM stock_levels
    WHERE $1::text IS NULL
       OR (sku, location) > (split_part($1::text, '@', 1), split_part($1::text, '@', 2))
    ORDER BY sku, location
    LIMIT $2::integer
) AS stretch
"""

AUDIT: Final = """
WITH expected AS (
    SELECT sku, location, on_hand, allocated, reserved,
           greatest(0, on_hand - allocated - reserved - safety_stock + backorder_limit)
               AS available,
           version, updated_at
    FROM stock_levels
    WHERE ($1::text IS NULL
           OR (sku, location) > (split_part($1::text, '@', 1), split_part($1::text, '@', 2)))
      AND ($2::text IS NULL
           OR (sku, location) <= (split_part($2::text, '@', 1), split_part($2::text, '@', 2)))
), shown AS (
    SELECT sku, location, on_hand, allocated, reserved, available, version, updated_at
    FROM stock_availability
    WHERE ($1::text IS NULL
           OR (sku, location) > (split_part($1::text, '@', 1), split_part($1::text, '@', 2)))
      AND ($2::text IS NULL
           OR (sku, location) <= (split_part($2::text, '@', 1), split_part($2::text, '@', 2)))
)
SELECT sku || '@' || location, to_jsonb(expected), to_jsonb(shown)
FROM expected
FULL JOIN shown USING (sku, location)
WHERE expected IS DISTINCT FROM shown AND sku || '@' || location <> ALL ($3::text[])
LIMIT $4::integer
"""

STOCK_AVAILABILITY: Final = ReadModel(
    name="stock_availability",
    version=1,
    listens_to=listens_to,
    apply=(SET_LEVELS,),
    clear=CLEAR,
    bootstrap=BOOTSTRAP,
    stretch=STRETCH,
    audit=AUDIT,
)
