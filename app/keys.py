"""The verb `keys`: create, list and revoke API keys from the command line."""

from argparse import Namespace
from datetime import UTC, datetime, timedelta

import asyncpg

from app.pools import open_postgres
from app.settings import OperatorError
from commands.api_keys import SCOPES, issue_api_key, list_api_keys, revoke_api_key
from commands.command import Connection


async def manage_keys(postgres_url: str, asked: Namespace) -> None:
    """Do what `asked.action` says and print what came of it; each is a transaction of its own.

    Raises:
        OperatorError: a scope or a key is unknown, or the database is out of reach.
    """
    try:
        async with (
            open_postgres(postgres_url, application_name="waybill-commands", size=1) as pool,
            pool.acquire() as connection,
        ):
            match asked.action:
                case "create":
                    await _create(connection, asked)
                case "revoke":
                    await _revoke(connection, asked)
                case _:
                    await _list(connection)
    except (OSError, asyncpg.PostgresError) as error:
        raise OperatorError(f"the database does not answer as it should: {error}") from error


async def _create(connection: Connection, asked: Namespace) -> None:
    now = datetime.now(UTC)
    days: int | None = asked.expires_in_days
    try:
        key_id, key = await issue_api_key(
            connection,
            owner=asked.owner,
            name=asked.name,
            scopes=asked.scope,
            customer_id=asked.customer,
            requests_per_minute=asked.requests_per_minute,
            expires_at=None if days is None else now + timedelta(days=days),
            now=now,
        )
    except ValueError as error:
        raise OperatorError(f"{error}; known are {', '.join(sorted(SCOPES))}") from error
    print(f"key id: {key_id}\nkey:    {key}   (shown this once)")


async def _list(connection: Connection) -> None:
    for row in await list_api_keys(connection):
        ended = row["revoked_at"] or row["expires_at"]
        state = "active" if ended is None else f"ends {ended:%Y-%m-%d %H:%M} UTC"
        limit = f"{row['requests_per_minute']}/min"
        scopes = " ".join(row["scopes"])
        print(
            row["key_id"], row["prefix"], row["owner"], row["name"], limit, state, scopes, sep="  "
        )


async def _revoke(connection: Connection, asked: Namespace) -> None:
    if not await revoke_api_key(connection, key_id=asked.key_id, now=datetime.now(UTC)):
        raise OperatorError(f"there is no active key {asked.key_id}")
    print(f"{asked.key_id} is revoked")
