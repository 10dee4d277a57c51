"""The limiter and the look-up of keys, with a clock and a database that do as they are told."""

import asyncio
from uuid import uuid4

import pytest

from app.http.callers import GRACE_S, TTL_S, UNKNOWN_MAX, Callers
from app.http.limiter import Allowance, Limiter
from app.http.problems import ProblemError
from commands.command import Principal
from commands.rate_limit import Lease


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Database:
    """Windows of 60 s that begin at multiples of 60; `skew_s` is how long a round trip takes."""

    def __init__(self, clock: Clock, quota: int, *, skew_s: float = 0.0) -> None:
        self.clock = clock
        self.quota = quota
        self.skew_s = skew_s
        self.is_away = False
        self.asked = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.leased: dict[int, int] = {}

    async def lease(self, _key: object, _quota: int, chunk: int) -> Lease:
        self.asked += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        if self.is_away:
            raise OSError
        self.clock.now_s += self.skew_s
        window = int(self.clock.now_s // 60)
        granted = min(chunk, self.quota - self.leased.get(window, 0))
        self.leased[window] = self.leased.get(window, 0) + granted
        ends_in_s = 60 * (window + 1) - self.clock.now_s
        return Lease(granted, self.quota - self.leased[window], ends_in_s)


def process(clock: Clock, database: Database) -> tuple[Limiter, Allowance]:
    limiter = Limiter(database.lease, faults=(OSError,), unleased=lambda: None, clock=clock)
    return limiter, Allowance(uuid4(), database.quota)


async def admitted(limiter: Limiter, allowance: Allowance, requests: int, **how: bool) -> int:
    count = 0
    for _ in range(requests):
        try:
            await limiter.spend(allowance, is_read=how.get("is_read", True))
        except ProblemError:
            continue
        count += 1
    return count


@pytest.mark.parametrize("quota", [1, 2, 15, 16, 17, 600])
async def test_a_quota_is_spent_to_the_last(quota: int) -> None:
    clock = Clock()
    limiter, allowance = process(clock, Database(clock, quota))
    assert await admitted(limiter, allowance, 2 * quota + 5) == quota
    clock.now_s += 60
    assert await admitted(limiter, allowance, 2 * quota + 5) == quota


async def test_processes_share_a_quota() -> None:
    clock = Clock()
    database = Database(clock, 160)
    processes = [process(clock, database) for _ in range(3)]
    total = 0
    for _ in range(100):
        for limiter, allowance in processes:
            total += await admitted(limiter, allowance, 1)
    assert 160 - 2 * 10 <= total <= 160


async def test_processes_that_share_nothing_are_found_out() -> None:
    clock = Clock()
    processes = [process(clock, Database(clock, 160)) for _ in range(2)]
    total = sum([await admitted(*each, 200) for each in processes])
    assert total == 320, "the tests above would see it"


async def test_a_busy_key_does_not_wait() -> None:
    clock = Clock()
    database = Database(clock, 1600)
    limiter, allowance = process(clock, database)
    await limiter.spend(allowance, is_read=True)
    for _ in range(1000):
        assert allowance.tokens > 0
        await limiter.spend(allowance, is_read=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert database.asked <= 12


async def test_one_lease_at_a_time() -> None:
    clock = Clock()
    database = Database(clock, 64)
    limiter, allowance = process(clock, database)
    spent = await asyncio.gather(
        *(limiter.spend(allowance, is_read=True) for _ in range(200)), return_exceptions=True
    )
    assert sum(each is None for each in spent) == 64
    assert database.most_in_flight == 1


async def test_tokens_die_with_their_window_even_when_the_lease_was_slow() -> None:
    clock = Clock()
    clock.now_s = 1019.0
    database = Database(clock, 16, skew_s=0.4)
    limiter, allowance = process(clock, database)
    await limiter.spend(allowance, is_read=True)
    allowance.tokens = 5
    assert allowance.ends_at_s < 1020.0
    clock.now_s = 1020.0
    await limiter.spend(allowance, is_read=True)
    assert database.leased[17] >= 1, "the request at 1020 s was paid for by its own window"


async def test_without_postgresql_reads_have_a_share_and_commands_none() -> None:
    clock = Clock()
    database = Database(clock, 160)
    database.is_away = True
    limiter, allowance = process(clock, database)
    assert await admitted(limiter, allowance, 5, is_read=False) == 0
    assert await admitted(limiter, allowance, 50, is_read=True) == 10
    clock.now_s += 30
    assert await admitted(limiter, allowance, 50, is_read=True) == 0
    clock.now_s += 31
    assert await admitted(limiter, allowance, 50, is_read=True) == 10
    database.is_away = False
    clock.now_s += 1
    assert await admitted(limiter, allowance, 500, is_read=True) == 160


async def test_while_postgresql_is_away_it_is_asked_twice_a_second_at_most() -> None:
    clock = Clock()
    database = Database(clock, 160)
    database.is_away = True
    limiter, allowance = process(clock, database)
    await admitted(limiter, allowance, 1000, is_read=False)
    assert database.asked == 1


def principal(quota: int = 600) -> Principal:
    return Principal(uuid4(), "tests", frozenset(), None, quota)


class Keys:
    """Keys that are good, and how often somebody asked."""

    def __init__(self) -> None:
        self.good: dict[bytes, Principal] = {}
        self.asked = 0
        self.is_away = False

    async def find(self, digest: bytes) -> Principal | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise OSError
        return next(iter(self.good.values()), None) if self.good else self.good.get(digest)


async def test_a_key_is_looked_up_once_at_a_time_and_then_remembered() -> None:
    clock, keys = Clock(), Keys()
    keys.good[b""] = principal()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    assert callers.at_hand(b"Bearer k", clock.now_s) is None
    found = await asyncio.gather(*(callers.identify(b"Bearer k") for _ in range(50)))
    assert (keys.asked, len(set(found))) == (1, 1)
    assert callers.at_hand(b"bearer k", clock.now_s) is found[0]


async def test_a_busy_key_is_refreshed_before_it_is_due() -> None:
    clock, keys = Clock(), Keys()
    keys.good[b""] = principal()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    caller = await callers.identify(b"Bearer k")
    clock.now_s += TTL_S - 1
    keys.good[b""] = principal(60)
    assert callers.at_hand(b"Bearer k", clock.now_s) is None
    assert await callers.identify(b"Bearer k") is caller
    assert caller.principal.requests_per_minute == 600
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert caller.principal.requests_per_minute == 60
    assert caller.allowance.policy[1] == b'"default";q=60;w=60'


async def test_a_revoked_key_is_refused_within_its_time() -> None:
    clock, keys = Clock(), Keys()
    keys.good[b""] = principal()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    await callers.identify(b"Bearer k")
    keys.good.clear()
    clock.now_s += TTL_S
    with pytest.raises(ProblemError, match="unauthenticated"):
        await callers.identify(b"Bearer k")


async def test_an_unknown_key_is_remembered_too_and_they_are_not_many() -> None:
    clock, keys = Clock(), Keys()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    for _ in range(3):
        with pytest.raises(ProblemError, match="unauthenticated"):
            await callers.identify(b"Bearer k")
    assert keys.asked == 1
    for number in range(UNKNOWN_MAX + 10):
        with pytest.raises(ProblemError):
            await callers.identify(b"Bearer %d" % number)
    assert len(callers._unknown) == UNKNOWN_MAX  # pyright: ignore[reportPrivateUsage]


async def test_a_flood_of_invented_keys_is_shed() -> None:
    clock, keys = Clock(), Keys()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    outcomes = await asyncio.gather(
        *(callers.identify(b"Bearer %d" % number) for number in range(200)), return_exceptions=True
    )
    codes = [outcome.code for outcome in outcomes if isinstance(outcome, ProblemError)]
    assert set(codes) == {"unauthenticated", "overloaded"}
    assert keys.asked <= 64


async def test_a_key_that_was_good_stays_so_while_nobody_can_be_asked() -> None:
    clock, keys = Clock(), Keys()
    keys.good[b""] = principal()
    callers = Callers(keys.find, faults=(OSError,), clock=clock)
    caller = await callers.identify(b"Bearer k")
    keys.is_away = True
    clock.now_s += TTL_S + 1
    assert await callers.identify(b"Bearer k") is caller
    asked = keys.asked
    clock.now_s += 1
    assert await callers.identify(b"Bearer k") is caller
    assert keys.asked == asked, "nobody waits for PostgreSQL twice"
    with pytest.raises(ProblemError, match="unavailable"):
        await callers.identify(b"Bearer another")
    clock.now_s += GRACE_S
    with pytest.raises(ProblemError, match="unavailable"):
        await callers.identify(b"Bearer k")
