"""GET /v1/projections."""

from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope

from app.http.access import needs
from app.http.consistency import NOTHING
from app.http.exchange import exchange_of
from app.http.reads import found_reply
from queries.list_projections import list_projections
from queries.read_side import ReadSide


def projection_routes(read_side: ReadSide) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @get("/v1/projections", opt=needs("operations:read"))
    async def show_projections(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        return await found_reply(exchange, NOTHING, read_side, "", list_projections(read_side))

    return [show_projections]
