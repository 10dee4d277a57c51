"""The least that a server can do: answer with bytes that are ready. The yardstick for `limits`.

The same server program as the service's, with the same options, and nothing else.
"""

import argparse
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from granian.constants import HTTPModes, Interfaces, Loops
from granian.log import LogLevels
from granian.server import Server
from litestar import Litestar, Response, get

CONNECTIONS_MAX: Final = 4096

Message: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


def raw_app(body: bytes) -> App:
    """Answer any request with `body`, in two ASGI messages."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    end = {"type": "http.response.body", "body": body}

    async def app(
        scope: Message,
        _receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http":
            await send(start)
            await send(end)

    return app


def litestar_app(body: bytes) -> Litestar:
    """One Litestar route with a path parameter, like the service's, that answers with `body`."""

    @get("/v1/orders/{order_id:str}", media_type="application/json")
    async def read_order(order_id: str) -> Response[bytes]:  # noqa: ARG001
        return Response(body)

    return Litestar([read_order], openapi_config=None, logging_config=None)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.bare")
    parser.add_argument("app", choices=("raw", "litestar"))
    parser.add_argument("port", type=int)
    parser.add_argument("body", type=Path, help="file with the bytes to answer with")
    arguments = parser.parse_args()
    body: bytes = arguments.body.read_bytes()

    def load(_target: str) -> Any:
        return raw_app(body) if arguments.app == "raw" else litestar_app(body)

    Server(
        f"bench.bare:{arguments.app}_app",
        address="127.0.0.1",
        port=arguments.port,
        interface=Interfaces.ASGI,
        workers=1,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        backlog=CONNECTIONS_MAX,
        backpressure=CONNECTIONS_MAX,
        log_level=LogLevels.warning,
    ).serve(target_loader=load)


if __name__ == "__main__":
    main()
