"""The rate limit: whole minutes of the database's clock, spent from shares leased in PostgreSQL.

A process leases a sixteenth of a key's quota at a time and spends it without asking anybody; what
is left dies with the window. So the requests let in over all processes never pass the quota while
PostgreSQL answers, and fall short of it by what idle processes hold. A share is topped up in the
background below a quarter of it, so a busy key waits for a round trip once a minute at most.

When PostgreSQL cannot be reached, reads go on (most need only the caches) with one share per minute
and process that nobody has granted; commands, which need PostgreSQL anyway, are answered 503.
"""

import asyncio
from collections.abc import Awaitable, Callable
from math import ceil
from time import monotonic
from typing import Final
from uuid import UUID

from app.http.problems import ProblemError
from commands.rate_limit import WINDOW, Lease

WINDOW_S: Final = int(WINDOW.total_seconds())
SHARES: Final = 16  # of a quota
LOW: Final = 4  # a share is topped up below a fourth of it
RETRY_S: Final = 0.5  # after a lease failed
LEASES_MAX: Final = 2 * SHARES  # that one request waits for, while others are faster each time

Ask = Callable[[UUID, int, int], Awaitable[Lease]]


class Allowance:
    """What this process may still let in for one key in the window that runs."""

    __slots__ = (
        "chunk",
        "ends_at_s",
        "is_leased",
        "key_id",
        "left_over",
        "low",
        "policy",
        "quota",
        "retry_at_s",
        "tokens",
        "topping_up",
        "unleased_until_s",
    )

    def __init__(self, key_id: UUID, quota: int) -> None:
        self.key_id = key_id
        self.tokens = 0
        self.ends_at_s = 0.0  # no later than the database's window; tokens die then
        self.retry_at_s = 0.0
        self.is_leased = True  # False: PostgreSQL could not be asked for these tokens
        self.unleased_until_s = 0.0
        self.topping_up: asyncio.Task[None] | None = None
        self.set_quota(quota)

    def set_quota(self, quota: int) -> None:
        """In requests per window."""
        self.quota = quota
        self.chunk = max(1, quota // SHARES)
        self.low = self.chunk // LOW
        self.left_over = quota  # that may be leased; what the last lease left
        self.policy = (b"ratelimit-policy", b'"default";q=%d;w=%d' % (quota, WINDOW_S))

    def begin_window(self) -> None:
        """The old tokens are dead, and nobody has told yet what of the quota is taken."""
        self.tokens = 0
        self.left_over = self.quota

    def header(self, now_s: float) -> tuple[bytes, bytes]:
        """The RateLimit field of draft-ietf-httpapi-ratelimit-headers.

        `r` is this process's view: its own tokens, and what the last lease left for everybody.
        """
        seconds = max(0, ceil(self.ends_at_s - now_s))
        remaining = self.tokens + self.left_over
        return (b"ratelimit", b'"default";r=%d;t=%d' % (remaining, seconds))


class Limiter:
    """Spends allowances and leases more. `ask` makes the round trip: key, quota, chunk.

    `faults` are the errors by which it says that PostgreSQL cannot be reached; `unleased` is told
    of each share that was taken without asking.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        faults: tuple[type[Exception], ...],
        unleased: Callable[[], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._ask = ask
        self._faults = faults
        self._unleased = unleased
        self._clock = clock

    async def spend(self, allowance: Allowance, *, is_read: bool) -> None:
        """Let one request in. Who finds more than `low` tokens before `ends_at_s` need not ask.

        Raises:
            ProblemError: rate-limited, unavailable.
        """
        for _ in range(LEASES_MAX):
            now_s = self._clock()
            if now_s >= allowance.ends_at_s:
                allowance.begin_window()
            if allowance.tokens:
                allowance.tokens -= 1
                wants_more = allowance.tokens <= allowance.low and allowance.left_over
                if wants_more and now_s >= allowance.retry_at_s:
                    self._top_up(allowance)
                return
            if not allowance.left_over:
                break
            if now_s >= allowance.retry_at_s:
                await asyncio.shield(self._top_up(allowance))
            if self._clock() < allowance.retry_at_s:
                self._do_without(allowance, is_read=is_read)
        raise _rate_limited(allowance, self._clock())

    def _do_without(self, allowance: Allowance, *, is_read: bool) -> None:
        """PostgreSQL cannot be asked: one share per window and process, for reads."""
        now_s = self._clock()
        if not is_read or now_s < allowance.unleased_until_s:
            raise ProblemError("unavailable", "The rate limit cannot be checked now.")
        allowance.is_leased = False
        allowance.tokens = allowance.chunk
        allowance.ends_at_s = allowance.unleased_until_s = now_s + WINDOW_S
        self._unleased()

    def _top_up(self, allowance: Allowance) -> asyncio.Task[None]:
        """One lease per key at a time."""
        task = allowance.topping_up
        if task is None or task.done():
            task = allowance.topping_up = asyncio.create_task(self._lease(allowance))
        return task

    async def _lease(self, allowance: Allowance) -> None:
        asked_s = self._clock()
        try:
            lease = await self._ask(allowance.key_id, allowance.quota, allowance.chunk)
        except self._faults:
            allowance.retry_at_s = self._clock() + RETRY_S
            return
        # The window's seconds are counted from before the request, so it ends here before it does
        # there; of two such ends of one window the later one is nearer to the truth.
        ends_at_s = asked_s + lease.ends_in_s
        if not allowance.is_leased or ends_at_s > allowance.ends_at_s + WINDOW_S / 2:
            allowance.is_leased = True
            allowance.tokens = 0
            allowance.ends_at_s = ends_at_s
        allowance.ends_at_s = max(allowance.ends_at_s, ends_at_s)
        allowance.tokens += lease.granted
        allowance.left_over = lease.left_over


def _rate_limited(allowance: Allowance, now_s: float) -> ProblemError:
    wait_s = max(1, ceil(allowance.ends_at_s - now_s))
    return ProblemError(
        "rate-limited",
        f"This key may send {allowance.quota} requests a minute; the next begins in {wait_s} s.",
        facts={"violated-policies": ["default"]},
        headers=[(b"retry-after", b"%d" % wait_s)],
    )
