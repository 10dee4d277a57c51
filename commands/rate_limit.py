"""Lease shares of a key's quota to processes: one row per key, one statement per lease.

The window is fixed: whole minutes of the database's clock. A process spends what it leased without
asking again, so the sum over all processes never passes the quota, and may stay below it by what
idle processes hold. No Redis takes part: the promise holds while there is none.
"""

from datetime import timedelta
from typing import Final
from uuid import UUID

from msgspec import Struct

from commands.command import Postgres

WINDOW: Final = timedelta(seconds=60)

# $1 key, $2 quota, $3 the chunk asked for, $4 the window. One row, locked until the statement's own
# transaction ends; the wait for it is bounded by lock_timeout. `leased` counts what was asked for,
# so it may pass the quota, by a chunk per process at most: a process that got nothing asks again in
# the next window only. Whoever waited for the row may find a window later than the one it computed
# (or the clock set back): the later window holds. Row: granted, left for others, seconds to go.
LEASE: Final = """
INSERT INTO rate_limit_windows AS held (key_id, window_start, leased)
VALUES ($1, date_bin($4, clock_timestamp(), 'epoch'), $3)
ON CONFLICT (key_id) DO UPDATE
SET window_start = greatest(held.window_start, excluded.window_start),
    leased = CASE WHEN held.window_start >= excluded.window_start THEN held.leased ELSE 0 END
             + excluded.leased
RETURNING least($3, greatest(0, $2 - (leased - $3))) AS granted,
          greatest(0, $2 - leased) AS left_over,
          extract(epoch FROM window_start + $4 - clock_timestamp())::float8 AS ends_in_s
"""


class Lease(Struct, frozen=True):
    """A share of a window's quota. Its seconds count from before the request for it was sent."""

    granted: int
    left_over: int  # not yet leased to anybody
    ends_in_s: float


async def lease(postgres: Postgres, *, key_id: UUID, quota: int, chunk: int) -> Lease:
    """Take up to `chunk` requests of the key's current window, in a transaction of its own.

    Raises:
        asyncpg.ForeignKeyViolationError: the key is gone.
    """
    row = await postgres.fetchrow(LEASE, key_id, quota, chunk, WINDOW)
    assert row is not None
    return Lease(*row)
