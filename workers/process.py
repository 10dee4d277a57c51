"""The worker process: the projector, its wake-up, the arq timers and the numbers, in one loop."""

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any, Final

import psycopg
import structlog
from prometheus_client import start_http_server
from psycopg_pool import PoolTimeout

from app.pools import open_psycopg, open_redis
from app.settings import OperatorError, Settings, server_urls
from app.telemetry import configure_tracing
from projections.checkpoints import ForeignCheckpointError
from projections.status import read_status
from workers.metrics import WorkerMetrics
from workers.projector import Pool, ResidentProjector
from workers.push import Push
from workers.timers import run_timers
from workers.wake import Wake

POOL_SIZE: Final = 4  # the projector's, one for the numbers, two for timers
STOP_S: Final = 3.0  # for the batch under way; then what still runs is cancelled
WATCH_S: Final = 1.0

log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; the batch under way is finished.

    Raises:
        OperatorError: an address is missing, or the read models are another server's.
    """
    postgres_url, redis_url = server_urls(settings)
    metrics = WorkerMetrics()
    if settings.worker_metrics_port is not None:
        start_http_server(
            settings.worker_metrics_port, addr=settings.host, registry=metrics.registry
        )
    provider = configure_tracing(settings, "waybill-worker")
    try:
        async with (
            open_psycopg(postgres_url, application_name="waybill-worker", size=POOL_SIZE) as pool,
            open_redis(redis_url) as redis,
        ):
            wake = Wake(redis)
            projector = ResidentProjector(
                pool,
                wake=wake,
                push=Push(redis),
                metrics=metrics,
                tracer=provider.get_tracer("waybill.worker"),
            )
            await _run_until_signal(
                projector,
                wake.listen(),
                run_timers(redis_url, pool),
                _watch(pool, metrics),
            )
    except ForeignCheckpointError as error:
        raise OperatorError(str(error)) from error
    finally:
        provider.shutdown()


async def _run_until_signal(
    projector: ResidentProjector, *companions: Coroutine[Any, Any, None]
) -> None:
    """Run all; the projector is the one that matters, and the others end with it."""
    loop = asyncio.get_running_loop()
    projecting = asyncio.create_task(projector.run())
    others = [asyncio.create_task(each) for each in companions]
    stopping = asyncio.Event()

    def stop() -> None:
        projector.stop()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({projecting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    began_s = monotonic()
    await asyncio.wait({projecting}, timeout=STOP_S)
    for task in (projecting, stopped, *others):
        task.cancel()
    await asyncio.wait({stopped, *others})
    with suppress(asyncio.CancelledError):
        await projecting
    log.info("stopped", seconds=round(monotonic() - began_s, 3))


async def _watch(pool: Pool, metrics: WorkerMetrics) -> None:
    """Show how far the read models are, also when nobody projects them."""
    while True:
        with suppress(psycopg.Error, PoolTimeout):
            async with pool.connection() as connection:
                metrics.show(await read_status(connection))
        await asyncio.sleep(WATCH_S)
