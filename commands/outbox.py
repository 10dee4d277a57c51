"""Append events in the caller's transaction. The only writer of the outbox."""

from collections.abc import Sequence
from typing import Final
from zlib import crc32

import msgspec

from commands.command import Connection
from commands.events import Event

LANES: Final = 16  # an aggregate's events share a lane; workers share out the lanes

# $1..$9 arrays of one length, one element per event. Rows = events. The caller holds the lock of
# every aggregate named, so ids ascend within an aggregate (docs/decisions/0002-snapshot-cursor.md).
APPEND_EVENTS: Final = """
INSERT INTO outbox (lane, aggregate, aggregate_id, aggregate_version, type, data, actor,
                    traceparent, occurred_at)
SELECT *
FROM unnest($1::smallint[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::jsonb[],
            $7::text[], $8::text[], $9::timestamptz[])
"""


class Cause:
    """Who made an event happen, and in which trace."""

    __slots__ = ("actor", "traceparent")

    def __init__(self, actor: str, traceparent: str | None) -> None:
        self.actor = actor
        self.traceparent = traceparent


def lane_of(aggregate_id: str) -> int:
    return crc32(aggregate_id.encode()) % LANES


async def append(connection: Connection, events: Sequence[tuple[Event, Cause]]) -> None:
    """Append `events` in order: within an aggregate by version. The transaction is the caller's."""
    assert connection.is_in_transaction()
    if not events:
        return
    ids = [event.aggregate_id for event, _ in events]
    await connection.execute(
        APPEND_EVENTS,
        [crc32(aggregate_id.encode()) % LANES for aggregate_id in ids],
        [event.aggregate for event, _ in events],
        ids,
        [event.version for event, _ in events],
        [event.type for event, _ in events],
        [encode(event) for event, _ in events],
        [cause.actor for _, cause in events],
        [cause.traceparent for _, cause in events],
        [event.occurred_at for event, _ in events],
    )


_encoder: Final = msgspec.json.Encoder()


def encode(event: Event) -> str:
    """The event's data as JSON; type, aggregate and version stand in columns of their own too."""
    return _encoder.encode(event).decode()
