"""POST /v1/customers."""

from typing import Final

import msgspec
from litestar import post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope

from app.http.access import needs
from app.http.exchange import exchange_of
from app.http.submissions import Submissions, decoded, idempotency_key
from commands.register_customer import RegisterCustomer

CUSTOMER: Final = msgspec.json.Decoder(RegisterCustomer)


def customer_routes(submissions: Submissions) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @post("/v1/customers", opt=needs("customers:write"))
    async def register_customer(scope: Scope) -> ASGIApp:
        exchange = exchange_of(scope)
        key = idempotency_key(exchange)
        command = await decoded(exchange, CUSTOMER)
        return await submissions.submit(exchange, key, command)

    return [register_customer]
