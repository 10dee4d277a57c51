"""Run commands in batches: while some are in the database, the next one gathers.

One transaction per batch claims the idempotency keys, calls the plural handler, stores each answer
under its key, and commits; so the commit, the round trips and the statement overhead are shared,
and an idle service adds no delay, because there is no timer.
docs/decisions/0001-batching-executor.md has the reasons and the figures.

What happens when something breaks:

- the database refuses a batch: its commands are run again one by one, so that a poisonous one
  fails alone;
- the connection is lost, at COMMIT or before: the batch is run again under the same keys. A claim
  finds the stored answer (it had committed), or a lock that is still held (the server has not
  finished with the old connection: wait), or neither (it was rolled back: run). Nothing is
  guessed;
- another process holds the key: wait for its answer, `CLAIM_PATIENCE_S` at most.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from time import perf_counter
from typing import Any, Final, Generic, TypeVar

import asyncpg
import msgspec
from msgspec import Struct

from commands.command import Batch, Command, Connection, Handle, Outcome, Postgres, Submission
from commands.refusals import key_reused

# Batches of one kind under way: while PostgreSQL works on one, Python is at another. A third one
# was measured to make them smaller and nothing faster.
BATCHES_IN_FLIGHT: Final = 2
CROWD: Final = 8  # commands that must wait before another batch is begun beside the first
BATCH_MAX: Final = 64  # commands; at about 0.3 ms each a batch holds its locks for 20 ms
QUEUE_MAX: Final = 1024  # commands waiting; at 4,000 per second the last one waits 0.25 s
PATIENCE_S: Final = 5.0  # a command that could not finish by then is answered 503
CLAIM_PATIENCE_S: Final = 3.0  # for the answer of another process that holds the same key
CLAIM_RETRY_S: Final = 0.01
TRIES_MAX: Final = 5  # of one command that the database refuses for reasons that pass
RECONNECT_S: Final = (0.02, 0.05, 0.1, 0.2, 0.4)  # then the last one again, until PATIENCE_S

# SQLSTATEs that pass: unique violation (somebody was faster: the next look sees it), serialization,
# deadlock, lock and statement timeout.
PASSING: Final = frozenset({"23505", "40001", "40P01", "55P03", "57014"})
# The connection, not the command, is at fault. InternalClientError is how asyncpg 0.32 reports a
# server that dies in mid-COMMIT (reliability: `crash` experiment, 8 of 51).
CONNECTION_LOST: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    OSError,
    TimeoutError,
)


class Rendered(Struct, frozen=True):
    """An outcome as the client will see it, now and on every replay."""

    status: int
    body: bytes
    etag: str | None = None
    location: str | None = None


class Answer(Struct, frozen=True):
    """What a command came to. `xid` is the transaction whose visibility shows its effect."""

    status: int
    body: bytes
    etag: str | None
    location: str | None
    xid: int
    replayed: bool


class Overloaded(Exception):
    """The queue is full, or the command waited too long in it. Nothing was done; try later."""


class InProgress(Exception):
    """Another request with this key has not finished. Its answer will be stored under the key."""


class OutcomeUnknown(Exception):
    """The database was lost while the command ran; its key will tell what became of it."""


C = TypeVar("C", bound=Command)
Render = Callable[[Submission[Any], Outcome], Rendered]


Name = tuple[str, str]  # of an idempotency key: (owner, key)


class _Claims(Struct):
    """What a transaction found under the keys of its batch."""

    fresh: dict[Name, int]  # ours to run; with the transaction's id
    answered: dict[Name, tuple[bytes, Answer]]  # run before; with the fingerprint
    held: set[Name]  # another process is at it


class _Pending(Generic[C]):
    """One command in the queue."""

    __slots__ = ("answer", "fingerprint", "lock", "name", "ran", "since", "submission")

    def __init__(
        self, submission: Submission[C], answer: asyncio.Future[Answer], since: float
    ) -> None:
        self.submission = submission
        self.answer = answer
        self.since = since
        self.ran = False  # a transaction with this command may have reached COMMIT
        self.name = owner, key = submission.principal.owner, submission.idempotency_key
        command = submission.command
        self.fingerprint = blake2b(
            type(command).__name__.encode() + _encoder.encode(command), digest_size=16
        ).digest()
        self.lock = int.from_bytes(
            blake2b(f"{owner}\0{key}".encode(), digest_size=8).digest(), signed=True
        )

    def resolve(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


_encoder: Final = msgspec.json.Encoder()


class Executor(Generic[C]):
    """The queue and the loop of one kind of command.

    `run()` is a task of the process; `submit()` is called by requests of the same event loop.
    `committed` is called after each commit that wrote something, and must not block. `observe` gets
    (size of the batch, its seconds).
    """

    def __init__(
        self,
        handle: Handle,
        *,
        postgres: Postgres,
        render: Render,
        committed: Callable[[], None],
        observe: Callable[[int, float], None],
    ) -> None:
        self._handle = handle
        self._postgres = postgres
        self._render = render
        self._committed = committed
        self._observe = observe
        self._queue: deque[_Pending[C]] = deque()
        self._arrived = asyncio.Event()
        self._crowded = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Commands in the queue."""
        return len(self._queue)

    async def submit(self, submission: Submission[C]) -> Answer:
        """Run one command in the next batch.

        Raises:
            Overloaded, InProgress, OutcomeUnknown: see there.
            asyncpg.PostgresError: the database refuses this command for a reason that stays: a bug.
        """
        if len(self._queue) >= QUEUE_MAX:
            raise Overloaded
        loop = asyncio.get_running_loop()
        pending = _Pending(submission, loop.create_future(), loop.time())
        self._enqueue(pending)
        return await pending.answer

    async def run(self) -> None:
        """Serve until cancelled; a batch that has begun is finished first."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve(self._arrived, at_least=1))
            for _ in range(1, BATCHES_IN_FLIGHT):
                group.create_task(self._serve(self._crowded, at_least=CROWD))

    async def _serve(self, called: asyncio.Event, *, at_least: int) -> None:
        """One batch after the other on one connection, while `at_least` so many commands wait."""
        line = _Line(self._postgres)
        try:
            while True:
                await called.wait()
                called.clear()
                while len(self._queue) >= at_least and (batch := self._take()):
                    begun = asyncio.create_task(self._finish(batch, line))
                    try:
                        await asyncio.shield(begun)
                    except asyncio.CancelledError:
                        await begun
                        raise
        finally:
            await line.close()

    def _take(self) -> list[_Pending[C]]:
        """The next batch, in order of arrival, without those who have gone or waited too long."""
        batch: list[_Pending[C]] = []
        expired = asyncio.get_running_loop().time() - PATIENCE_S
        while self._queue and len(batch) < BATCH_MAX:
            pending = self._queue.popleft()
            if pending.since < expired:
                pending.fail(OutcomeUnknown() if pending.ran else Overloaded())
            elif not pending.answer.done():
                batch.append(pending)
        return batch

    async def _finish(self, batch: list[_Pending[C]], line: "_Line") -> None:
        """Resolve every command of the batch, whatever happens."""
        losses = 0
        while True:
            try:
                await self._transact(batch, line)
            except CONNECTION_LOST:
                await line.close()
                oldest = min(pending.since for pending in batch)
                pause_s = RECONNECT_S[min(losses, len(RECONNECT_S) - 1)]
                losses += 1
                if asyncio.get_running_loop().time() + pause_s > oldest + PATIENCE_S:
                    for pending in batch:
                        pending.fail(OutcomeUnknown() if pending.ran else Overloaded())
                    return
                await asyncio.sleep(pause_s)
            except Exception as error:  # noqa: BLE001  a bug fails its command, not the process
                await self._finish_singly(batch, line, error)
                return
            else:
                return

    async def _finish_singly(
        self, batch: list[_Pending[C]], line: "_Line", error: Exception
    ) -> None:
        if len(batch) > 1:
            for pending in batch:
                await self._finish([pending], line)
            return
        (pending,) = batch
        for attempt in range(1, TRIES_MAX):
            if getattr(error, "sqlstate", None) not in PASSING:
                break
            await asyncio.sleep(0.005 * 2**attempt)
            try:
                await self._transact(batch, line)
            except CONNECTION_LOST as lost:
                await line.close()
                error = lost
                break
            except Exception as again:  # noqa: BLE001  the last one is the command's answer
                error = again
            else:
                return
        if isinstance(error, CONNECTION_LOST):
            pending.fail(OutcomeUnknown())
        elif getattr(error, "sqlstate", None) in PASSING:
            pending.fail(Overloaded())
        else:
            pending.fail(error)

    async def _transact(self, batch: list[_Pending[C]], line: "_Line") -> None:
        """One batch, one transaction. Resolves its commands after the commit."""
        begun = perf_counter()
        connection = await line.open()
        # Commands with the same key in one batch: the first runs, the others get its answer.
        leaders: dict[Name, _Pending[C]] = {}
        for pending in batch:
            leaders.setdefault(pending.name, pending)
        transaction = connection.transaction()
        await transaction.start()
        try:
            claims = await self._claim(connection, leaders)
            fresh = [leaders[name] for name in claims.fresh]
            rendered = await self._decide(connection, [each.submission for each in fresh])
            if fresh:
                await self._store(connection, fresh, rendered)
        except BaseException:
            with suppress(Exception):
                await transaction.rollback()
            raise
        for pending in fresh:
            pending.ran = True
        await transaction.commit()
        if fresh:
            self._committed()
        self._observe(len(batch), perf_counter() - begun)
        for pending, each in zip(fresh, rendered, strict=True):
            xid = claims.fresh[pending.name]
            answer = Answer(each.status, each.body, each.etag, each.location, xid, replayed=False)
            claims.answered[pending.name] = (pending.fingerprint, answer)
        for pending in batch:
            self._resolve(pending, claims, leader=leaders[pending.name] is pending)

    def _resolve(self, pending: _Pending[C], claims: "_Claims", *, leader: bool) -> None:
        """Answer one command from what is stored under its key, now or before."""
        if pending.name in claims.held:
            self._wait_for_holder(pending)
            return
        fingerprint, answer = claims.answered[pending.name]
        if fingerprint != pending.fingerprint:
            refused = self._render(pending.submission, key_reused())
            answer = Answer(refused.status, refused.body, None, None, answer.xid, replayed=False)
        elif not leader:
            answer = msgspec.structs.replace(answer, replayed=True)
        pending.resolve(answer)

    async def _claim(self, connection: Connection, leaders: dict[Name, _Pending[C]]) -> "_Claims":
        rows = await connection.fetch(
            CLAIM_KEYS,
            [owner for owner, _ in leaders],
            [key for _, key in leaders],
            [pending.lock for pending in leaders.values()],
        )
        claims = _Claims({}, {}, set())
        for name, row in zip(leaders, rows, strict=True):
            mine, xid, fingerprint, status, body, etag, location, stored_xid = row
            if fingerprint is not None:
                answer = Answer(status, body, etag, location, stored_xid, replayed=True)
                claims.answered[name] = (fingerprint, answer)
            elif mine:
                claims.fresh[name] = xid
            else:
                claims.held.add(name)
        return claims

    async def _decide(self, connection: Connection, batch: Batch[C]) -> list[Rendered]:
        if not batch:
            return []
        outcomes = await self._handle(batch, connection=connection, now=datetime.now(UTC))
        return [
            self._render(submission, outcome)
            for submission, outcome in zip(batch, outcomes, strict=True)
        ]

    async def _store(
        self, connection: Connection, fresh: list[_Pending[C]], rendered: list[Rendered]
    ) -> None:
        await connection.execute(
            STORE_ANSWERS,
            [pending.submission.principal.owner for pending in fresh],
            [pending.submission.idempotency_key for pending in fresh],
            [pending.fingerprint for pending in fresh],
            [each.status for each in rendered],
            [each.body for each in rendered],
            [each.etag for each in rendered],
            [each.location for each in rendered],
            datetime.now(UTC),
        )

    def _wait_for_holder(self, pending: _Pending[C]) -> None:
        """Look again soon: the process that holds the key has not finished."""
        loop = asyncio.get_running_loop()
        if loop.time() > pending.since + CLAIM_PATIENCE_S:
            pending.fail(InProgress())
        else:
            loop.call_later(CLAIM_RETRY_S, self._enqueue, pending)

    def _enqueue(self, pending: _Pending[C]) -> None:
        self._queue.append(pending)
        self._arrived.set()
        if len(self._queue) >= CROWD:
            self._crowded.set()


class _Line:
    """A connection that is kept: a pool would reset it after each batch."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._connection: Connection | None = None

    async def open(self) -> Connection:
        if self._connection is None:
            self._connection = await self._postgres.acquire(timeout=PATIENCE_S)
            await self._connection.execute(PLAN_FOR_KEYS)
        return self._connection

    async def close(self) -> None:
        """Throw the connection away, in whatever state it is."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.terminate()
            with suppress(Exception):
                await self._postgres.release(connection)


# Every statement of a command looks rows up by their keys. Left to itself the planner plans those
# with array parameters anew each time (0.1 ms each, as much as running them), and while a table is
# young and its statistics old it scans it, or materializes all of it, and keeps that plan.
PLAN_FOR_KEYS: Final = """
SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off;
SET enable_hashjoin = off;
SET enable_mergejoin = off;
SET enable_material = off
"""

# $1 owners, $2 keys, $3 bigint[] hashes of both; distinct, up to BATCH_MAX. Takes one advisory
# lock per key until the transaction ends, without waiting. Rows: one per key, in order; `mine` says
# whether the lock was free; the answer's columns are null while there is none. A process that
# stored its answer between this statement's snapshot and its lock is caught by the primary key in
# STORE_ANSWERS.
CLAIM_KEYS: Final = """
SELECT pg_try_advisory_xact_lock(asked.lock) AS mine, pg_current_xact_id()::text::bigint AS xid,
       known.fingerprint, known.status, known.body, known.etag, known.location,
       known.xid::text::bigint AS stored_xid
FROM unnest($1::text[], $2::text[], $3::bigint[])
     WITH ORDINALITY AS asked (owner, key, lock, position)
LEFT JOIN idempotency_keys AS known USING (owner, key)
ORDER BY asked.position
"""

# $1..$7 arrays, one element per claimed key; $8 the time. The transaction id is the column's
# default.
STORE_ANSWERS: Final = """
INSERT INTO idempotency_keys (owner, key, fingerprint, status, body, etag, location, created_at)
SELECT owner, key, fingerprint, status, body, etag, location, $8
FROM unnest($1::text[], $2::text[], $3::bytea[], $4::smallint[], $5::bytea[], $6::text[],
            $7::text[])
     AS t (owner, key, fingerprint, status, body, etag, location)
"""
