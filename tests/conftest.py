"""The servers of a test run: one PostgreSQL for all, one Valkey per process, a database per test.

WAYBILL_POSTGRES_URL and WAYBILL_REDIS_URL lead to other servers: there the PostgreSQL user must be
allowed to create databases (the one in the address is left alone), and Redis must be empty.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest
import redis.asyncio
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from app.pools import open_postgres, open_psycopg, open_redis
from app.servers import Postgres, Valkey
from app.settings import ROOT, read_settings

POSTGRES_URL = pytest.StashKey[str]()
TEMPLATE = pytest.StashKey[str]()
CLEAN_UP = pytest.StashKey[ExitStack]()

POOL_SIZE = 16
DATABASE_NUMBERS = count()


class Node(Protocol):
    """What is used of pytest-xdist's WorkerController, which has no types."""

    config: pytest.Config
    workerinput: dict[str, object]


def pytest_configure(config: pytest.Config) -> None:
    """Start PostgreSQL once per run, in the process that the others are started from."""
    given = getattr(config, "workerinput", None)
    if given is not None:
        config.stash[POSTGRES_URL] = given["postgres_url"]
        config.stash[TEMPLATE] = given["template"]
        return
    if config.option.collectonly or config.option.help or config.option.version:
        return
    stack = config.stash[CLEAN_UP] = ExitStack()
    url = read_settings(os.environ).postgres_url
    if url is None:
        server = Postgres(stack.enter_context(temporary_directory()))
        stack.callback(server.stop)
        server.start()
        server.wait_ready()
        url = server.url
    template = f"waybill_test_{os.getpid()}"
    admin = stack.enter_context(psycopg.connect(url, autocommit=True))
    _create_database(admin, template)
    stack.callback(_drop_database, admin, template)
    subprocess.run(
        [sys.executable, "-m", "migrations", _with_database(url, template)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    config.stash[POSTGRES_URL] = url
    config.stash[TEMPLATE] = template


def pytest_configure_node(node: Node) -> None:
    """Tell a process of pytest-xdist where the server is."""
    node.workerinput["postgres_url"] = node.config.stash[POSTGRES_URL]
    node.workerinput["template"] = node.config.stash[TEMPLATE]


def pytest_unconfigure(config: pytest.Config) -> None:
    if stack := config.stash.get(CLEAN_UP, None):
        stack.close()


@pytest.fixture(scope="session")
def admin(pytestconfig: pytest.Config) -> Generator[psycopg.Connection[TupleRow]]:
    """A superuser's connection, outside every test database."""
    with psycopg.connect(pytestconfig.stash[POSTGRES_URL], autocommit=True) as connection:
        yield connection


@pytest.fixture
def postgres_url(
    admin: psycopg.Connection[TupleRow], pytestconfig: pytest.Config
) -> Generator[str]:
    """A migrated, empty database for this test alone; it costs about 40 ms."""
    name = f"waybill_test_{os.getpid()}_{next(DATABASE_NUMBERS)}"
    _create_database(admin, name, template=pytestconfig.stash[TEMPLATE])
    try:
        yield _with_database(pytestconfig.stash[POSTGRES_URL], name)
    finally:
        _drop_database(admin, name)


@pytest.fixture(scope="session")
def redis_server() -> Generator[str]:
    """The Redis of this process."""
    url = read_settings(os.environ).redis_url
    if url is not None:
        yield url
        return
    with temporary_directory() as directory:
        server = Valkey(directory)
        try:
            server.start()
            server.wait_ready()
            yield server.url
        finally:
            server.stop()


@pytest.fixture
async def redis_url(redis_server: str) -> AsyncGenerator[str]:
    """A Redis that is empty when the test begins, and not shared with another process."""
    async with open_redis(redis_server) as client:
        # What is in there belongs to somebody else: each test leaves it empty.
        keys = await client.dbsize()  # pyright: ignore[reportUnknownMemberType]
        assert keys == 0, "WAYBILL_REDIS_URL must lead to an empty database"
        yield redis_server
        await client.flushdb()  # pyright: ignore[reportUnknownMemberType]


@pytest.fixture
async def asyncpg_pool(postgres_url: str) -> AsyncGenerator[asyncpg.Pool]:
    """What `commands` and `queries` get, on this test's database."""
    async with open_postgres(postgres_url, application_name="waybill-test", size=POOL_SIZE) as pool:
        yield pool


@pytest.fixture
async def psycopg_pool(
    postgres_url: str,
) -> AsyncGenerator[AsyncConnectionPool[AsyncConnection[TupleRow]]]:
    """What `projections` and `workers` get, on this test's database."""
    async with open_psycopg(postgres_url, application_name="waybill-test", size=POOL_SIZE) as pool:
        yield pool


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncGenerator[redis.asyncio.Redis]:
    async with open_redis(redis_url) as client:
        yield client


@contextmanager
def temporary_directory() -> Generator[Path]:
    """A directory with a short path, since the servers' sockets stand in it."""
    path = Path(tempfile.mkdtemp(prefix="waybill-test-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _create_database(
    admin: psycopg.Connection[TupleRow], name: str, *, template: str = "template1"
) -> None:
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
    admin.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))


def _drop_database(admin: psycopg.Connection[TupleRow], name: str) -> None:
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
