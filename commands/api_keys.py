"""API keys: issue, list, revoke, and find the principal behind one. Stored as hashes only."""

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from asyncpg import Record
from uuid_utils.compat import uuid7

from commands.command import Connection, Principal

SCOPES: Final = frozenset(
    {
        "orders:read",
        "orders:write",
        "stock:read",
        "stock:write",
        "products:write",
        "customers:write",
        "operations:read",
    }
)

# Locks nothing; one row.
INSERT_KEY: Final = """
INSERT INTO api_keys (key_id, owner, name, prefix, secret_hash, scopes, customer_id,
                      requests_per_minute, created_at, expires_at)
VALUES ($1, $2, $3, $4, $5, $6::text[], $7, $8, $9, $10)
"""

LIST_KEYS: Final = """
SELECT key_id, owner, name, prefix, scopes, customer_id, requests_per_minute, created_at,
       expires_at, revoked_at
FROM api_keys
ORDER BY created_at, key_id
"""

# $1 the key, $2 the time. Rows: 0 or 1.
REVOKE_KEY: Final = """
UPDATE api_keys
SET revoked_at = $2
WHERE key_id = $1 AND revoked_at IS NULL
RETURNING key_id
"""

# $1 bytea, the SHA-256 of the presented key; $2 the time. Rows: 0 or 1.
FIND_PRINCIPAL: Final = """
SELECT key_id, owner, scopes, customer_id, requests_per_minute
FROM api_keys
WHERE secret_hash = $1
  AND revoked_at IS NULL
  AND (expires_at IS NULL OR expires_at > $2)
"""


def hash_key(key: str) -> bytes:
    """SHA-256: the key holds 256 random bits, so a slow hash would protect nothing."""
    return hashlib.sha256(key.encode()).digest()


async def issue_api_key(
    connection: Connection,
    *,
    owner: str,
    name: str,
    scopes: Sequence[str],
    customer_id: UUID | None,
    requests_per_minute: int,
    expires_at: datetime | None,
    now: datetime,
) -> tuple[UUID, str]:
    """Issue a key; returns its id and the key itself, which is shown this once.

    Raises:
        ValueError: a scope is not one of SCOPES.
    """
    unknown = set(scopes) - SCOPES
    if unknown:
        raise ValueError(f"unknown scope {', '.join(sorted(unknown))}")
    key_id, key = uuid7(), f"wb_{secrets.token_urlsafe(32)}"
    await connection.execute(
        INSERT_KEY,
        key_id,
        owner,
        name,
        key[:8],
        hash_key(key),
        list(scopes),
        customer_id,
        requests_per_minute,
        now,
        expires_at,
    )
    return key_id, key


async def list_api_keys(connection: Connection) -> Sequence[Record]:
    """Rows of LIST_KEYS, oldest first."""
    return await connection.fetch(LIST_KEYS)


async def revoke_api_key(connection: Connection, *, key_id: UUID, now: datetime) -> bool:
    """Returns whether there was such a key to revoke. Web processes notice within 10 s."""
    return await connection.fetchval(REVOKE_KEY, key_id, now) is not None


async def find_principal(
    connection: Connection, *, secret_hash: bytes, now: datetime
) -> Principal | None:
    """Whose key this is; None when it is unknown, expired or revoked."""
    row = await connection.fetchrow(FIND_PRINCIPAL, secret_hash, now)
    if row is None:
        return None
    return Principal(
        row["key_id"],
        row["owner"],
        frozenset(row["scopes"]),
        row["customer_id"],
        row["requests_per_minute"],
    )
