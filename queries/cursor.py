"""Opaque keyset cursors: where a page ended, and of which query.

A cursor is no secret and gives no access: whose orders a page shows is decided by the principal.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b
from typing import TypeVar

import msgspec

CURSOR_CHARS_MAX = 300  # a sku and a location of 64 characters take 196


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what a cursor holds; subclasses add the sort key of the last row."""

    fingerprint: bytes


class CursorError(ValueError):
    """The cursor is malformed, or was given out for another query."""


C = TypeVar("C", bound=Cursor)


def fingerprint(query: str) -> bytes:
    """Tells queries apart: by sort and filters, not by limit."""
    return blake2b(query.encode(), digest_size=8).digest()


def encode(cursor: Cursor) -> str:
    return urlsafe_b64encode(msgspec.msgpack.encode(cursor)).rstrip(b"=").decode()


def decode(text: str, kind: type[C], *, query: str) -> C:
    """The cursor of this query.

    Raises:
        CursorError: malformed, or of another query.
    """
    try:
        if len(text) > CURSOR_CHARS_MAX:
            raise CursorError("the cursor is too long")
        packed = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        cursor = msgspec.msgpack.decode(packed, type=kind)
    except (ValueError, msgspec.MsgspecError) as error:
        raise CursorError("the cursor is malformed") from error
    if cursor.fingerprint != fingerprint(query):
        raise CursorError("the cursor belongs to a query with other filters or another sort")
    return cursor
