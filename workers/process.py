"""The worker process: the projector, its wake-up, the arq timers and the numbers, in one loop."""

import asyncio
import signal
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from threading import Thread
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
LAST_SPANS_S: Final = 1.0
CANCELS_MAX: Final = 5
CANCEL_S: Final = 0.3
WATCH_S: Final = 1.0

log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; the batch under way is finished.

    Raises:
        OperatorError: an address is missing, or the read models are another server's.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    postgres_url, redis_url = server_urls(settings)
    metrics = WorkerMetrics()
    _serve_metrics(settings, metrics)
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
            companions = (wake.listen(), run_timers(redis_url, pool), _watch(pool, metrics))
            await _run_until(stopping, projector, companions)
    except ForeignCheckpointError as error:
        raise OperatorError(str(error)) from error
    finally:
        # A collector that does not answer does not hold up the end.
        last_spans = Thread(target=provider.shutdown, daemon=True)
        last_spans.start()
        last_spans.join(LAST_SPANS_S)


def _serve_metrics(settings: Settings, metrics: WorkerMetrics) -> None:
    port = settings.worker_metrics_port
    if port is None:
        return
    try:
        start_http_server(port, addr=settings.host, registry=metrics.registry)
    except OSError as error:  # another worker of this machine has it
        log.warning("metrics_not_served", port=port, error=str(error))


async def _run_until(
    stopping: asyncio.Event,
    projector: ResidentProjector,
    companions: Iterable[Coroutine[Any, Any, None]],
) -> None:
    """Run all until told to stop, or until one ends: none of them ends by itself."""
    projecting = asyncio.create_task(projector.run())
    others = [asyncio.create_task(each) for each in companions]
    told: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    await asyncio.wait({projecting, told, *others}, return_when=asyncio.FIRST_COMPLETED)
    began_s = monotonic()
    projector.stop()
    await asyncio.wait({projecting}, timeout=STOP_S)
    await _cancel({projecting, told, *others})
    log.info("stopped", seconds=round(monotonic() - began_s, 3))
    for task in (projecting, *others):
        if task.done() and not task.cancelled():
            task.result()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel until they have ended: a client library may mistake it for its own time limit."""
    running = set(tasks)
    for _ in range(CANCELS_MAX):
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_S)
        if not running:
            return


async def _watch(pool: Pool, metrics: WorkerMetrics) -> None:
    """Show how far the read models are, also when nobody projects them."""
    while True:
        with suppress(psycopg.Error, PoolTimeout):
            async with pool.connection() as connection:
                metrics.show(await read_status(connection))
        await asyncio.sleep(WATCH_S)
