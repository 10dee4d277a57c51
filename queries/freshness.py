"""How far each read model is, as this process knows it: who waits, who is told, what is parked.

Two ways of knowing are kept apart, because a cache may stand between:

- *applied*: the read tables contain it. Heard by push, or polled from `projection_checkpoints`. A
  SELECT on the primary that begins now shows it.
- *announced*: the caches, too, have dropped what it made old. Only a push says so, after its
  invalidations have been carried out here; so whatever a cache still holds then is current.

While pushes are continuous the caches are open. Continuity begins anew with every subscription: the
caches are emptied, and what the worker recorded as published when we were already listening is
taken as announced. It ends when the connection breaks, at `{"reset": true}`, and when a checkpoint
has been ahead of the announcements for a second: a lost message, or a worker that cannot publish.
"""

from asyncio import (
    Event,
    Future,
    Task,
    create_task,
    current_task,
    gather,
    get_running_loop,
    sleep,
    timeout,
)
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeAlias, cast

import msgspec
from asyncpg import InterfaceError, InternalClientError, PostgresError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from queries.cache import APPLIED_CHANNEL
from queries.snapshot import Heads, Reach, covers, parse

if TYPE_CHECKING:
    from asyncpg import Pool, Record

    Postgres: TypeAlias = Pool[Record]
else:  # asyncpg's generics exist for the type checkers only
    Postgres = object

WAITERS_MAX: Final = 1_000  # at 0.2 us each and 500 messages a second, 10 % of a core
POLL_WAITING_S: Final = 0.02  # while somebody waits and nothing is heard
POLL_IDLE_S: Final = 1.0
POLL_TIMEOUT_S: Final = 2.0
PING_S: Final = 1.0  # a silent push connection is asked whether it lives; no answer is a break
RECONNECT_S: Final = 0.2
PARKED_MAX: Final = 10_000  # rows read; if there are more, every aggregate counts as parked

# No parameters. One row per read model and lane, then at most PARKED_MAX parked aggregates (their
# checkpoint columns null); one statement, so both are of one moment. No locks.
POLL_CHECKPOINTS: Final = """
SELECT read_model, lane, snapshot::text, last_id, published::text,
       NULL AS aggregate_id, NULL::float8 AS parked_at
FROM projection_checkpoints
UNION ALL
(SELECT read_model, lane, NULL, NULL, NULL, aggregate_id, extract(epoch FROM parked_at)::float8
 FROM projection_parked
 LIMIT 10000)
"""

# Redis is away, or somebody else publishes on our channel.
PUSH_FAULTS: Final = (RedisError, OSError, TimeoutError, msgspec.DecodeError, ValueError)
# PostgreSQL is away, or too slow to wait for.
POSTGRES_FAULTS: Final = (PostgresError, InterfaceError, InternalClientError, OSError, TimeoutError)


class ReadModel:
    """One read model, as known here."""

    __slots__ = ("announced", "applied", "moves", "parked", "waiters")

    def __init__(self) -> None:
        self.applied = Reach()
        self.announced = Reach()
        self.parked: dict[str, float] = {}  # aggregate id: since when, in seconds since 1970
        self.waiters: dict[Future[None], int] = {}  # what each waits for
        self.moves: dict[int, tuple[str, int, float]] = {}  # by lane: snapshot, last id, since when


class Applied(msgspec.Struct, frozen=True):
    """A push: these lanes of these read models now stand at `snapshot`, and this has changed."""

    lanes: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    snapshot: str = ""
    orders: tuple[tuple[str, int], ...] = ()  # id, version
    customers: tuple[str, ...] = ()
    skus: tuple[str, ...] = ()
    parked: tuple[tuple[str, str, str], ...] = ()  # read model, kind of aggregate, id
    reset: bool = False


class Caches(Protocol):
    """What is told before a push counts as announced. Only `open` may wait."""

    def drop(self, applied: Applied) -> None:
        """Forget what this push made old."""
        ...

    def drop_aggregate(self, model: str, aggregate_id: str) -> None:
        """Forget what was said of an aggregate: it was parked, or is no longer."""
        ...

    async def open(self) -> bool:
        """Pushes are continuous from here on. False: not before the reset that is on its way.

        Raises redis.RedisError, OSError or TimeoutError.
        """
        ...

    def close(self) -> None:
        """Pushes are not continuous any more: forget everything."""
        ...


class Freshness:
    """Who has what. An async context manager, which owns the push connection and the polls."""

    def __init__(self, pool: Postgres, redis: Redis | None, caches: Caches) -> None:
        self._pool = pool
        self._redis = redis
        self._caches = caches
        self._models: dict[str, ReadModel] = {}
        self._tasks: list[Task[None]] = []
        self._subscribed = False
        self._continuity = 0  # counts its beginnings and ends
        self._checked: dict[str, Heads] = {}  # where the checkpoints were at `_checked_s`
        self._checked_s = 0.0
        self._heard_s = 0.0
        self._polled_s = 0.0
        self._poll_now = Event()
        self._newly_parked: set[tuple[str, str]] = set()  # since the last poll began
        self._is_flooded = False  # more is parked than we read
        self.is_open = False  # whether the caches are in use
        self.generation = 0  # of what is applied: a read that began in this one shows all of it
        self.waiting = 0
        self.waits_refused = 0
        self.pushes = 0
        self.polls = 0
        self.poll_errors = 0
        self.breaks = 0  # ends of continuity

    async def __aenter__(self) -> Self:
        self._tasks.append(create_task(self._poll_forever()))
        if self._redis is not None:
            self._tasks.append(create_task(self._listen_forever(self._redis)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        outcomes = await gather(*self._tasks, return_exceptions=True)
        self._end_continuity()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    @property
    def is_running(self) -> bool:
        """Whether it listens and polls. False before and after its time, or because of a bug."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def is_applied(self, model: str, xid: int) -> bool:
        """Whether a SELECT on the read model that begins now shows this transaction."""
        known = self._models.get(model)
        return known is not None and xid in known.applied

    def is_announced(self, model: str, xid: int) -> bool:
        """Whether everything the caches still hold shows this transaction."""
        known = self._models.get(model)
        return known is not None and xid in known.announced

    def parked_at(self, model: str, concerns: Callable[[str], bool]) -> float | None:
        """Since when, in seconds since 1970, any aggregate that concerns the caller is parked."""
        known = self._models.get(model)
        if known is None or not known.parked:
            return None
        parked = known.parked.items()
        return min((at for each, at in parked if self._is_flooded or concerns(each)), default=None)

    def still_s(self, model: str, lanes: Iterable[int]) -> float:
        """How long the stillest of these lanes has not moved, as far as polls have seen."""
        known = self._models.get(model)
        moves = known.moves if known is not None else {}
        return max((monotonic() - moves[lane][2] for lane in lanes if lane in moves), default=0.0)

    async def wait_for(self, model: str, xid: int, timeout_s: float) -> bool:
        """Wait until this transaction is applied to the read model. False: not in time.

        At most WAITERS_MAX wait in one process; the next is told False at once.
        """
        if self.is_applied(model, xid):
            return True
        if self.waiting >= WAITERS_MAX:
            self.waits_refused += 1
            return False
        if timeout_s <= 0:
            return False
        waiters = self._models.setdefault(model, ReadModel()).waiters
        told: Future[None] = get_running_loop().create_future()
        waiters[told] = xid
        self.waiting += 1
        self._poll_now.set()
        try:
            async with timeout(timeout_s):
                await told
        except TimeoutError:
            return self.is_applied(model, xid)  # perhaps told at the last moment
        finally:
            self.waiting -= 1
            del waiters[told]
        return True

    async def _listen_forever(self, redis: Redis) -> None:
        while not _is_cancelled():
            with suppress(*PUSH_FAULTS):
                await self._listen(redis)
            self._end_continuity()
            await sleep(RECONNECT_S)

    async def _listen(self, redis: Redis) -> None:
        """Hear pushes until the connection breaks, is silent on a ping, or was made anew."""
        async with redis.pubsub() as push:  # pyright: ignore[reportUnknownMemberType]
            await push.subscribe(APPLIED_CHANNEL)  # pyright: ignore[reportUnknownMemberType]
            pinged_s: float | None = None
            while not _is_cancelled():
                heard = cast("dict[str, Any] | None", await push.get_message(timeout=PING_S))
                if heard is None:
                    if pinged_s is None:
                        await push.ping()  # pyright: ignore[reportUnknownMemberType]
                        pinged_s = monotonic()
                    elif monotonic() - pinged_s > PING_S:
                        return
                    continue
                pinged_s = None
                if heard["type"] == "message":
                    self._hear(heard["data"])
                elif heard["type"] == "subscribe":
                    if self._subscribed:  # redis-py has connected again, silently
                        return
                    self._subscribed = True
                    self._continuity += 1
                    self._poll_soon()

    def _hear(self, message: bytes) -> None:
        """Carry out the invalidations first, and only then believe that they are."""
        applied = _decode(message)
        self.pushes += 1
        if applied.reset:
            for known in self._models.values():
                known.applied = Reach()
            self._end_continuity()
            self._subscribed = True
            self._poll_soon()
            return
        self._caches.drop(applied)
        for model, _, aggregate_id in applied.parked:
            self._newly_parked.add((model, aggregate_id))
            self._models.setdefault(model, ReadModel()).parked.setdefault(aggregate_id, time())
            self._caches.drop_aggregate(model, aggregate_id)
        if applied.lanes:
            snapshot = parse(applied.snapshot)
            heads = dict.fromkeys(applied.lanes, snapshot)
            for model in applied.models:
                known = self._models.setdefault(model, ReadModel())
                known.announced.advance(heads)
                self._apply(known, heads)
            self._heard_s = monotonic()

    def _apply(self, known: ReadModel, heads: Heads, *, is_news: bool = False) -> None:
        if known.applied.advance(heads) or is_news:
            self.generation += 1
            for waiter, xid in known.waiters.items():
                if xid in known.applied and not waiter.done():
                    waiter.set_result(None)

    def _end_continuity(self) -> None:
        self._subscribed = False
        self._continuity += 1
        if self.is_open:
            self.breaks += 1
        self._close()

    def _close(self) -> None:
        self.is_open = False
        for known in self._models.values():
            known.announced = Reach()
        self._caches.close()

    async def _poll_forever(self) -> None:
        while not _is_cancelled():
            await self._until_next_poll()
            self._polled_s = monotonic()
            try:
                async with timeout(POLL_TIMEOUT_S):
                    await self._poll()
            except POSTGRES_FAULTS:
                self.poll_errors += 1

    def _poll_soon(self) -> None:
        self._polled_s = 0.0
        self._poll_now.set()

    async def _until_next_poll(self) -> None:
        while True:
            due_s = self._polled_s + POLL_IDLE_S
            if self.waiting:
                due_s = min(due_s, max(self._polled_s, self._heard_s) + POLL_WAITING_S)
            rest_s = due_s - monotonic()
            if rest_s <= 0:
                return
            self._poll_now.clear()
            with suppress(TimeoutError):
                async with timeout(rest_s):
                    await self._poll_now.wait()

    async def _poll(self) -> None:
        continuity = self._continuity
        self._newly_parked.clear()
        rows = await self._pool.fetch(POLL_CHECKPOINTS)
        self.polls += 1
        applied: dict[str, Heads] = {}
        published: dict[str, Heads] = {}
        parked: dict[str, dict[str, float]] = {}
        for model, lane, snapshot, last_id, told, aggregate_id, parked_at in rows:
            if aggregate_id is None:
                moves = self._models.setdefault(model, ReadModel()).moves
                if lane not in moves or moves[lane][:2] != (snapshot, last_id):
                    moves[lane] = (snapshot, last_id, monotonic())
                applied.setdefault(model, {})[lane] = parse(snapshot)
                published.setdefault(model, {})[lane] = parse(told)
            else:
                parked.setdefault(model, {})[aggregate_id] = parked_at
        self._is_flooded = sum(map(len, parked.values())) >= PARKED_MAX
        for model in applied.keys() | parked.keys() | self._models.keys():
            self._park(model, parked.get(model, {}))
        for model, heads in applied.items():
            known = self._models[model]
            is_news = not known.applied.is_complete
            known.applied.is_complete = True
            self._apply(known, heads, is_news=is_news)
        await self._keep_continuity(continuity, applied, published)

    def _park(self, model: str, parked: dict[str, float]) -> None:
        """Take what a poll found, and what was parked while it ran."""
        known = self._models.setdefault(model, ReadModel())
        for aggregate_id, parked_at in known.parked.items():
            if (model, aggregate_id) in self._newly_parked:
                parked.setdefault(aggregate_id, parked_at)
        changed = known.parked.keys() ^ parked.keys()
        known.parked = parked
        for aggregate_id in changed:
            self._caches.drop_aggregate(model, aggregate_id)

    async def _keep_continuity(
        self, continuity: int, applied: dict[str, Heads], published: dict[str, Heads]
    ) -> None:
        """Open the caches when pushes are continuous; close them when one must have been lost."""
        is_due = monotonic() - self._checked_s >= POLL_IDLE_S
        if self.is_open and (self._is_flooded or (is_due and not self._is_told_of(self._checked))):
            self.breaks += 1
            self._close()
        if (
            not self.is_open
            and self._subscribed
            and not self._is_flooded
            and all(covers(published.get(model, {}), at) for model, at in self._checked.items())
        ):
            with suppress(RedisError, OSError, TimeoutError):
                if await self._caches.open():
                    self._begin_continuity(continuity, published)
        if is_due:
            self._checked = applied
            self._checked_s = monotonic()

    def _is_told_of(self, checkpoints: dict[str, Heads]) -> bool:
        return all(
            known.announced.is_complete and covers(known.announced.lanes, checkpoints[model])
            for model, known in self._models.items()
            if model in checkpoints
        )

    def _begin_continuity(self, continuity: int, published: dict[str, Heads]) -> None:
        """What the worker had published before we asked is announced to caches that are empty."""
        if continuity != self._continuity:  # it ended or began anew while we asked
            self._caches.close()
            return
        for model, heads in published.items():
            announced = self._models[model].announced
            announced.advance(heads)
            announced.is_complete = True
        self.is_open = True


_decode: Final = msgspec.json.Decoder(Applied).decode


def _is_cancelled() -> bool:
    """Whether this task was told to stop, even if a library has swallowed that.

    redis-py and asyncpg call asyncio.wait_for, which does so now and then in Python 3.11 (CPython
    gh-86296).
    """
    task = current_task()
    return task is not None and task.cancelling() > 0
