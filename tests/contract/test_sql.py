"""Every SQL constant of the service is prepared against the migrated schema."""

import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator
from types import ModuleType

import asyncpg
import pytest

import app
import commands
import projections
import queries
import workers
from projections.outbox import MAKE_BACKLOG, MAKE_BATCH
from projections.parking import KEEP_WHOLE_BATCH

ROOMS = (app, commands, projections, queries, workers)
VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "VALUES")


def modules() -> Iterator[ModuleType]:
    for room in ROOMS:
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def statements() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, str) and value.lstrip().startswith(VERBS):
                yield f"{module.__name__}.{name}", value


STATEMENTS = sorted(set(statements()))


def test_the_statements_are_found() -> None:
    names = {name for name, _ in STATEMENTS}
    assert {
        "commands.place_order.WRITE_ORDERS",
        "commands.executor.CLAIM_KEYS",
    } <= names


async def test_every_statement_fits_the_schema(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        async with connection.transaction():  # KEEP_WHOLE_BATCH makes a table for one
            for temporary in (MAKE_BATCH, MAKE_BACKLOG, KEEP_WHOLE_BATCH):
                await connection.execute(temporary)
            assert [each async for each in misfits(connection)] == []
    finally:
        await connection.close()


async def misfits(connection: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[str]:
    for name, statement in STATEMENTS:
        try:
            async with connection.transaction():
                await connection.prepare(statement)
        except asyncpg.PostgresError as error:
            yield f"{name}: {error}"


async def test_a_wrong_column_is_noticed(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        with pytest.raises(asyncpg.UndefinedColumnError):
            await connection.prepare("SELECT no_such_column FROM orders")
    finally:
        await connection.close()
