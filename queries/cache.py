"""What worker and readers agree on in Redis: channels, keys, and what a change does to them.

Readers fill (queries/shared_cache.py); the worker invalidates with `publish_changes`: tombstones
for documents, new epochs for pages, and the push, in one script.
"""

from functools import cache
from hashlib import sha1
from secrets import token_hex
from typing import Any, Final, cast
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

WAKE_CHANNEL: Final = "waybill:wake"  # web to worker: something was committed
APPLIED_CHANNEL: Final = "waybill:applied"  # worker to web: what the read models now contain
RESET_MESSAGE: Final = b'{"reset":true}'

# Random text, after the run id of the server. All other keys begin with `waybill:<era>:`. Whoever
# changes it publishes RESET_MESSAGE in the same script, and so does who finds it gone: then nobody
# has heard of a change, and looks for it in an era that it was not noted in.
ERA_KEY: Final = "waybill:era"

# ARGV[1] the message (see `publish_changes`). Keys are made from it, so this needs one server, not
# a cluster. A new order needs no tombstone: nobody can have read an older version. Nor does a tag
# need an epoch that no reader has asked for yet. So an order that is placed costs 2 us.
PUBLISH_CHANGES: Final = """
local message = cjson.decode(ARGV[1])
local era = redis.call('GET', 'waybill:era')
if era then
    local space = 'waybill:' .. era
    local clock = redis.call('TIME')
    local now = string.format('%s%06d', clock[1], clock[2])
    local function tombstone(order_id, version)
        local key = space .. ':order:' .. order_id
        local stored = redis.call('HGET', key, 'v')
        if not stored or tonumber(stored) < version then
            redis.call('DEL', key)
            redis.call('HSET', key, 'v', string.format('%d', version))
            redis.call('PEXPIRE', key, 60000)
        end
    end
    local function bump(tag)
        redis.call('SET', space .. ':epoch:' .. tag, now, 'XX', 'PX', 300000)
    end
    for _, order in ipairs(message.orders) do
        if order[2] > 1 then tombstone(order[1], order[2]) end
    end
    for _, customer_id in ipairs(message.customers) do bump('customer:' .. customer_id) end
    for _, sku in ipairs(message.skus) do bump('sku:' .. sku) end
    if #message.orders > 0 then bump('orders') end
    if #message.skus > 0 then bump('stock') end
else
    redis.call('PUBLISH', 'waybill:applied', '{"reset":true}')
end
return redis.call('PUBLISH', 'waybill:applied', ARGV[1])
"""


# KEYS[1] the era's key. ARGV: the new era, the channel, the message.
BEGIN_ERA: Final = """
redis.call('SET', KEYS[1], ARGV[1])
return redis.call('PUBLISH', ARGV[2], ARGV[3])
"""


async def publish_changes(redis: Redis, message: bytes) -> None:
    """Tell every reader what has changed: tombstones, epochs and then the push, in one script.

    Call it after the commit. `message` is JSON: {"lanes": [...], "models": [...], "snapshot": text,
    "orders": [[id, version], ...], "customers": [id, ...], "skus": [...], "parked": [[read model,
    aggregate, id], ...]}, at most 1,000 aggregates. All keys are needed, ids in lower case.

    Raises:
        redis.RedisError: perhaps published, perhaps not. Call `reset` once Redis answers again.
    """
    try:
        await _command(redis, "EVALSHA", digest(PUBLISH_CHANGES), 0, message)
    except NoScriptError:
        await _command(redis, "EVAL", PUBLISH_CHANGES, 0, message)


async def reset(redis: Redis) -> None:
    """Continuity was broken: start a new era, and have every reader drop what it holds.

    Raises:
        redis.RedisError: try again; until it succeeds readers may hold what is old.
    """
    era = await run_id(redis) + token_hex(4)
    await _command(redis, "EVAL", BEGIN_ERA, 1, ERA_KEY, era, APPLIED_CHANNEL, RESET_MESSAGE)


class Entry:
    """An answer ready to be sent. A page has no version (0); its owner is who it was asked for."""

    __slots__ = ("body", "customer_id", "etag", "next_cursor", "parked_at", "version")

    def __init__(
        self,
        body: bytes,
        *,
        version: int = 0,
        customer_id: UUID | None = None,
        next_cursor: str | None = None,
    ) -> None:
        self.body = body
        self.version = version
        self.etag = f'"v{version}"' if version else None
        self.customer_id = customer_id
        self.next_cursor = next_cursor
        self.parked_at: float | None = None  # seconds since 1970: it lacks what is parked since


async def run_id(redis: Redis) -> str:
    """Which run of which server this is: 40 hex digits."""
    answer = await _command(redis, "INFO", "server")
    return str(answer["run_id"])


@cache  # one per script of the read side
def digest(script: str) -> str:
    """The name by which EVALSHA knows a script."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


async def _command(redis: Redis, *words: str | bytes | int) -> Any:
    return await cast("Any", redis.execute_command)(*words)  # pyright: ignore[reportUnknownMemberType]
