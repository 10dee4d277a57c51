"""The arq worker: the clock of the house. It carries no truth, so it may die with Redis.

arq 0.28 polls each 0.5 s, pickles, keeps results for an hour, ends with its connection to Redis,
and writes one health key per queue, which any worker that closes deletes. Hence the settings here,
and the supervision: when it ends, it is started again, and the projector notices nothing.
"""

import asyncio
import os
import socket
from typing import Any, Final, TypeAlias

import msgspec
import structlog
from arq import cron
from arq.connections import RedisSettings
from arq.worker import Worker
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from projections.status import read_status
from queries.cache import WAKE_CHANNEL
from workers.housekeeping import keep_house

Context: TypeAlias = dict[Any, Any]

QUEUE: Final = "waybill:queue"
POLL_S: Final = 0.25  # two Redis commands each; the sweep is due each second
JOBS_MAX: Final = 4
QUEUE_READ_MAX: Final = 1_000  # running jobs stand at the head of the queue: more than all of them
SWEEP_TIMEOUT_S: Final = 5
HOUSEKEEPING_TIMEOUT_S: Final = 50
HEALTH_S: Final = 15
LATE_S: Final = 0.5  # events that wait longer have missed their call
RESTART_S: Final = (0.5, 1.0, 2.0, 5.0)
CLOSE_TIMEOUT_S: Final = 1.0

log = structlog.get_logger(__name__)


async def sweep(ctx: Context) -> None:
    """Call the projectors if any event has waited too long: a call was lost, or a worker died."""
    pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = ctx["pool"]
    async with pool.connection() as connection:
        late = [status for status in await read_status(connection) if status.lag_s > LATE_S]
    if late:
        await ctx["redis"].publish(WAKE_CHANNEL, b"")


async def housekeeping(ctx: Context) -> None:
    """Keep the house; what fails is tried again in a minute."""
    pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = ctx["pool"]
    async with pool.connection() as connection:
        await keep_house(connection)


def build_worker(redis_url: str, pool: AsyncConnectionPool[AsyncConnection[TupleRow]]) -> Worker:
    """Make the arq worker of this process. Cron jobs run once for all workers."""
    redis = RedisSettings.from_dsn(redis_url)
    redis.conn_retries = 0
    return Worker(
        queue_name=QUEUE,
        redis_settings=redis,
        cron_jobs=[
            cron(sweep, second=set(range(60)), keep_result=0, max_tries=1, timeout=SWEEP_TIMEOUT_S),
            cron(
                housekeeping,
                second=0,
                run_at_startup=True,
                keep_result=0,
                max_tries=1,
                timeout=HOUSEKEEPING_TIMEOUT_S,
            ),
        ],
        ctx={"pool": pool},
        handle_signals=False,
        max_jobs=JOBS_MAX,
        queue_read_limit=QUEUE_READ_MAX,
        poll_delay=POLL_S,
        keep_result=0,
        health_check_interval=HEALTH_S,
        health_check_key=f"waybill:health:{socket.gethostname()}:{os.getpid()}",
        job_serializer=msgspec.msgpack.encode,
        job_deserializer=msgspec.msgpack.decode,
        log_results=False,
    )


async def run_timers(redis_url: str, pool: AsyncConnectionPool[AsyncConnection[TupleRow]]) -> None:
    """Run the arq worker until cancelled, and again whenever it ends."""
    ends = 0
    while True:
        worker = build_worker(redis_url, pool)
        try:
            await worker.async_run()
        except Exception as error:  # noqa: BLE001  whatever arq dies of, it is started again
            pause_s = RESTART_S[min(ends, len(RESTART_S) - 1)]
            ends += 1
            log.warning("timers_ended", error=repr(error), restart_s=pause_s)
            await _close(worker)
            await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            await _close(worker)
            raise


async def _close(worker: Worker) -> None:
    # arq gathers its running jobs without return_exceptions, so closing may raise what they did,
    # a CancelledError among them, which is not ours.
    closing = asyncio.create_task(worker.close())
    await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
