"""What happened to each request, as raw columns: exact quantiles, exact counts, nothing left out.

A row costs 30 bytes; a run of a million arrivals 30 MB. Times are time.monotonic() in seconds.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from bench.slo import OPERATIONS

# Outcomes below 100 have no HTTP status. None of them is ever a good event.
DROPPED: Final = 0  # never sent: as many in flight as allowed
CANCELLED: Final = 1  # in flight when the run was stopped
TIMED_OUT: Final = 2
BROKEN: Final = 3  # no connection, or it was lost
WRONG: Final = 4  # an answer that does not fit the request

OUTCOME_NAMES: Final = {
    DROPPED: "dropped",
    CANCELLED: "cancelled",
    TIMED_OUT: "timed out",
    BROKEN: "connection broken",
    WRONG: "wrong answer",
}

_OPERATION_INDEX: Final = {operation: index for index, operation in enumerate(OPERATIONS)}


class Row(NamedTuple):
    """One request. A dropped one has neither start nor end (nan)."""

    due: float  # when it should have been sent
    start: float
    end: float
    operation: str
    outcome: int  # an HTTP status, or one of the constants above

    @property
    def answered(self) -> bool:
        return self.outcome >= 100

    @property
    def lateness_ms(self) -> float:
        """From due to start: the generator's fault."""
        return (self.start - self.due) * 1000

    @property
    def service_ms(self) -> float:
        """From start to answer: at least what a user felt."""
        return (self.end - self.start) * 1000

    @property
    def response_ms(self) -> float:
        """From due to answer: at most what a user felt."""
        return (self.end - self.due) * 1000


class Recorder:
    """The record of one run. `sent` and the rows are counted apart, so that a lost row shows."""

    def __init__(self) -> None:
        self.planned = 0  # arrivals that have come due so far, or should have
        self.arrived = 0  # planned arrivals that were sent or dropped
        self.sent = 0  # requests, with those that follow an arrival
        self._due = array("d")
        self._start = array("d")
        self._end = array("d")
        self._operation = array("B")
        self._outcome = array("H")

    def __len__(self) -> int:
        return len(self._due)

    def drop(self, operation: str, due: float) -> None:
        self._append(operation, due, math.nan, math.nan, DROPPED)

    def finish(self, operation: str, due: float, start: float, end: float, outcome: int) -> None:
        """Record how a request that was counted as sent has ended."""
        self._append(operation, due, start, end, outcome)

    def _append(self, operation: str, due: float, start: float, end: float, outcome: int) -> None:
        self._due.append(due)
        self._start.append(start)
        self._end.append(end)
        self._operation.append(_OPERATION_INDEX[operation])
        self._outcome.append(outcome)

    def rows(self, first: int = 0) -> Iterator[Row]:
        """All rows from number `first`, in the order in which they ended."""
        for index in range(first, len(self._due)):
            yield Row(
                self._due[index],
                self._start[index],
                self._end[index],
                OPERATIONS[self._operation[index]],
                self._outcome[index],
            )

    def conserves(self) -> bool:
        """Tell whether sent == done + failed + cancelled: one row for every request sent."""
        return self.sent == len(self) - self._outcome.count(DROPPED)


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """Return the nearest-rank quantile of sorted values, or None when too few lie beyond it.

    At least 10 / (1 - q) values: with fewer, less than ten events decide the figure.
    """
    if len(ordered) < quantile_events_min(q):
        return None
    return ordered[math.ceil(q * len(ordered)) - 1]


def quantile_events_min(q: float) -> int:
    """Fewest values from which a quantile is given: 20 for 0.5, 200 for 0.95, 1000 for 0.99."""
    return round(10 / (1 - q))
