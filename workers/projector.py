"""The resident projector: woken by Redis, and by the clock where Redis is silent or gone."""

import asyncio
from time import monotonic, perf_counter, time, time_ns
from typing import Final

import psycopg
import structlog
from opentelemetry.trace import Tracer
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from projections.catalogue import READ_MODELS
from projections.engine import Applied, Projector, UnknownEventError
from projections.outbox import Connection, Outbox
from projections.rebuild import fill_missing
from workers.metrics import WorkerMetrics
from workers.push import Push
from workers.tracing import record
from workers.wake import Wake

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]

# After a batch the next one gathers for as long as the last one took, but no longer than this: a
# turn costs 2 to 3 ms of CPU whatever its size, so projecting without a pause would take a core.
PAUSE_MAX_S: Final = 0.02
SWEEP_S: Final = 1.0  # the floor, should a call be lost; it costs one small query
SWEEP_UNCALLED_S: Final = 0.05  # while Redis is away
MEND_S: Final = 0.5  # between two tries to reach readers again
RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0)  # after a fault, the last one again and again

log = structlog.get_logger(__name__)


class ResidentProjector:
    """Projects until it is asked to stop."""

    def __init__(
        self, pool: Pool, *, wake: Wake, push: Push, metrics: WorkerMetrics, tracer: Tracer
    ) -> None:
        self._pool = pool
        self._wake = wake
        self._push = push
        self._metrics = metrics
        self._tracer = tracer
        self._is_stopping = False
        self._faults = 0
        self._was_called = True
        self._moved_s = 0.0
        self._mended_s = 0.0

    def stop(self) -> None:
        """End `run` after the batch under way."""
        self._is_stopping = True
        self._wake.call()

    async def run(self) -> None:
        """Project, and begin anew with a new connection whenever the database is lost.

        Raises:
            ForeignCheckpointError: these checkpoints are not ours to move.
        """
        while not self._is_stopping:
            try:
                await self._serve()
            except (psycopg.Error, PoolTimeout) as error:
                await self._pause(error)

    async def _pause(self, error: Exception) -> None:
        pause_s = RETRY_S[min(self._faults, len(RETRY_S) - 1)]
        self._faults += 1
        log.warning("projector_fault", error=str(error), retry_s=pause_s)
        await self._wake.wait(pause_s)

    async def _serve(self) -> None:
        """Project on one connection, as long as it lasts."""
        async with self._pool.connection() as connection:
            await self._fill(connection)
            async with Projector(
                READ_MODELS, read=connection, outbox=Outbox(connection)
            ) as projector:
                log.info("projecting", read_models=[model.name for model in READ_MODELS])
                while not self._is_stopping:
                    try:
                        await self._take_turn(projector)
                        self._faults = 0
                    except (psycopg.Error, UnknownEventError) as error:
                        if connection.closed:
                            raise
                        await self._pause(error)

    async def _fill(self, connection: Connection) -> None:
        """Fill what was never filled, or wait until another worker has; it may die of it."""
        elsewhere = list(READ_MODELS)
        while elsewhere and not self._is_stopping:
            refilled, elsewhere = await fill_missing(connection, READ_MODELS)
            if refilled:
                log.info("read_models_filled", read_models=[model.name for model in refilled])
                await self._push.reset()
            if elsewhere:
                await self._wake.wait(SWEEP_S)

    async def _take_turn(self, projector: Projector) -> None:
        """Project what there is, and wait for more."""
        await self._mend(projector)
        began_s = perf_counter()
        is_due = self._was_called or self._is_due_uncalled()
        applied: list[Applied] = []
        if is_due or projector.has_more or await projector.is_behind():
            applied = await projector.project(move_anyway=is_due)
            self._moved_s = monotonic()
        self._was_called = False
        seconds = perf_counter() - began_s
        if applied:
            await self._conclude(projector, applied, seconds)
        if projector.has_more:
            return
        if applied:
            await asyncio.sleep(min(seconds, PAUSE_MAX_S))
        sweep_s = SWEEP_S if self._wake.is_connected else SWEEP_UNCALLED_S
        self._was_called = await self._wake.wait(sweep_s)
        if not self._was_called:
            await projector.mark_published()

    def _is_due_uncalled(self) -> bool:
        """Whether to move on without a call: somebody may wait for a token without an event."""
        return not self._wake.is_connected and monotonic() - self._moved_s > SWEEP_S

    async def _mend(self, projector: Projector) -> None:
        """Once Redis is back, let readers begin anew."""
        is_due = monotonic() - self._mended_s > MEND_S
        if self._push.is_broken and self._wake.is_connected and is_due:
            self._mended_s = monotonic()
            if await self._push.reset():
                projector.told_everything()
        projector.announcing = not self._push.is_broken

    async def _conclude(self, projector: Projector, applied: list[Applied], seconds: float) -> None:
        """What comes after the commit: tell readers, then count and trace."""
        ended_ns = time_ns()
        if projector.announcing:
            if await self._push.publish(applied):
                projector.told(applied)
            else:
                self._metrics.pushes_failed.inc()
        self._metrics.observe(applied, seconds=seconds, now_s=time())
        record(self._tracer, applied, ended_ns=ended_ns)
        for each in applied:
            for parked in each.parked:
                log.error(
                    "event_parked",
                    read_model=parked.read_model,
                    aggregate=parked.aggregate,
                    aggregate_id=parked.aggregate_id,
                    event_id=parked.event_id,
                    error=parked.error,
                )
