"""The vocabulary of the write side: commands, who submits them, and what comes out."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Generic, TypeAlias, TypeVar
from uuid import UUID

from msgspec import Meta, Struct

from commands.events import Event
from commands.refusals import Refusal

if TYPE_CHECKING:
    from asyncpg import Pool, Record
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[Record]
    Postgres: TypeAlias = Pool[Record]
else:  # asyncpg's generics exist for the type checkers only
    Connection = Postgres = object

# PostgreSQL's text takes no NUL, and no name or reason needs a control character. Each pattern ends
# with `$(?!\n)`, because Python's `$` alone also matches before a final newline.
Text = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")]
Sku = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)")]
Location = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)")]
Email = Annotated[
    str, Meta(max_length=254, pattern=r"^[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+$(?!\n)")
]
Currency = Annotated[str, Meta(pattern=r"^[A-Z]{3}$(?!\n)")]  # ISO 4217
Quantity = Annotated[int, Meta(ge=1, le=1_000_000)]
Cents = Annotated[int, Meta(ge=0, le=10**17)]  # minor units: 100 lines x 10^6 x 10^9
UnitPrice = Annotated[int, Meta(ge=0, le=10**9)]  # minor units

DEFAULT_LOCATION = "main"


class Command(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client asks for. The name of the class is the use case."""


C_co = TypeVar("C_co", bound=Command, covariant=True)


class Principal(Struct, frozen=True):
    """Who asks. `customer_id` is set for a storefront key, which acts for that customer alone."""

    key_id: UUID
    owner: str
    scopes: frozenset[str]
    customer_id: UUID | None
    requests_per_minute: int


class Submission(Struct, Generic[C_co], frozen=True):
    """One command on its way: what the client asked, and what the edge adds."""

    command: C_co
    principal: Principal
    idempotency_key: str
    expected_version: int | None = None  # of If-Match; None: any
    traceparent: str | None = None  # W3C, of a sampled request
    request_id: str = ""


Batch: TypeAlias = Sequence[Submission[C_co]]
Outcome: TypeAlias = Event | Refusal
Handle: TypeAlias = Callable[..., Awaitable[Sequence[Outcome]]]
