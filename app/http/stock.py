"""GET /v1/stock, POST /v1/stock/{sku}/{location}/adjustments."""

from functools import lru_cache
from typing import Annotated, Final

import msgspec
from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope
from msgspec import Meta, Struct

from app.http.access import needs
from app.http.consistency import Timeline, asked_of
from app.http.exchange import exchange_of, path_parameter
from app.http.problems import ProblemError
from app.http.reads import REMEMBERED_QUERIES, entry_reply, found_reply, read_query
from app.http.submissions import Submissions, decoded, expected_version, idempotency_key
from commands.adjust_stock import ON_HAND_MAX, AdjustStock
from commands.command import Location, Sku, Text
from queries.list_stock import STOCK_AVAILABILITY, ListStock, list_stock, stock_key
from queries.read_side import ReadSide


class StockAdjustment(Struct, frozen=True, forbid_unknown_fields=True):
    """Either `delta`, or `set_to` with the `expected_on_hand` that it replaces. In units."""

    reason: Text
    delta: Annotated[int, Meta(ge=-ON_HAND_MAX, le=ON_HAND_MAX)] | None = None
    set_to: Annotated[int, Meta(ge=0, le=ON_HAND_MAX)] | None = None
    expected_on_hand: Annotated[int, Meta(ge=0, le=ON_HAND_MAX)] | None = None


ADJUSTMENT: Final = msgspec.json.Decoder(StockAdjustment)


def stock_routes(
    submissions: Submissions, read_side: ReadSide, timeline: Timeline
) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @post("/v1/stock/{sku:str}/{location:str}/adjustments", opt=needs("stock:write"))
    async def adjust_stock(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        key = idempotency_key(exchange)
        version = expected_version(exchange)
        sku, location = level_of(scope)
        body = await decoded(exchange, ADJUSTMENT)
        command = AdjustStock(
            sku, location, body.reason, body.delta, body.set_to, body.expected_on_hand
        )
        return await submissions.submit(exchange, key, command, expected_version=version)

    @get("/v1/stock", opt=needs("stock:read"))
    async def show_stock(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        asked = await asked_of(exchange.headers, timeline)
        query, key = _query(exchange.query)
        if not asked.is_unprovable:
            entry = read_side.cached(key, model=STOCK_AVAILABILITY, token_xid=asked.token_xid)
            if entry is not None:
                return entry_reply(exchange, asked, entry)
        read = list_stock(read_side, query, token_xid=asked.token_xid, wait_s=asked.wait_s)
        return await found_reply(exchange, asked, read_side, STOCK_AVAILABILITY, read)

    return [adjust_stock, show_stock]


def level_of(scope: Scope) -> tuple[str, str]:
    """The SKU and the location in the path.

    Raises:
        ProblemError: not-found, for names that no level can have.
    """
    sku, location = path_parameter(scope, "sku"), path_parameter(scope, "location")
    try:
        return msgspec.convert(sku, Sku), msgspec.convert(location, Location)
    except msgspec.ValidationError as error:
        raise ProblemError("not-found", "There is no such stock level.") from error


@lru_cache(REMEMBERED_QUERIES)
def _query(query_string: bytes) -> tuple[ListStock, str]:
    query = read_query(query_string, ListStock, lists={"sku": "skus"})
    return query, stock_key(query)
