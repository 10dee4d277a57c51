"""GET /health/live, /health/ready and /metrics: what operators and their machines ask.

Alive: the event loop answers and none of the process's tasks has ended. Ready: PostgreSQL answers,
has all migrations, and the process is not about to stop. Without Redis it is ready and degraded.
"""

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final, Literal

import msgspec
from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.http.access import needs, needs_no_key
from app.http.replies import JSON, Reply
from app.metrics import Metrics
from app.settings import ROOT
from commands.command import Postgres
from queries.freshness import POSTGRES_FAULTS
from queries.list_projections import measure_projections
from queries.read_side import ReadOverloadError, ReadSide

PROBE_TIMEOUT_S: Final = 1.0
# Anybody may ask, so PostgreSQL and Redis are asked this often at most. A bad report is not kept as
# long: whoever waits for a start wants to know.
GOOD_REPORT_S: Final = 1.0
BAD_REPORT_S: Final = 0.1

MIGRATIONS: Final = frozenset(path.name for path in ROOT.joinpath("migrations").glob("*.sql"))

# No parameters, no locks. A row per migration; fails where there never was one.
READ_MIGRATIONS: Final = "SELECT name FROM schema_migrations"

NO_STORE: Final = (b"cache-control", b"no-store")


class Dependency(Struct, frozen=True):
    """One thing that this process stands on."""

    status: Literal["up", "down", "migrations missing"]
    detail: str | None = None


class Readiness(Struct, frozen=True):
    """The report. Degraded: it serves, but slower."""

    status: Literal["ready", "degraded", "unavailable", "draining"]
    postgres: Dependency
    redis: Dependency


class Liveness(Struct, frozen=True):
    """The report; `ended` are the tasks that should still run."""

    status: Literal["alive", "broken"]
    ended: tuple[str, ...] = ()


class Health:
    """What this process knows of itself and of what it stands on."""

    def __init__(
        self, postgres: Postgres, redis: Redis, is_running: Mapping[str, Callable[[], bool]]
    ) -> None:
        self.is_draining = False
        self._postgres = postgres
        self._redis = redis
        self._is_running = is_running
        self._probe: asyncio.Task[Readiness] | None = None
        self._probed_s = 0.0

    def liveness(self) -> Liveness:
        """Whether a restart would help."""
        ended = tuple(name for name, is_running in self._is_running.items() if not is_running())
        return Liveness("broken" if ended else "alive", ended)

    async def readiness(self) -> Readiness:
        """Whether requests should come here. Asked once at a time, and remembered for a moment."""
        probe = self._probe
        if probe is None or (probe.done() and self._is_old(probe.result())):
            probe = self._probe = asyncio.create_task(self._ask())
            self._probed_s = monotonic()
        found = await asyncio.shield(probe)
        if self.is_draining:
            return msgspec.structs.replace(found, status="draining")
        return found

    def _is_old(self, report: Readiness) -> bool:
        kept_s = GOOD_REPORT_S if report.status == "ready" else BAD_REPORT_S
        return monotonic() - self._probed_s > kept_s

    async def _ask(self) -> Readiness:
        postgres, redis = await asyncio.gather(self._ask_postgres(), self._ask_redis())
        if postgres.status != "up":
            return Readiness("unavailable", postgres, redis)
        return Readiness("ready" if redis.status == "up" else "degraded", postgres, redis)

    async def _ask_postgres(self) -> Dependency:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                rows = await self._postgres.fetch(READ_MIGRATIONS)
        except POSTGRES_FAULTS as fault:
            if getattr(fault, "sqlstate", None) == "42P01":  # undefined_table
                return Dependency("migrations missing", "none has been applied")
            return Dependency("down", type(fault).__name__)
        missing = sorted(MIGRATIONS - {row["name"] for row in rows})
        if missing:
            return Dependency("migrations missing", ", ".join(missing))
        return Dependency("up")

    async def _ask_redis(self) -> Dependency:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._redis.ping()  # pyright: ignore[reportUnknownMemberType]
        except (RedisError, OSError, TimeoutError) as fault:
            return Dependency("down", type(fault).__name__)
        return Dependency("up")


def health_routes(
    health: Health, metrics: Metrics, read_side: ReadSide, *, is_one_of_many: bool
) -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""

    @get("/health/live", opt=needs_no_key())
    async def show_liveness() -> ASGIApp:
        report = health.liveness()
        status = 200 if report.status == "alive" else 503
        return Reply(status, [JSON, NO_STORE], msgspec.json.encode(report))

    @get("/health/ready", opt=needs_no_key())
    async def show_readiness() -> ASGIApp:
        report = await health.readiness()
        status = 200 if report.status in {"ready", "degraded"} else 503
        return Reply(status, [JSON, NO_STORE], msgspec.json.encode(report))

    @get("/metrics", opt=needs("operations:read"))
    async def show_metrics() -> ASGIApp:
        await measure_lag(metrics, read_side)
        headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), NO_STORE]
        return Reply(200, headers, metrics.page(is_one_of_many=is_one_of_many))

    return [show_liveness, show_readiness, show_metrics]


async def measure_lag(metrics: Metrics, read_side: ReadSide) -> None:
    """Set the gauges of the read models; without PostgreSQL there is nothing to say about them."""
    metrics.projection_lag.clear()
    try:
        projections = await measure_projections(read_side)
    except (ReadOverloadError, *POSTGRES_FAULTS):
        return
    for projection in projections:
        metrics.projection_lag.labels(projection.read_model).set(projection.lag_s)
