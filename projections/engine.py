"""The projector: takes what is new in the outbox and moves the read models along, exactly once.

One turn is one transaction: hold the lanes that are free, take the batch, apply it to every read
model that listens, move the checkpoints. Rows and checkpoints commit together, so it does not
matter when a worker dies or how many there are. Every lane that is held moves to the snapshot of
the turn, with events or without: a reader waits for its token in all lanes.

When the database refuses a batch, it is applied with care: each read model apart, and what cannot
be applied is parked (projections/parking.py). A read model that fails as a whole rests, and the
others go on. A batch that kills its worker shows in projection_attempts; after three such deaths
the lane's events are applied one by one, and one that kills three times more is parked, too.
"""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from time import monotonic, time_ns
from typing import Final, Self, TypeAlias

import psycopg
import structlog
from msgspec import Struct, structs
from psycopg.errors import QueryCanceled

from projections import checkpoints, parking
from projections.checkpoints import Claim, Held, Key
from projections.outbox import Batch, Connection, Outbox, Position
from projections.parking import Parked, ReadModelFaultError
from projections.read_model import EVENT_TYPES, ReadModel

# Events per batch: about 20 ms of work, during which the lanes are held.
EVENTS_MAX: Final = 1_000
# Starts without a finished batch, after which a lane's events are applied alone; and how often one
# of them is tried so. Kills that are no event's fault must not come to that.
DEATHS_MAX: Final = 3
ALONE_TRIES_MAX: Final = 3
REST_S: Final = 5.0  # before a read model that failed as a whole is tried again


Moves: TypeAlias = dict[Key, tuple[Position, str]]  # where to, and what was published

log = structlog.get_logger(__name__)


class Applied(Struct, frozen=True):
    """What one batch did, once it is committed: for those who tell readers, and for the record.

    One that `is_again` was applied before, by a worker that may have died before it could tell.
    Without a `batch` there is even too much to tell: readers must forget everything.
    """

    models: tuple[str, ...]
    lanes: tuple[int, ...]
    reaches: Position
    batch: Batch | None
    began_ns: int  # since 1970
    parked: tuple[Parked, ...] = ()
    is_again: bool = False

    @property
    def keys(self) -> list[Key]:
        return [(model, lane) for model in self.models for lane in self.lanes]


class UnknownEventError(Exception):
    """The outbox has an event that this code does not know: the worker is too old."""


class _CareError(Exception):
    """The batch has events of something that is parked: not to be applied in one go."""


class Projector:
    """Moves read models along, on a connection of its own; one call at a time.

    An async context manager, which prepares the connection's session and tidies it up.

    `events_max` falls when a batch takes longer than the server allows. `announcing` says whether
    anybody tells readers what was applied; while nobody can, nothing is told again either.
    `has_more` says after each call whether the next one will probably find something.
    """

    def __init__(self, models: Sequence[ReadModel], *, read: Connection, outbox: Outbox) -> None:
        self._models = {model.name: model for model in models}
        self._events = {model.name: model.events for model in models}
        self._read = read
        self._outbox = outbox
        self._started: set[Key] = set()
        self._unfinished: set[Key] = set()
        self._lonely: list[Key] = []  # lanes whose events are applied one by one
        self._is_lonely_turn = False  # they and the others take turns
        self._told: dict[Key, Position] = {}
        self._all_told = False
        self._is_marked = True
        self._resting: dict[str, float] = {}
        self._began_ns = 0  # of the transaction, since 1970
        self.events_max = EVENTS_MAX
        self.announcing = True
        self.has_more = False

    async def __aenter__(self) -> Self:
        """Prepare the session.

        Raises:
            ForeignCheckpointError: the checkpoints are of another server.
        """
        await checkpoints.refuse_foreign(self._read, await self._outbox.system_identifier())
        await self._outbox.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave the session as it was, and what was started as finished: nobody has died."""
        if self._read.closed:
            return
        try:
            await self.mark_published()
            await checkpoints.finish(self._read, self._unfinished - set(self._lonely))
        finally:
            await self._outbox.close()

    async def is_behind(self) -> bool:
        """Whether a turn would find anything, as far as that can be seen without taking one."""
        if self._outbox.is_remote or self._lonely or self._all_told:
            return True
        return await checkpoints.is_behind(self._read, self._versions(), announcing=self.announcing)

    async def project(self, *, move_anyway: bool = False) -> list[Applied]:
        """Take one batch and apply it, in the lanes that nobody else holds.

        With `move_anyway` checkpoints move even if there are no events: something was committed,
        and somebody may wait for its token.

        Raises:
            psycopg.Error: a fault that passes; nothing was done. The connection may be broken.
            UnknownEventError: nothing was done.
        """
        self.has_more = False
        self._is_lonely_turn = bool(self._lonely) and not self._is_lonely_turn
        if self._is_lonely_turn:
            return await self._apply_one_alone()
        self.has_more = bool(self._lonely)
        try:
            applied = await self._take_turn(move_anyway=move_anyway, with_care=False)
        except (psycopg.Error, _CareError) as error:
            if isinstance(error, psycopg.Error) and self._is_passing(error):
                raise
            applied = await self._take_turn(move_anyway=move_anyway, with_care=True)
        self.events_max = min(EVENTS_MAX, 2 * self.events_max)
        return applied

    def told(self, applied: Iterable[Applied]) -> None:
        """Readers were told of this."""
        for each in applied:
            self._told |= dict.fromkeys(each.keys, each.reaches)
            self._is_marked = False

    def told_everything(self) -> None:
        """Readers were told to forget everything, so nothing is untold."""
        self._all_told = True

    async def mark_published(self) -> None:
        """Write down what readers were told of. Batches do so for the one before them.

        Raises:
            psycopg.Error: nothing was done; it may be left to the next batch.
        """
        if self._is_marked:
            return
        async with self._transaction():
            held = await checkpoints.claim(self._read, self._versions())
            told = {
                key: (at, at.snapshot)
                for key in held.keys
                if (at := held.newest[key].at) == self._told.get(key) and at.target is None
            }
            if any(held.newest[key].published != at.snapshot for key, (at, _) in told.items()):
                await checkpoints.move(self._read, held, told)
        self._is_marked = True

    async def _take_turn(self, *, move_anyway: bool, with_care: bool) -> list[Applied]:
        applied: list[Applied] = []
        moved: Moves = {}
        async with self._transaction(is_pipelined=not (with_care or self._outbox.is_remote)):
            held = await checkpoints.claim(self._read, self._versions(), leaving=self._lonely)
            if new := held.keys - self._started:
                await self._start(new)
                return applied
            self._believe(held)
            target: str | None = None
            for number, claim in enumerate(held.claims):
                if number:
                    await self._outbox.empty()
                if self.announcing and not self._is_told(claim):
                    applied += await self._collect_again(claim)
                batch = await self._take(claim, target, self.events_max)
                if claim.at.target is None:
                    # All that move in this turn move to one snapshot, and are together again.
                    target = batch.reaches.target or batch.reaches.snapshot
                is_on_its_way = claim.at.target is not None  # perhaps only the arrival is left
                if batch.events or is_on_its_way or move_anyway or len(held.claims) > 1:
                    applied.append(await self._apply(claim, batch, moved, with_care=with_care))
            await self._move(held, moved)
        self._unfinished -= moved.keys()
        return applied

    async def _start(self, keys: frozenset[Key]) -> None:
        """Count a start in each lane. It must be committed before anything is applied there."""
        for key, unfinished in (await checkpoints.start(self._read, keys)).items():
            if unfinished >= DEATHS_MAX:
                self._lonely.append(key)
        self._started |= keys
        self._unfinished |= keys
        self.has_more = True

    def _believe(self, held: Held) -> None:
        """Readers forgot everything: nothing that is applied is news to them."""
        if self._all_told:
            self._told |= {key: held.newest[key].at for key in held.keys}
            self._all_told = self._is_marked = False

    def _is_told(self, claim: Claim) -> bool:
        """Whether readers know what is applied at the position where the lanes stand."""
        if claim.at.target is None and all(
            snapshot == claim.at.snapshot for snapshot in claim.published.values()
        ):
            return True
        return all(self._told.get(key) == claim.at for key in claim.published)

    async def _collect_again(self, claim: Claim) -> list[Applied]:
        """What readers may not have been told of, if whoever applied it died too soon.

        It stands at the position only with the last of them.
        """
        again: list[Applied] = []
        for published in sorted(set(claim.published.values())):
            batch, _ = await self._outbox.take_all(
                published,
                claim.lanes,
                target=claim.at.target or claim.at.snapshot,
                events_max=EVENTS_MAX,
            )
            await self._outbox.empty()
            again.append(Applied((), (), claim.at, batch, self._began_ns, is_again=True))
        again[-1] = structs.replace(again[-1], models=claim.models, lanes=claim.lanes)
        return again

    async def _take(self, claim: Claim, target: str | None, events_max: int) -> Batch:
        batch = await self._outbox.take(claim.at, claim.lanes, target=target, events_max=events_max)
        if unknown := batch.types - EVENT_TYPES:
            raise UnknownEventError(f"this worker is too old to know {', '.join(sorted(unknown))}")
        # A target that is reached was set some time ago.
        self.has_more |= batch.reaches.target is not None or claim.at.target is not None
        return batch

    async def _apply(self, claim: Claim, batch: Batch, moved: Moves, *, with_care: bool) -> Applied:
        """Apply a batch to the read models that listen, and say where they all stand then."""
        parked: list[Parked] = []
        if with_care:
            claim, parked = await self._apply_with_care(claim, batch)
        else:
            await self._apply_at_once(claim, batch)
        return self._applied(claim, batch, moved, parked)

    def _applied(
        self, claim: Claim, batch: Batch, moved: Moves, parked: Sequence[Parked]
    ) -> Applied:
        # What readers were told of is written down with the next batch, so it costs nothing.
        is_told = self._is_told(claim)
        for key, published in claim.published.items():
            moved[key] = (batch.reaches, claim.at.snapshot if is_told else published)
        return Applied(
            claim.models, claim.lanes, batch.reaches, batch, self._began_ns, tuple(parked)
        )

    async def _move(self, held: Held, moved: Moves) -> None:
        if moved:
            await checkpoints.move(self._read, held, moved)
        if unfinished := self._unfinished.intersection(moved) - set(self._lonely):
            await checkpoints.finish(self._read, unfinished)

    async def _apply_at_once(self, claim: Claim, batch: Batch) -> None:
        listening = [name for name in claim.models if self._events[name] & batch.types]
        if claim.has_parked and await parking.touches_parked(self._read, listening):
            raise _CareError
        for name in listening:
            for statement in self._models[name].apply:
                await self._read.execute(statement)

    async def _apply_with_care(self, claim: Claim, batch: Batch) -> tuple[Claim, list[Parked]]:
        """Each read model apart. Returns those that can move on, and what was parked for them."""
        parked: list[Parked] = []
        sound: list[str] = []
        await parking.keep_whole_batch(self._read)
        for name in claim.models:
            try:
                async with self._read.transaction():
                    parked += await parking.apply_carefully(self._read, self._models[name])
                sound.append(name)
            except ReadModelFaultError as error:
                self._rest(name, error)
            except psycopg.Error as error:
                if self._is_passing(error):
                    raise
                if isinstance(error, QueryCanceled) and batch.events == 1:
                    model = self._models[name]
                    parked.append(await parking.park_only_event(self._read, model, str(error)))
                    sound.append(name)
                else:
                    self._rest(name, error)
        await parking.drop_whole_batch(self._read)
        moving = {key: told for key, told in claim.published.items() if key[0] in sound}
        return structs.replace(claim, models=tuple(sound), published=moving), parked

    async def _apply_one_alone(self) -> list[Applied]:
        """Apply the next event of a lane where workers died, and note beforehand that we try."""
        key = self._lonely[0]
        self._lonely = [*self._lonely[1:], key]
        async with self._transaction():
            held, claim = await self._claim_lane(key)
            if claim is None:
                return []
            self.has_more = True
            moved: Moves = {}
            claim, until = await self._stand_apart(claim, key, moved)
            batch = await self._take(claim, None, 1)
            if batch.events == 0 or batch.last_id > until:
                await checkpoints.finish(self._read, [key])
                self._lonely.remove(key)
            elif (parked := await self._park_if_tried(key, batch)) is not None:
                applied = self._applied(claim, batch, moved, [parked])
                await self._move(held, moved)
                return [applied]
            else:
                await checkpoints.try_alone(self._read, key, until=until, event_id=batch.last_id)
            await self._move(held, moved)
        return await self._apply_next_of(key, claim) if key in self._lonely else []

    async def _apply_next_of(self, key: Key, before: Claim) -> list[Applied]:
        async with self._transaction():
            held, claim = await self._claim_lane(key)
            if claim is None or claim.at != before.at:
                return []
            moved: Moves = {}
            batch = await self._take(claim, None, 1)
            applied = await self._apply(claim, batch, moved, with_care=True)
            await self._move(held, moved)
        return [applied]

    async def _claim_lane(self, key: Key) -> tuple[Held, Claim | None]:
        name, lane = key
        versions = {name: self._models[name].version}
        held = await checkpoints.claim(self._read, versions, lanes=[lane])
        return held, held.claims[0] if held.claims else None

    async def _stand_apart(self, claim: Claim, key: Key, moved: Moves) -> tuple[Claim, int]:
        """Let the lane stand on the way to a target, and say up to which id it goes alone.

        That is as far as the batch reached which ended the worker, or farther.
        """
        alone = await checkpoints.read_alone(self._read, key)
        if alone.until is not None:
            return claim, alone.until
        batch = await self._take(claim, None, EVENTS_MAX)
        await self._outbox.empty()
        if claim.at.target is None:
            target = batch.reaches.target or batch.reaches.snapshot
            claim = structs.replace(claim, at=Position(claim.at.snapshot, target))
            moved[key] = (claim.at, claim.published[key])
        return claim, batch.last_id

    async def _park_if_tried(self, key: Key, batch: Batch) -> Parked | None:
        """Park the one event of the batch if it has ended the worker often enough."""
        alone = await checkpoints.read_alone(self._read, key)
        if alone.tried != batch.last_id or alone.tries < ALONE_TRIES_MAX:
            return None
        await parking.keep_whole_batch(self._read)
        error = f"applying it ended the worker {alone.tries} times"
        return await parking.park_only_event(self._read, self._models[key[0]], error)

    def _versions(self) -> dict[str, int]:
        """The read models that do not rest."""
        now_s = monotonic()
        return {
            name: model.version
            for name, model in self._models.items()
            if self._resting.get(name, 0.0) <= now_s
        }

    def _rest(self, name: str, error: Exception) -> None:
        self._resting[name] = monotonic() + REST_S
        log.error("read_model_failed", read_model=name, error=str(error), rests_s=REST_S)

    def _is_passing(self, error: psycopg.Error) -> bool:
        if isinstance(error, QueryCanceled):
            is_least = self.events_max == 1
            self.events_max = max(1, self.events_max // 4)
            return not is_least
        return self._read.broken or parking.is_passing(error)

    @asynccontextmanager
    async def _transaction(self, *, is_pipelined: bool = False) -> AsyncGenerator[None]:
        """One transaction; in a pipeline statements go out together until a row is asked for.

        psycopg's own block would wait for the server at its beginning and twice at its end.
        """
        self._began_ns = time_ns()
        try:
            async with self._read.pipeline() if is_pipelined else nullcontext():
                await self._read.execute("BEGIN")
                yield
                await self._read.execute("COMMIT")
        except BaseException:
            self._outbox.forget()
            if not self._read.closed:
                await self._read.rollback()
            raise
