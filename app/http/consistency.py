"""How fresh a read has to be: Consistency-Token, and Prefer: wait (RFC 7240).

A token is `<timeline>.<transaction id>`. Transaction ids count on after a fail-over, but those that
the old primary gave out last may be given out again, so a token of another timeline proves nothing:
such a read is answered at once, and says that it may be behind.
"""

import re
from typing import Final

from msgspec import Struct

from app.http.problems import ParameterFault, ProblemError
from commands.command import Postgres
from queries.freshness import POSTGRES_FAULTS

WAIT_MAX_S: Final = 30.0
WAIT_FOR_TOKEN_S: Final = 2.0  # when a token comes without a Prefer
WAIT_FOR_ORDER_S: Final = 1.0  # without either, for an order that the read model lacks

XID_MAX: Final = 2**63 - 1

# The timeline of the write-ahead log that is being written: pg_control_checkpoint() tells the new
# one only when the first checkpoint after a promotion is done. The first 8 hexadecimal digits.
READ_TIMELINE: Final = "SELECT pg_walfile_name(pg_current_wal_lsn())"

_TOKEN: Final = re.compile(rb"(\d{1,10})\.(\d{1,19})")
_SECONDS: Final = re.compile(rb"\d{1,6}(\.\d{1,3})?")


class Timeline:
    """The timeline of the write side, asked for once per process."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._number: int | None = None

    async def number(self) -> int:
        """Raises what asyncpg raises while PostgreSQL is away and it has not been asked yet."""
        if self._number is None:
            self._number = int((await self._postgres.fetchval(READ_TIMELINE))[:8], 16)
        return self._number


class Asked(Struct, frozen=True):
    """What a read asks for."""

    token_xid: int | None = None
    wait_s: float = WAIT_FOR_ORDER_S
    is_strict: bool = False  # 503 rather than an answer that may be behind
    is_unprovable: bool = False  # the token is of another timeline
    applied: bytes | None = None  # Preference-Applied


NOTHING: Final = Asked()


async def asked_of(headers: dict[bytes, bytes], timeline: Timeline) -> Asked:
    """Read both headers.

    Raises:
        ProblemError: invalid-parameter, for a token that is none. A preference that makes no sense
            is ignored (RFC 7240, section 2).
    """
    prefer = headers.get(b"prefer")
    token = headers.get(b"consistency-token")
    if prefer is None and token is None:
        return NOTHING
    wait_s, is_strict, applied = _preferences(prefer or b"")
    if token is None:
        return Asked(
            None, WAIT_FOR_ORDER_S if wait_s is None else wait_s, is_strict, False, applied
        )
    written = _TOKEN.fullmatch(token)
    if written is None or int(written[2]) > XID_MAX:
        raise _malformed_token()
    try:
        is_unprovable = int(written[1]) != await timeline.number()
    except POSTGRES_FAULTS:
        is_unprovable = True
    return Asked(
        token_xid=None if is_unprovable else int(written[2]),
        wait_s=WAIT_FOR_TOKEN_S if wait_s is None else wait_s,
        is_strict=is_strict,
        is_unprovable=is_unprovable,
        applied=applied,
    )


def _preferences(prefer: bytes) -> tuple[float | None, bool, bytes | None]:
    """Seconds to wait, whether handling is strict, and what is applied. The first one counts."""
    found: dict[bytes, bytes] = {}
    for preference in prefer.split(b","):
        name, _, value = preference.partition(b";")[0].partition(b"=")
        found.setdefault(name.strip().lower(), value.strip().strip(b'"'))
    wait_s: float | None = None
    applied: list[bytes] = []
    if _SECONDS.fullmatch(found.get(b"wait", b"")):
        wait_s = min(float(found[b"wait"]), WAIT_MAX_S)
        applied.append(b"wait=%g" % wait_s)
    is_strict = found.get(b"handling", b"").lower() == b"strict"
    if is_strict:
        applied.append(b"handling=strict")
    return wait_s, is_strict, b", ".join(applied) or None


def _malformed_token() -> ProblemError:
    detail = "A Consistency-Token is sent back as a command's answer gave it."
    fault = ParameterFault("Consistency-Token", "invalid", detail)
    return ProblemError("invalid-parameter", detail, errors=[fault])
