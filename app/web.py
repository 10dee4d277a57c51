"""The web process: builds what handlers work with, the routes, and the edge around them.

`create_app` is what granian serves. It stops in this order: readiness turns 503 and connections are
closed after their answer, for `DRAIN_S`; the server takes no more and finishes what runs; then the
executors finish the batch that has begun, and the pools close.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NoReturn, cast
from uuid import UUID

import structlog
from litestar import Litestar, Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, LifeSpanReceive, LifeSpanSend, Receive, Scope, Send
from msgspec import Struct
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from redis.asyncio import Redis

from app.http.access import check_routes, check_scope
from app.http.answers import render
from app.http.callers import Callers
from app.http.consistency import Timeline
from app.http.customers import customer_routes
from app.http.documentation import documentation_routes
from app.http.edge import Edge
from app.http.health import Health, health_routes
from app.http.limiter import Limiter
from app.http.orders import order_routes
from app.http.products import product_routes
from app.http.projections import projection_routes
from app.http.stock import stock_routes
from app.http.submissions import Submissions
from app.metrics import Metrics, command_name
from app.pools import open_postgres, open_redis
from app.settings import Settings, read_settings, server_urls
from app.telemetry import Tracing, configure_tracing
from app.wake import Waker
from commands.adjust_stock import AdjustStock, adjust_stock_levels
from commands.api_keys import find_principal
from commands.cancel_order import CancelOrder, cancel_orders
from commands.command import Command, Handle, Postgres, Principal
from commands.executor import BATCHES_IN_FLIGHT, Executor
from commands.place_order import PlaceOrder, place_orders
from commands.rate_limit import Lease, lease
from commands.register_customer import RegisterCustomer, register_customers
from commands.register_product import RegisterProduct, register_products
from queries.freshness import POSTGRES_FAULTS
from queries.read_side import ReadSide

HANDLERS: Final[dict[type[Command], Handle]] = {
    PlaceOrder: place_orders,
    CancelOrder: cancel_orders,
    AdjustStock: adjust_stock_levels,
    RegisterProduct: register_products,
    RegisterCustomer: register_customers,
}

ASKERS: Final = 3  # connections for keys, leases and health reports
COMMAND_CONNECTIONS: Final = len(HANDLERS) * BATCHES_IN_FLIGHT + ASKERS
QUERY_CONNECTIONS: Final = 8
ASK_TIMEOUT_S: Final = 1.0  # for a key or a lease, which a request waits for

DRAIN_S: Final = 1.0  # so that a proxy that asks twice a second sends nothing more

log = structlog.stdlib.get_logger("waybill.web")


def create_app() -> "Web":
    """The web process's app, by the environment. SIGTERM drains it before the server stops.

    Raises:
        SettingsError: the environment says nothing usable.
    """
    return Web(read_settings(os.environ), drains_on_sigterm=True)


class Web:
    """An ASGI app that is built when its lifespan begins. `provider` is for tests of traces."""

    def __init__(
        self,
        settings: Settings,
        *,
        drains_on_sigterm: bool = False,
        provider: TracerProvider | None = None,
    ) -> None:
        self._settings = settings
        self._urls = server_urls(settings)
        self._drains_on_sigterm = drains_on_sigterm
        self._provider = provider
        self._serve: ASGIApp = _not_running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan."""
        if cast("str", scope["type"]) == "lifespan":
            await self._live(cast("LifeSpanReceive", receive), cast("LifeSpanSend", send))
        else:
            await self._serve(scope, receive, send)

    async def _live(self, receive: LifeSpanReceive, send: LifeSpanSend) -> None:
        await receive()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.running())
            except Exception as error:  # noqa: BLE001  the server is told, and says it
                await send({"type": "lifespan.startup.failed", "message": repr(error)})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Litestar]:
        """Open what is worked with and serve; then stop what runs and close what is open."""
        metrics = Metrics()
        async with (
            self._traces() as provider,
            open_tools(*self._urls, metrics=metrics) as tools,
        ):
            tracing = Tracing(provider, ratio=self._settings.trace_ratio)
            health = Health(tools.commands, tools.redis, tools.is_running)
            app = Litestar(
                [
                    *build_routes(tools, tracing, metrics),
                    *health_routes(
                        health, metrics, tools.read_side, is_one_of_many=self._settings.webs > 1
                    ),
                    *documentation_routes(),
                ],
                before_request=check_scope,
                exception_handlers={Exception: _pass_on},
                openapi_config=None,
                logging_config=None,
                debug=False,
                pdb_on_exception=False,
            )
            check_routes(app)
            edge = build_edge(app, tools.commands, tracing, metrics)
            if self._drains_on_sigterm:
                _drain_on_sigterm(health, edge)
            self._serve = edge
            yield app

    @asynccontextmanager
    async def _traces(self) -> AsyncGenerator[TracerProvider]:
        if self._provider is not None:
            yield self._provider
            return
        provider = configure_tracing(self._settings, "waybill-web")
        try:
            yield provider
        finally:
            await asyncio.to_thread(provider.shutdown)  # sends what is left


class Tools(Struct, frozen=True):
    """What the handlers work with. `is_running` tells of each task that should still run."""

    commands: Postgres
    redis: Redis
    read_side: ReadSide
    executors: Mapping[type[Command], Executor[Any]]
    is_running: Mapping[str, Callable[[], bool]]


@asynccontextmanager
async def open_tools(
    postgres_url: str, redis_url: str, *, metrics: Metrics
) -> AsyncGenerator[Tools]:
    """Open pools and start tasks. Neither PostgreSQL nor Redis has to be there yet."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        commands = await enter(
            open_postgres(
                postgres_url, application_name="waybill-commands", size=COMMAND_CONNECTIONS
            )
        )
        queries = await enter(
            open_postgres(postgres_url, application_name="waybill-queries", size=QUERY_CONNECTIONS)
        )
        redis = await enter(open_redis(redis_url))
        read_side = await enter(ReadSide(queries, redis))
        waker = Waker(redis)
        executors = {
            kind: Executor[Any](
                handle,
                postgres=commands,
                render=render,
                committed=waker.wake,
                observe=metrics.batch_observer(kind),
            )
            for kind, handle in HANDLERS.items()
        }
        runs = {command_name(kind): executor.run() for kind, executor in executors.items()}
        is_running = await enter(_running({"wake": waker.run(), **runs}))
        metrics.show_queues(executors)
        metrics.show_pools({"commands": commands, "queries": queries})
        show_read_side(metrics, read_side)
        yield Tools(
            commands,
            redis,
            read_side,
            executors,
            {"read_side": lambda: read_side.freshness.is_running, **is_running},
        )


def build_routes(tools: Tools, tracing: Tracing, metrics: Metrics) -> list[HTTPRouteHandler]:
    """Return the handlers of the API."""
    timeline = Timeline(tools.commands)
    submissions = Submissions(tools.executors, timeline=timeline, tracing=tracing, metrics=metrics)
    return [
        *product_routes(submissions),
        *stock_routes(submissions, tools.read_side, timeline),
        *customer_routes(submissions),
        *order_routes(submissions, tools.read_side, timeline),
        *projection_routes(tools.read_side),
    ]


def build_edge(app: Litestar, postgres: Postgres, tracing: Tracing, metrics: Metrics) -> Edge:
    """Put the edge around the app."""
    return Edge(
        app,
        callers=Callers(partial(_find_principal, postgres), faults=POSTGRES_FAULTS),
        limiter=Limiter(
            partial(_lease, postgres), faults=POSTGRES_FAULTS, unleased=metrics.unleased.inc
        ),
        tracing=tracing,
        metrics=metrics,
    )


def show_read_side(metrics: Metrics, read_side: ReadSide) -> None:
    """Let the read side's counters be seen."""
    local, shared, freshness = read_side.local, read_side.shared, read_side.freshness
    metrics.show(
        CounterMetricFamily,
        "waybill_cache_events",
        "What happened to reads in front of PostgreSQL, by tier.",
        "event",
        lambda: {
            "local_hit": read_side.hits,
            "local_miss": read_side.misses,
            "local_eviction": local.evictions,
            "spoilt_fill": local.stale,
            "shared_hit": shared.hits if shared else 0,
            "shared_miss": shared.misses if shared else 0,
            "shared_error": shared.errors if shared else 0,
            "load": read_side.loads,
            "shed": read_side.shed,
            "push": freshness.pushes,
            "break": freshness.breaks,
            "wait_refused": freshness.waits_refused,
        },
    )
    metrics.show(
        GaugeMetricFamily,
        "waybill_cache_state",
        "The local tier: entries, bytes, whether it is in use; and reads that wait for a token.",
        "what",
        lambda: {
            "entries": len(local),
            "bytes": local.size_bytes,
            "open": float(freshness.is_open),
            "waiting": freshness.waiting,
        },
    )


async def _find_principal(postgres: Postgres, secret_hash: bytes) -> Principal | None:
    async with asyncio.timeout(ASK_TIMEOUT_S), postgres.acquire() as connection:
        return await find_principal(connection, secret_hash=secret_hash, now=datetime.now(UTC))


async def _lease(postgres: Postgres, key_id: UUID, quota: int, chunk: int) -> Lease:
    async with asyncio.timeout(ASK_TIMEOUT_S):
        return await lease(postgres, key_id=key_id, quota=quota, chunk=chunk)


def _pass_on(_request: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Every problem document is made in one place, at the edge."""
    raise error


def _drain_on_sigterm(health: Health, edge: Edge) -> None:
    """Take granian's place for SIGTERM, and hand over to it by SIGINT, which it takes alike."""
    loop = asyncio.get_running_loop()

    def drain() -> None:
        if not health.is_draining:
            health.is_draining = edge.is_draining = True
            loop.call_later(DRAIN_S, os.kill, os.getpid(), signal.SIGINT)

    loop.add_signal_handler(signal.SIGTERM, drain)


@asynccontextmanager
async def _running(
    runs: Mapping[str, Coroutine[Any, Any, None]],
) -> AsyncGenerator[dict[str, Callable[[], bool]]]:
    """Run these until the end; one that ends before is a bug, and the liveness report says so."""

    def report(name: str, task: asyncio.Task[None]) -> None:
        if not task.cancelling():
            log.error("task ended", task=name, exc_info=task.exception())

    def is_running(task: asyncio.Task[None]) -> bool:
        return not task.done()

    tasks: dict[str, asyncio.Task[None]] = {}
    for name, run in runs.items():
        tasks[name] = asyncio.create_task(run)
        tasks[name].add_done_callback(partial(report, name))
    try:
        yield {name: partial(is_running, task) for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _not_running(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RuntimeError("the lifespan of this app has not begun")
