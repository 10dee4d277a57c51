"""Reads: from an entry of the read side to a reply. ETags, pages, and what lags."""

from collections.abc import Awaitable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode

import msgspec

from app.http.consistency import Asked
from app.http.exchange import Exchange
from app.http.problems import NAME_MAX, ParameterFault, ProblemError, located
from app.http.replies import JSON, Reply
from queries.cache import Entry
from queries.cursor import CursorError
from queries.freshness import POSTGRES_FAULTS
from queries.read_side import Absent, Behind, Found, ReadOverloadError, ReadSide

# Whoever caches it asks again before using it, and shows it to nobody else.
CACHING: Final = ((b"cache-control", b"private, no-cache"), (b"vary", b"Authorization"))
PARAMETERS_MAX: Final = 120  # 100 skus and some filters
REMEMBERED_QUERIES: Final = 1024  # query strings per kind of list, 8 KB at most each

NO_LISTS: Final[Mapping[str, str]] = MappingProxyType({})

Q = TypeVar("Q")


def entry_reply(
    exchange: Exchange, asked: Asked, entry: Entry, lag_s: float | None = None
) -> Reply:
    """The entry, or 304 if the client has it. `lag_s`: it may be so far behind what was asked for.

    Raises:
        ProblemError: projection-lag, if it may be behind and the client is strict.
    """
    headers = [JSON, *CACHING]
    if asked.applied is not None:
        headers.append((b"preference-applied", asked.applied))
    if lag_s is not None:
        if asked.is_strict:
            raise lagging(lag_s)
        headers.append(_lag(lag_s))
    if entry.etag is not None:
        etag = entry.etag.encode()
        headers.append((b"etag", etag))
        known = exchange.headers.get(b"if-none-match")
        if known is not None and _names(known, etag):
            return Reply(304, headers[1:])
    if entry.next_cursor is not None:
        headers.append((b"link", next_link(exchange.instance, exchange.query, entry.next_cursor)))
    return Reply(200, headers, entry.body)


async def found_reply(
    exchange: Exchange,
    asked: Asked,
    read_side: ReadSide,
    model: str,
    read: Awaitable[Found | Absent | Behind],
) -> Reply:
    """Await what the cache did not have, and turn it into a reply.

    Raises:
        ProblemError: not-found, projection-lag, overloaded, unavailable; invalid-parameter, for a
            cursor.
    """
    try:
        found = await read
        if isinstance(found, Found):
            lag_s = found.lag_s
            if lag_s is None and asked.is_unprovable:
                lag_s = await read_side.lag_s(model)
            return entry_reply(exchange, asked, found.entry, lag_s)
    except CursorError as error:
        detail = f"This cursor cannot be used: {error}."
        fault = ParameterFault("cursor", "invalid", detail)
        raise ProblemError("invalid-parameter", detail, errors=[fault]) from error
    except ReadOverloadError as error:
        raise ProblemError("overloaded", "Too many reads wait for PostgreSQL.") from error
    except POSTGRES_FAULTS as error:
        raise ProblemError("unavailable", "PostgreSQL cannot be reached.") from error
    if isinstance(found, Behind):
        raise lagging(found.lag_s)
    raise ProblemError("not-found", "There is no such thing.")


def lagging(lag_s: float) -> ProblemError:
    detail = f"The read model is {lag_s:.3f} s behind what was asked for."
    return ProblemError("projection-lag", detail, headers=[_lag(lag_s)])


def _lag(lag_s: float) -> tuple[bytes, bytes]:
    return (b"projection-lag", b"%.3f" % lag_s)


def _names(if_none_match: bytes, etag: bytes) -> bool:
    """RFC 9110, 13.1.2: weak comparison, so W/ does not matter; `*` is any."""
    known = {each.strip().removeprefix(b"W/") for each in if_none_match.split(b",")}
    return etag in known or b"*" in known


@lru_cache(REMEMBERED_QUERIES)
def next_link(path: str, query: bytes, cursor: str) -> bytes:
    """RFC 8288: the same query from where this page ends."""
    kept = [(name, value) for name, value in _pairs(query) if name != "cursor"]
    return f'<{path}?{urlencode([*kept, ("cursor", cursor)])}>; rel="next"'.encode()


def read_query(query: bytes, kind: type[Q], *, lists: Mapping[str, str] = NO_LISTS) -> Q:
    """The query string as a query. `lists`: parameters that may be repeated, and their fields.

    Raises:
        ProblemError: invalid-parameter.
    """
    fields: dict[str, Any] = {}
    for name, value in _pairs(query):
        if name in lists:
            fields.setdefault(lists[name], []).append(value)
        elif name in fields:
            raise _unusable(name, "This parameter is given once.")
        else:
            fields[name] = value
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        what, pointer, _ = located(error)
        raise _unusable(pointer.split("/")[1], what) from error


def _pairs(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            max_num_fields=PARAMETERS_MAX,
            errors="strict",
        )
    except ValueError as error:
        detail = f"A query string holds at most {PARAMETERS_MAX} parameters, in UTF-8."
        raise ProblemError("invalid-parameter", detail) from error


def _unusable(parameter: str, detail: str) -> ProblemError:
    fault = ParameterFault(parameter[:NAME_MAX], "invalid", detail)
    text = "A query parameter cannot be used."
    return ProblemError("invalid-parameter", text, errors=[fault])
