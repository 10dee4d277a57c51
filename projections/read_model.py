"""What a read model is made of: the events it follows, and its SQL. Nothing runs here."""

from collections.abc import Callable
from typing import Final, LiteralString, get_args

from msgspec import Struct

from commands.events import AnyEvent

EVENTS: Final[tuple[type[AnyEvent], ...]] = get_args(AnyEvent)
EVENT_TYPES: Final = frozenset(event.type for event in EVENTS)


class ReadModel(Struct, frozen=True, kw_only=True):
    """One read table, and how it is kept. Its `name` is the table's.

    `listens_to` decides for every event: what it does not listen to is named in the type of a
    variable, so that an event that is new is a type error until each read model has decided.

    `apply` are statements without parameters, run in order on the temporary table `batch`
    (projections/outbox.py), which may hold several events of an aggregate, and events that are not
    ours. Each must be harmless when it is run again: the row's version guards it.

    `bootstrap` fills the table from the normalized tables, and `clear` empties it; both take
    `$1 text[]`, the ids of the aggregates whose rows are meant, or null for all. `bootstrap`
    answers with the snapshot it saw.

    `audit` compares a stretch of rows with the normalized tables: `$1 text` is the id of the
    aggregate after which it begins, `$2 text` that of its last one (null: from the start, to the
    end), `$3 text[]` ids to leave out, `$4 integer` how many differences at most. Rows: id, the row
    as it should be and as it is, in JSON, one of them null where there is no such row. `stretch`
    finds a last one: parameters `$1 text`, the same, and `$2 integer`, how many aggregates at most;
    one row, how many there are, and the id of the last.
    """

    name: str
    version: int  # one more whenever the same events give other rows; the table is then rebuilt
    listens_to: Callable[[type[AnyEvent]], bool]
    apply: tuple[LiteralString, ...]
    clear: LiteralString
    bootstrap: LiteralString
    stretch: LiteralString
    audit: LiteralString

    @property
    def events(self) -> frozenset[str]:
        """The types of the events it follows."""
        return frozenset(event.type for event in EVENTS if self.listens_to(event))
