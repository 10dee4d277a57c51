"""Who calls: API keys by the hash of the presented key, kept for seconds, looked up once at a time.

The keys themselves are not kept, not even in memory. What is known is believed for `TTL_S`, so a
revoked key works that long at most; and longer, `GRACE_S`, only for a key that was good, and while
PostgreSQL cannot be asked, when nobody can revoke a key either.
"""

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from time import monotonic
from typing import Final

from app.http.limiter import Allowance
from app.http.problems import ProblemError
from commands.command import Principal

TTL_S: Final = 10.0
REFRESH_AFTER_S: Final = 7.0  # a busy key is looked up again in the background, before it is due
RETRY_S: Final = 0.5  # after a refresh was begun or a look-up failed
GRACE_S: Final = 300.0
KNOWN_MAX: Final = 10_000  # keys; the oldest leaves, and with it what is left of its leased share
UNKNOWN_MAX: Final = 10_000  # hashes of keys that are not good; they cannot push out good ones
LOOKUPS_MAX: Final = 64  # at a time, so a flood of invented keys does not reach PostgreSQL
KEY_BYTES_MAX: Final = 512

Find = Callable[[bytes], Awaitable[Principal | None]]


class Caller:
    """A good key: whose it is, until when that is believed, and its share of the quota.

    `is_stale`: it could not be looked up again when it was due, and is believed for `GRACE_S` more.
    """

    __slots__ = ("allowance", "fresh_until_s", "is_stale", "principal", "refresh_at_s")

    def __init__(self, principal: Principal, now_s: float) -> None:
        self.allowance = Allowance(principal.key_id, principal.requests_per_minute)
        self.renew(principal, now_s)

    def renew(self, principal: Principal, now_s: float) -> None:
        """Believe it for another `TTL_S`."""
        self.principal = principal
        if principal.requests_per_minute != self.allowance.quota:
            self.allowance.set_quota(principal.requests_per_minute)
        self.is_stale = False
        self.fresh_until_s = now_s + TTL_S
        self.refresh_at_s = now_s + REFRESH_AFTER_S


class Callers:
    """The keys that this process has seen. `find` takes the hash of a key and asks PostgreSQL.

    `faults` are the errors by which it says that it cannot.
    """

    def __init__(
        self,
        find: Find,
        *,
        faults: tuple[type[Exception], ...],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._find = find
        self._faults = faults
        self._clock = clock
        self._known: dict[bytes, Caller] = {}
        self._unknown: dict[bytes, float] = {}  # until when
        self._lookups: dict[bytes, asyncio.Task[Caller | None]] = {}

    def at_hand(self, authorization: bytes, now_s: float) -> Caller | None:
        """The caller, if there is nothing to ask. Else `identify` says more."""
        if authorization[:7].lower() != b"bearer ":
            return None
        caller = self._known.get(sha256(authorization[7:].strip()).digest())
        return caller if caller is not None and now_s < caller.refresh_at_s else None

    async def identify(self, authorization: bytes) -> Caller:
        """Who presents this Authorization header.

        Raises:
            ProblemError: unauthenticated, overloaded, unavailable.
        """
        key = authorization[7:].strip()
        if authorization[:7].lower() != b"bearer " or not 0 < len(key) <= KEY_BYTES_MAX:
            raise _unauthenticated("Send an API key: Authorization: Bearer <key>.", b"")
        digest = sha256(key).digest()
        now_s = self._clock()
        caller: Caller | None = None
        if now_s >= self._unknown.get(digest, 0.0):
            caller = self._known.get(digest)
            if caller is not None and now_s < _believed_until_s(caller):
                caller.refresh_at_s = now_s + RETRY_S
                self._look_up(digest)
                return caller
            caller = await self._found(digest, caller, now_s)
        if caller is None:
            error = b', error="invalid_token"'
            raise _unauthenticated("This key is not known, has expired or was revoked.", error)
        return caller

    async def _found(self, digest: bytes, known: Caller | None, now_s: float) -> Caller | None:
        """Wait for the look-up of a key that is new here, or has not been used for a while."""
        lookup = self._look_up(digest)
        if lookup is None:
            raise ProblemError("overloaded", "Too many keys are being checked.")
        try:
            return await asyncio.shield(lookup)
        except self._faults as fault:
            if known is None or now_s >= known.fresh_until_s + GRACE_S:
                raise ProblemError("unavailable", "The key cannot be checked now.") from fault
            known.is_stale = True
            known.refresh_at_s = self._clock() + RETRY_S
            return known

    def _look_up(self, digest: bytes) -> asyncio.Task[Caller | None] | None:
        """One look-up per key at a time; None: there are too many."""
        task = self._lookups.get(digest)
        if task is None and len(self._lookups) < LOOKUPS_MAX:
            task = self._lookups[digest] = asyncio.create_task(self._renewed(digest))
            task.add_done_callback(lambda done: self._looked_up(digest, done))
        return task

    def _looked_up(self, digest: bytes, done: asyncio.Task[Caller | None]) -> None:
        del self._lookups[digest]
        if not done.cancelled():
            done.exception()  # a refresh in the background has nobody else to take it

    async def _renewed(self, digest: bytes) -> Caller | None:
        asked_s = self._clock()  # what the answer says was true no later than it comes
        principal = await self._find(digest)
        if principal is None:
            self._known.pop(digest, None)
            _make_room(self._unknown, UNKNOWN_MAX)
            self._unknown[digest] = asked_s + TTL_S
            return None
        caller = self._known.get(digest)
        if caller is None:
            _make_room(self._known, KNOWN_MAX)
            caller = self._known[digest] = Caller(principal, asked_s)
        else:
            caller.renew(principal, asked_s)
        self._unknown.pop(digest, None)
        return caller


def _believed_until_s(caller: Caller) -> float:
    return caller.fresh_until_s + (GRACE_S if caller.is_stale else 0.0)


def _make_room(entries: "dict[bytes, Caller] | dict[bytes, float]", maximum: int) -> None:
    if len(entries) >= maximum:
        del entries[next(iter(entries))]


def _unauthenticated(detail: str, error: bytes) -> ProblemError:
    """RFC 6750, section 3."""
    challenge = b'Bearer realm="waybill"' + error
    return ProblemError("unauthenticated", detail, headers=[(b"www-authenticate", challenge)])
