"""The local tier of the read cache: bytes ready to send in this process's memory, and their fills.

An entry that is still here is current as far as its read model is announced (queries/freshness.py):
every push is carried out here before it is believed. That rests on three rules for fills:

- a fill is known by its key and tags before it asks anybody, so a push that comes while it is under
  way spoils it: its answer goes to those who asked before, and is neither stored nor joined;
- an order's fill is spoilt only by a version that it does not reach, so one that has read the new
  version before the push arrived is kept;
- of several fills of one key only the one begun last is stored, and none that was begun before the
  cache was last opened.
"""

from asyncio import Task
from collections import OrderedDict
from typing import Final, TypeVar

from queries.cache import Entry

ENTRIES_MAX: Final = 50_000
BYTES_MAX: Final = 64 * 1024 * 1024  # of bodies, keys, and what Python needs to hold them
ENTRY_BYTES: Final = 400  # of the latter, per entry
TAG_BYTES: Final = 200  # likewise, per tag


class Fill:
    """One look-up under way; its answer belongs to all who wait, so they shield it."""

    __slots__ = ("answer", "floor", "generation", "is_spoilt", "key", "past_caches", "tags")

    answer: Task[Entry | None]

    def __init__(
        self, key: str, tags: tuple[str, ...], *, generation: int, past_caches: bool
    ) -> None:
        self.key = key
        self.tags = tags
        self.generation = generation  # of what was applied when it began
        self.past_caches = past_caches  # it asks PostgreSQL and nobody else
        self.is_spoilt = False
        self.floor = 0  # the least version that is current


class LocalCache:
    """At most `entries_max` answers and `bytes_max`; the least recently used leave first."""

    def __init__(self, *, entries_max: int = ENTRIES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._tags: dict[str, tuple[str, ...]] = {}  # by key; an order has only its own key
        self._tagged: dict[str, set[str]] = {}  # keys, by tag
        self._fills: dict[str, Fill] = {}  # by key: the one begun last
        self._filling: dict[str, set[Fill]] = {}  # by key and tag: all under way
        self.is_open = False
        self.size_bytes = 0
        self.stale = 0  # fills that a push has spoilt
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def fill_under_way(self, key: str) -> Fill | None:
        """One that may be joined: nothing has changed since it began, as far as is announced."""
        fill = self._fills.get(key)
        return None if fill is None or fill.is_spoilt or fill.floor else fill

    def begin(self, fill: Fill) -> None:
        self._fills[fill.key] = fill
        for tag in (fill.key, *fill.tags):
            self._filling.setdefault(tag, set()).add(fill)

    def finish(self, fill: Fill, entry: Entry | None) -> None:
        """Store what was found, if it is known to be current. None: nothing, or a failure."""
        for tag in (fill.key, *fill.tags):
            _discard(self._filling, tag, fill)
        is_last = self._fills.get(fill.key) is fill
        if is_last:
            del self._fills[fill.key]
        if entry is None:
            return
        if fill.is_spoilt or entry.version < fill.floor:
            self.stale += 1
        elif is_last and self.is_open:
            self._store(fill.key, fill.tags, entry)

    def drop(self, tag: str, version: int | None = None) -> None:
        """Forget what carries this tag. An order's key is its tag; `version` is what it now has."""
        for fill in self._filling.get(tag, ()):
            if version is None:
                fill.is_spoilt = True
            else:
                fill.floor = max(fill.floor, version)
        entry = self._entries.get(tag)
        if entry is not None and (version is None or entry.version < version):
            self._remove(tag)
        for key in tuple(self._tagged.get(tag, ())):
            self._remove(key)

    def open(self) -> None:
        """Store from now on. What is under way was not watched, so it is not stored."""
        for fills in self._filling.values():
            for fill in fills:
                fill.is_spoilt = True
        self.is_open = True

    def close(self) -> None:
        self.is_open = False
        self._entries.clear()
        self._tags.clear()
        self._tagged.clear()
        self.size_bytes = 0

    def _store(self, key: str, tags: tuple[str, ...], entry: Entry) -> None:
        if key in self._entries:
            self._remove(key)
        self._entries[key] = entry
        self.size_bytes += _size_bytes(key, tags, entry)
        if tags:
            self._tags[key] = tags
            for tag in tags:
                self._tagged.setdefault(tag, set()).add(key)
        while len(self._entries) > self._entries_max or self.size_bytes > self._bytes_max:
            self._remove(next(iter(self._entries)))
            self.evictions += 1

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key)
        tags = self._tags.pop(key, ())
        self.size_bytes -= _size_bytes(key, tags, entry)
        for tag in tags:
            _discard(self._tagged, tag, key)


def _size_bytes(key: str, tags: tuple[str, ...], entry: Entry) -> int:
    return len(entry.body) + len(key) + ENTRY_BYTES + TAG_BYTES * len(tags)


T = TypeVar("T")


def _discard(index: dict[str, set[T]], tag: str, member: T) -> None:
    members = index[tag]
    members.discard(member)
    if not members:
        del index[tag]
