"""POST and GET /v1/orders, GET /v1/orders/{order_id}, POST /v1/orders/{order_id}/cancel."""

from functools import lru_cache
from typing import Final
from uuid import UUID

import msgspec
from litestar import get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope
from msgspec import Struct

from app.http.access import needs
from app.http.consistency import Timeline, asked_of
from app.http.exchange import exchange_of, path_parameter
from app.http.problems import ProblemError
from app.http.reads import REMEMBERED_QUERIES, entry_reply, found_reply, read_query
from app.http.submissions import Submissions, decoded, expected_version, idempotency_key
from commands.cancel_order import CancelOrder
from commands.command import Text
from commands.place_order import PlaceOrder
from queries.get_order import ORDER_VIEW, get_order
from queries.list_orders import ORDER_LIST, ListOrders, list_key, list_orders
from queries.read_side import ORDER_TAG, ReadSide


class Cancellation(Struct, frozen=True, forbid_unknown_fields=True):
    """Why the order is called off."""

    reason: Text


ORDER: Final = msgspec.json.Decoder(PlaceOrder)
CANCELLATION: Final = msgspec.json.Decoder(Cancellation)


def order_routes(
    submissions: Submissions, read_side: ReadSide, timeline: Timeline
) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @post("/v1/orders", opt=needs("orders:write"))
    async def place_order(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        key = idempotency_key(exchange)
        command = await decoded(exchange, ORDER)
        return await submissions.submit(exchange, key, command)

    @post("/v1/orders/{order_id:str}/cancel", opt=needs("orders:write"))
    async def cancel_order(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        key = idempotency_key(exchange)
        version = expected_version(exchange)
        order_id = order_id_of(path_parameter(scope, "order_id"))
        body = await decoded(exchange, CANCELLATION)
        command = CancelOrder(order_id, body.reason)
        return await submissions.submit(exchange, key, command, expected_version=version)

    @get("/v1/orders/{order_id:str}", opt=needs("orders:read"))
    async def show_order(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        asked = await asked_of(exchange.headers, timeline)
        given = path_parameter(scope, "order_id")
        acts_for = exchange.principal.customer_id
        if not asked.is_unprovable:
            entry = read_side.cached(
                ORDER_TAG + given,
                model=ORDER_VIEW,
                customer_id=acts_for,
                token_xid=asked.token_xid,
            )
            if entry is not None:
                return entry_reply(exchange, asked, entry)
        read = get_order(
            read_side,
            order_id_of(given),
            customer_id=acts_for,
            token_xid=asked.token_xid,
            wait_s=asked.wait_s,
        )
        return await found_reply(exchange, asked, read_side, ORDER_VIEW, read)

    @get("/v1/orders", opt=needs("orders:read"))
    async def show_orders(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        asked = await asked_of(exchange.headers, timeline)
        acts_for = exchange.principal.customer_id
        query, key = _query(exchange.query, acts_for)
        if not asked.is_unprovable:
            entry = read_side.cached(
                key, model=ORDER_LIST, customer_id=acts_for, token_xid=asked.token_xid
            )
            if entry is not None:
                return entry_reply(exchange, asked, entry)
        read = list_orders(
            read_side,
            query,
            customer_id=acts_for,
            token_xid=asked.token_xid,
            wait_s=asked.wait_s,
        )
        return await found_reply(exchange, asked, read_side, ORDER_LIST, read)

    return [place_order, cancel_order, show_order, show_orders]


def order_id_of(text: str) -> UUID:
    """The order in the path.

    Raises:
        ProblemError: not-found, for what no order's id can be.
    """
    try:
        return msgspec.convert(text, UUID)
    except msgspec.ValidationError as error:
        raise ProblemError("not-found", "There is no such order.") from error


@lru_cache(REMEMBERED_QUERIES)
def _query(query_string: bytes, customer_id: UUID | None) -> tuple[ListOrders, str]:
    query = read_query(query_string, ListOrders)
    return query, list_key(query, customer_id=customer_id)
