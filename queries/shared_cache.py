"""The shared tier of the read cache, in Redis: what readers look up and fill there.

Nothing old can be put back, whatever is slow, lost or evicted:

- *A slow reader.* A document is stored only if no newer version stands there; a change leaves a
  tombstone with its version and no body, which lives 60 s, longer than any fill (FILL_MAX_S in
  queries/read_side.py). A page has no version. It is fenced by the epochs of its tags: they are
  read in one script with the look-up, before PostgreSQL is; the page is stored with them, and
  served only while they stand.
- *A change between two readers.* Tombstones, epochs and the message are one script, so whoever has
  received the message finds no older body. There is no local copy of an epoch that could lag.
- *An epoch that was evicted or has expired.* An epoch is the server's clock in microseconds, never
  a count, so a new one differs from every one before: pages of the old are dead, not revived.
- *A flush, a restart with old data, a fail-over.* Every key carries the era, which begins with the
  server's run id. A store is refused when its era, taken before PostgreSQL was read, is not the
  current one. Whoever changes the era, or would have to note a change and finds no era, pushes a
  reset before anything else; readers then take up the era anew, as they do after each reconnect.
- *A worker that could not publish.* It begins a new era (`reset`) as soon as it can.
"""

from asyncio import Future, Task, create_task, gather, get_running_loop, timeout
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from random import random
from secrets import token_hex
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from queries.cache import APPLIED_CHANNEL, ERA_KEY, RESET_MESSAGE, Entry, digest, run_id

BODY_TTL_S: Final = 60.0
BODY_TTL_JITTER_S: Final = 6.0  # so that what was filled together does not expire together
COMMAND_TIMEOUT_S: Final = 0.1  # per pipeline; PostgreSQL answers sooner than a slower Redis
CIRCUIT_OPEN_S: Final = 1.0
OPEN_TIMEOUT_S: Final = 1.0
BATCH_MAX: Final = 100  # commands per pipeline: 1 ms of this process, and some 0.5 MB
ASKS_MAX: Final = 1_000  # commands that wait for the next pipelines; what comes then misses
OTHER_ERA: Final = -1  # what a store answers when its era is not the current one

# KEYS[1] the era's key. ARGV: the server's run id, random text, the channel, the message. Returns
# the era, or nothing if it had to be made: everybody then hears a reset. One of another run is
# replaced: this server was restarted, perhaps with old data, or is another server.
TAKE_UP_ERA: Final = """
local era = redis.call('GET', KEYS[1])
if not era or string.sub(era, 1, #ARGV[1]) ~= ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2])
    redis.call('PUBLISH', ARGV[3], ARGV[4])
    return false
end
return era
"""

# KEYS: the era's key, the order's. ARGV: era, version, body, customer, milliseconds to live.
# Returns 1, 0 (something newer stands there) or -1 (the era is another).
STORE_ORDER: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
local stored = redis.call('HGET', KEYS[2], 'v')
if stored and tonumber(stored) > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[2], 'v', ARGV[2], 'b', ARGV[3], 'c', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
"""

# KEYS: the page's, then its tags' epochs (at most 101). Returns {fence} or {fence, body, cursor}.
# A missing epoch is made now, so that every fence holds a time that never comes again, and so that
# the worker moves it.
READ_PAGE: Final = """
local clock = redis.call('TIME')
local now = string.format('%s%06d', clock[1], clock[2])
local epochs = {}
for i = 2, #KEYS do
    local epoch = redis.call('GET', KEYS[i])
    if not epoch then
        epoch = now
        redis.call('SET', KEYS[i], epoch, 'PX', 300000)
    end
    epochs[i - 1] = epoch
end
local fence = table.concat(epochs, ',')
local page = redis.call('HMGET', KEYS[1], 'e', 'b', 'n')
if page[1] == fence then return {fence, page[2], page[3]} end
return {fence}
"""

# KEYS: the era's key, the page's. ARGV: era, fence, body, cursor, milliseconds to live. Returns 1
# or -1 (the era is another). The fence needs no check: a page under an older one is not served.
STORE_PAGE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[2], 'e', ARGV[2], 'b', ARGV[3], 'n', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
"""


class Ask(NamedTuple):
    """One command: a script with its keys and arguments, or the words of a plain one."""

    script: str | None
    words: tuple[str | bytes | int, ...]
    answer: Future[Any] | None  # None: nobody waits


class SharedCache:
    """What this process does with the shared tier: one pipeline at a time.

    While one is under way the next gathers, which costs a third of a round trip per command.
    Errors never come out: a look-up misses, a store is dropped. After an error nobody asks for
    CIRCUIT_OPEN_S; then one asks, and the others miss until that is answered. So a dead Redis
    costs a few reads one time limit each second, and the rest nothing.
    """

    def __init__(self, redis: Redis, *, clock: Callable[[], float] = monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._era: str | None = None
        self._closed_until_s = 0.0
        self._asks: list[Ask] = []
        self._sending: Task[None] | None = None
        self.hits = 0
        self.misses = 0
        self.errors = 0

    @property
    def era(self) -> str | None:
        """None: not in use. Take it before reading PostgreSQL, and give it back when storing."""
        return self._era

    async def open(self) -> bool:
        """Take up the era. False: it had to be made; a reset is on its way to everybody.

        Raises:
            redis.RedisError, OSError, TimeoutError: the tier stays out of use.
        """
        async with timeout(OPEN_TIMEOUT_S):
            arguments = (await run_id(self._redis), token_hex(4), APPLIED_CHANNEL, RESET_MESSAGE)
            (era,) = await self._send([("EVAL", TAKE_UP_ERA, 1, ERA_KEY, *arguments)])
        if isinstance(era, RedisError):
            raise era
        self._era = None if era is None else era.decode()
        self._closed_until_s = 0.0
        return era is not None

    def close(self) -> None:
        """Stop using it; look-ups under way still end."""
        self._era = None

    async def aclose(self) -> None:
        """End what is under way."""
        self.close()
        if self._sending is not None:
            self._sending.cancel()
            await gather(self._sending, return_exceptions=True)

    async def find_order(self, era: str, order_id: UUID) -> Entry | None:
        """The order's document, or None if the tier has none that is current."""
        found = await self._ask(None, "HMGET", _order_key(era, order_id), "v", "b", "c")
        if found is None or found[1] is None:
            self.misses += 1
            return None
        self.hits += 1
        version, body, customer_id = found
        return Entry(body, version=int(version), customer_id=UUID(customer_id.decode()))

    def store_order(self, era: str, order_id: UUID, entry: Entry) -> None:
        """Keep the document, unless a newer version or its tombstone stands there."""
        arguments = (era, entry.version, entry.body, str(entry.customer_id), _ttl_ms())
        self._put(STORE_ORDER, 2, ERA_KEY, _order_key(era, order_id), *arguments)

    async def find_page(
        self, era: str, key: str, tags: Sequence[str]
    ) -> tuple[bytes | None, Entry | None]:
        """The page, if it is current, and the fence to store it under; (None, None) on an error."""
        keys = (_page_key(era, key), *_epoch_keys(era, tags))
        found = await self._ask(READ_PAGE, len(keys), *keys)
        if found is None or len(found) == 1:
            self.misses += 1
            return (None if found is None else found[0]), None
        self.hits += 1
        fence, body, cursor = found
        return fence, Entry(body, next_cursor=cursor.decode() or None)

    def store_page(self, era: str, key: str, fence: bytes, entry: Entry) -> None:
        """Keep the page under the fence that `find_page` gave before it was read."""
        arguments = (era, fence, entry.body, entry.next_cursor or "", _ttl_ms())
        self._put(STORE_PAGE, 2, ERA_KEY, _page_key(era, key), *arguments)

    async def _ask(self, script: str | None, *words: str | bytes | int) -> Any:
        """The answer, or None: Redis is away or slow, was so a moment ago, or is asked too much."""
        answer: Future[Any] = get_running_loop().create_future()
        return await answer if self._enqueue(Ask(script, words, answer)) else None

    def _put(self, script: str, *words: str | bytes | int) -> None:
        self._enqueue(Ask(script, words, None))

    def _enqueue(self, ask: Ask) -> bool:
        now_s = self._clock()
        if now_s < self._closed_until_s or len(self._asks) >= ASKS_MAX:
            return False
        if self._closed_until_s:
            self._closed_until_s = now_s + CIRCUIT_OPEN_S  # the others miss until this is answered
        self._asks.append(ask)
        if self._sending is None:
            self._sending = create_task(self._send_all())
        return True

    async def _send_all(self) -> None:
        try:
            while self._asks:
                batch, self._asks = self._asks[:BATCH_MAX], self._asks[BATCH_MAX:]
                await self._exchange(batch)
        finally:
            self._sending = None
            for ask in self._asks:
                _tell(ask, None)
            self._asks.clear()

    async def _exchange(self, batch: list[Ask]) -> None:
        """Send a batch and tell who waits for it; if it fails, who waits for the next one too."""
        answers: list[Any] = [None] * len(batch)
        try:
            async with timeout(COMMAND_TIMEOUT_S):
                answers = await self._send([_by_digest(ask) for ask in batch])
                for place, answer in enumerate(answers):
                    if isinstance(answer, NoScriptError):
                        (answers[place],) = await self._send([_by_text(batch[place])])
        except (RedisError, OSError, TimeoutError):
            self._fail()
        else:
            self._closed_until_s = 0.0
            if any(isinstance(answer, RedisError) for answer in answers):
                self._fail()
        finally:
            for ask, answer in zip(batch, answers, strict=True):
                _tell(ask, None if isinstance(answer, RedisError) else answer)
        if OTHER_ERA in answers and self._era is not None:
            self.close()  # a reset is on its way, or will be when the era is made
            with suppress(RedisError, OSError, TimeoutError):
                await self.open()

    async def _send(self, commands: list[tuple[str | bytes | int, ...]]) -> list[Any]:
        pipeline: Any = self._redis.pipeline(transaction=False)
        for words in commands:
            pipeline.execute_command(*words)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    def _fail(self) -> None:
        self.errors += 1
        self._closed_until_s = self._clock() + CIRCUIT_OPEN_S
        waiting, self._asks = self._asks, []
        for ask in waiting:
            _tell(ask, None)


def _by_digest(ask: Ask) -> tuple[str | bytes | int, ...]:
    return ask.words if ask.script is None else ("EVALSHA", digest(ask.script), *ask.words)


def _by_text(ask: Ask) -> tuple[str | bytes | int, ...]:
    assert ask.script is not None
    return ("EVAL", ask.script, *ask.words)


def _tell(ask: Ask, answer: Any) -> None:
    if ask.answer is not None and not ask.answer.done():
        ask.answer.set_result(answer)


def _order_key(era: str, order_id: UUID) -> str:
    return f"waybill:{era}:order:{order_id}"


def _page_key(era: str, key: str) -> str:
    # A canonical query may be 7 KB long (100 skus of 64 characters); 128 bits tell them apart.
    return f"waybill:{era}:page:{blake2b(key.encode(), digest_size=16).hexdigest()}"


def _epoch_keys(era: str, tags: Sequence[str]) -> list[str]:
    return [f"waybill:{era}:epoch:{tag}" for tag in tags]


def _ttl_ms() -> int:
    return int(1000 * (BODY_TTL_S + BODY_TTL_JITTER_S * random()))  # noqa: S311 (no secret)
