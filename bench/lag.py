"""Projection lag: from the commit of a command to the first read that shows it, as an interval.

The client sees neither moment. The commit lies between the command's sending and its answer; the
write became visible between the sending of the last read that did not show it and the receipt of
the first that did. So

    low  = max(0, last blind read sent - command answered)     the lag was at least this
    high = first seeing read received - command sent           and at most this

and the polling interval is no part of either claim. A write never seen has no upper bound: its
`high` is infinite, and its `low` says how long it was looked for. FAIL is judged on low, PASS on
high.

One read that the server holds until the write is visible (`Prefer: wait`) gives `high` at the price
of one request. `low` comes from witnesses: reads that do not wait, sent only while the first is
held.
"""

import math
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

WITNESS_FIRST_S: Final = 0.016  # most writes are seen before, and cost no witness at all
WITNESS_GROWTH: Final = 1.5  # so low is at least two thirds of the lag, less a round trip
WITNESSES_MAX: Final = 16  # 16 ms x 1.5^15 = 7 s


class Lag(NamedTuple):
    """One interval, in milliseconds. `due` is when its command was due, on time.monotonic()."""

    due: float
    low_ms: float
    high_ms: float  # inf: not seen while it was looked for


class Sighting:
    """What the reads after one command have shown so far."""

    def __init__(self, *, sent: float, acked: float) -> None:
        self._sent = sent
        self._acked = acked
        self._last_blind = acked
        self._first_seen = math.inf
        self.is_over = False  # nobody looks any more

    def blind(self, sent: float) -> None:
        """Take note of a read, sent then, that did not show the write."""
        self._last_blind = max(self._last_blind, sent)

    def seen(self, received: float) -> None:
        """Take note of a read, answered then, that showed it."""
        self._first_seen = min(self._first_seen, received)

    def witness_times(self) -> Iterator[float]:
        """When a still unseen write is worth a read that does not wait."""
        for number in range(WITNESSES_MAX):
            yield self._acked + WITNESS_FIRST_S * WITNESS_GROWTH**number

    def interval_ms(self) -> tuple[float, float]:
        # A blind read can be sent while the seeing one is on its way back, never after it.
        low = min(self._last_blind, self._first_seen) - self._acked
        return low * 1000, (self._first_seen - self._sent) * 1000


class Lags:
    """The intervals of one run, as raw columns of 24 bytes a row."""

    def __init__(self) -> None:
        self._due = array("d")
        self._low_ms = array("d")
        self._high_ms = array("d")
        self.witnesses = 0  # reads sent besides those that are recorded

    def __len__(self) -> int:
        return len(self._due)

    def add(self, due: float, sighting: Sighting) -> None:
        low_ms, high_ms = sighting.interval_ms()
        self._due.append(due)
        self._low_ms.append(low_ms)
        self._high_ms.append(high_ms)

    def __iter__(self) -> Iterator[Lag]:
        return map(Lag, self._due, self._low_ms, self._high_ms)
