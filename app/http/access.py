"""Which scope each route needs. Denied by default: a route that declares none stops the start.

The check is a `before_request` hook and not a guard: Litestar copies the handler for each guard of
each request, which takes longer than everything else the edge does.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from litestar import Litestar, Request
from litestar.exceptions import ImproperlyConfiguredException
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from app.http.edge import OPEN_FOLDER, OPEN_PATHS, method_not_allowed
from app.http.exchange import exchange_of
from app.http.problems import ProblemError
from commands.api_keys import SCOPES

OPT: Final = "scope"
OPEN: Final = ""  # no key is needed


def needs(scope: str) -> Mapping[str, Any]:
    """Return the `opt` of a handler that needs this scope."""
    assert scope in SCOPES
    return {OPT: scope}


def needs_no_key() -> Mapping[str, Any]:
    """Return the `opt` of a handler that anybody may call. The edge lists its path as well."""
    return {OPT: OPEN}


async def check_scope(request: Request[Any, Any, Any]) -> None:
    """Let the request pass, or end it.

    Raises:
        ProblemError: insufficient-scope; method-not-allowed for the OPTIONS that Litestar adds.
    """
    scope = cast("dict[str, Any]", request.scope)
    needed = scope["route_handler"].opt.get(OPT)
    if needed is None:
        raise method_not_allowed(_methods(request.app)[scope["path_template"]])
    if needed != OPEN and needed not in exchange_of(request.scope).principal.scopes:
        raise ProblemError(
            "insufficient-scope",
            f"This key has no scope {needed}.",
            facts={"scope": needed},
            headers=[
                (
                    b"www-authenticate",
                    b'Bearer realm="waybill", error="insufficient_scope", scope="%s"'
                    % needed.encode(),
                )
            ],
        )


def check_routes(app: Litestar) -> None:
    """Refuse to start with a route that declares no scope, or is open here and not at the edge.

    Raises:
        ImproperlyConfiguredException: names the route.
    """
    for path, handler in declared_routes(app):
        needed = handler.opt.get(OPT)
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if needed not in {OPEN, *SCOPES} or is_open != (needed == OPEN):
            raise ImproperlyConfiguredException(
                f"{path} must declare the scope it needs: {needed!r}"
            )
        if getattr(handler, "before_request", None) is not None:
            raise ImproperlyConfiguredException(f"{path} must not replace the scope check")


def declared_routes(app: Litestar) -> Iterator[tuple[str, HTTPRouteHandler]]:
    """Path templates and handlers, without the OPTIONS that Litestar adds to each route.

    Raises:
        ImproperlyConfiguredException: a route that is not for HTTP, which the check would not see.
    """
    for route in app.routes:
        if not isinstance(route, HTTPRoute):
            raise ImproperlyConfiguredException(f"{route.path} is not an HTTP route")
        for handler in route.route_handlers:
            if handler.http_methods != {"OPTIONS"}:
                yield route.path_format, handler


def _methods(app: Litestar) -> dict[str, str]:
    return {route.path_format: ", ".join(route.methods) for route in app.routes}
