"""What a read model contains, as PostgreSQL's own snapshots say it, per lane."""

from functools import lru_cache
from typing import TypeAlias


class Snapshot:
    """A `pg_snapshot`: which transactions it contains (PostgreSQL, 9.28.10)."""

    __slots__ = ("in_flight", "order", "xmax", "xmin")

    def __init__(self, text: str) -> None:
        xmin, xmax, in_flight = text.split(":")
        self.xmin = int(xmin)
        self.xmax = int(xmax)
        self.in_flight = frozenset(int(xid) for xid in in_flight.split(",") if xid)
        # Of two snapshots of one server the later contains the earlier: its xmax or xmin is
        # greater, or, both being equal, fewer transactions are in flight.
        self.order = (self.xmax, self.xmin, -len(self.in_flight))

    def __contains__(self, xid: int) -> bool:
        return xid < self.xmin or (xid < self.xmax and xid not in self.in_flight)


@lru_cache(maxsize=256)  # 16 lanes of a few read models, most of them at one snapshot
def parse(text: str) -> Snapshot:
    return Snapshot(text)


Heads: TypeAlias = dict[int, Snapshot]  # by lane


class Reach:
    """How far the lanes of one read model are. Forward only."""

    __slots__ = ("_floor", "_heads", "is_complete", "lanes")

    def __init__(self) -> None:
        self.lanes: Heads = {}
        self.is_complete = False  # whether a poll has told which lanes there are
        self._heads: tuple[Snapshot, ...] = ()
        self._floor = 0

    def __contains__(self, xid: int) -> bool:
        """Whether every lane has this transaction: a token does not say which lane it is about."""
        return self.is_complete and (
            xid < self._floor or all(xid in snapshot for snapshot in self._heads)
        )

    def advance(self, heads: Heads) -> bool:
        """Take note of these lanes, ignoring what is older. True if anything has moved."""
        moved = False
        for lane, snapshot in heads.items():
            known = self.lanes.get(lane)
            if known is None or snapshot.order > known.order:
                self.lanes[lane] = snapshot
                moved = True
        if moved:
            self._heads = tuple({each.order: each for each in self.lanes.values()}.values())
            self._floor = min(snapshot.xmin for snapshot in self._heads)
        return moved


def covers(mine: Heads, others: Heads) -> bool:
    """Whether every lane of `others` is in `mine`, and as far."""
    return all(lane in mine and mine[lane].order >= head.order for lane, head in others.items())
