"""POST /v1/products."""

from typing import Final

import msgspec
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope

from app.http.access import needs
from app.http.exchange import exchange_of
from app.http.submissions import Submissions, decoded, idempotency_key
from commands.register_product import RegisterProduct

PRODUCT: Final = msgspec.json.Decoder(RegisterProduct)


def product_routes(submissions: Submissions) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @post("/v1/products", opt=needs("products:write"))
    async def register_product(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        key = idempotency_key(exchange)
        command = await decoded(exchange, PRODUCT)
        return await submissions.submit(exchange, key, command)

    return [register_product]
