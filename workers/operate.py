"""`./waybill projections`: look at the read models, rebuild them, compare them, repair them."""

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg_pool import PoolTimeout

from app.pools import open_psycopg, open_redis
from app.settings import OperatorError, Settings
from projections.audit import Difference, TooFarBehindError, audit
from projections.catalogue import READ_MODELS
from projections.outbox import Connection, Outbox
from projections.parking import Parked, RepairError, list_parked, rederive, retry
from projections.read_model import ReadModel
from projections.rebuild import fill, reanchor
from projections.status import read_status
from workers.projector import Pool
from workers.push import Push

CONNECTIONS: Final = 2  # the one that works, and the one that looks on
PROGRESS_S: Final = 0.5
READERS_FORGET: Final = "readers were not told, and may hold old answers for a minute"

# $1 name of a table. One row: its bytes with its indexes, also those of a transaction under way.
TABLE_BYTES: Final = """
SELECT pg_total_relation_size($1::text::regclass)
"""

BY_NAME: Final = {model.name: model for model in READ_MODELS}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="./waybill", description="Show and repair the read models.")
    verbs = top.add_subparsers(dest="area", required=True).add_parser("projections")
    actions = verbs.add_subparsers(dest="verb", metavar="VERB", required=True)
    actions.add_parser("status", help="how far each read model is behind, and what is parked")
    rebuild = actions.add_parser("rebuild", help="fill read models anew, while all goes on")
    rebuild.add_argument("read_models", nargs="*", metavar="READ_MODEL")
    rebuild.add_argument("--all", action="store_true", help="all of them")
    compare = actions.add_parser("audit", help="compare with the normalized tables")
    compare.add_argument("read_models", nargs="*", metavar="READ_MODEL")
    compare.add_argument("--repair", action="store_true", help="put right what differs")
    parked = actions.add_parser("parked", help="list what waits because an event failed")
    parked.add_argument("read_model", nargs="?", metavar="READ_MODEL")
    for verb, text in (
        ("retry", "apply again what is parked"),
        ("skip", "leave out the event that failed, and apply those after it"),
        ("rederive", "take the rows from the normalized tables"),
    ):
        mend = actions.add_parser(verb, help=text)
        mend.add_argument("read_model", metavar="READ_MODEL")
        mend.add_argument("aggregate_id", metavar="AGGREGATE")
    return top


async def operate(settings: Settings, arguments: Sequence[str]) -> int:
    """Do what the operator asks; returns the exit code: 1 where something is still wrong.

    Raises:
        OperatorError: it cannot be done, for a reason in one line.
    """
    asked = parser().parse_args(arguments)
    if settings.postgres_url is None:
        raise OperatorError("WAYBILL_POSTGRES_URL is not set, and no `up` runs here")
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # what it warns of is said once
    try:
        async with open_psycopg(
            settings.postgres_url, application_name="waybill-worker", size=CONNECTIONS
        ) as pool:
            return await _run(settings, pool, asked)
    except PoolTimeout as error:
        raise OperatorError("PostgreSQL cannot be reached") from error
    except (psycopg.Error, RepairError, TooFarBehindError) as error:
        raise OperatorError(str(error).strip().replace("\n", "; ")) from error


async def _run(settings: Settings, pool: Pool, asked: argparse.Namespace) -> int:
    models = tuple(_named(name) for name in getattr(asked, "read_models", ())) or READ_MODELS
    match asked.verb:
        case "status":
            return await show_status(pool)
        case "parked":
            return await show_parked(pool, asked.read_model and _named(asked.read_model).name)
        case "rebuild":
            if not asked.read_models and not asked.all:
                raise OperatorError("name the read models to rebuild, or say --all")
            return await rebuild_all(settings, pool, models)
        case "audit":
            return await audit_all(settings, pool, models, is_repairing=asked.repair)
        case _:
            model = _named(asked.read_model)
            return await mend(settings, pool, asked.verb, model, asked.aggregate_id)


def _named(name: str) -> ReadModel:
    if name not in BY_NAME:
        raise OperatorError(f"there is no read model {name}; there are {', '.join(BY_NAME)}")
    return BY_NAME[name]


async def show_status(pool: Pool) -> int:
    async with pool.connection() as connection:
        statuses = await read_status(connection)
    print(f"{'READ MODEL':20} {'VERSION':>7} {'LAG':>9} {'EVENTS BEHIND':>14} {'PARKED':>7}  MOVED")
    for each in statuses:
        print(
            f"{each.read_model:20} {each.version:>7} {each.lag_s:>7.3f} s "
            f"{each.events_behind:>14} {each.parked:>7}  {each.moved_at:%Y-%m-%d %H:%M:%S %Z}"
        )
    return 1 if any(each.parked for each in statuses) else 0


async def show_parked(pool: Pool, name: str | None) -> int:
    async with pool.connection() as connection:
        waiting = await list_parked(connection, name)
    for parked, attempts, queued in waiting:
        print(
            f"{parked.read_model} {parked.aggregate} {parked.aggregate_id}: event "
            f"{parked.event_id} failed {attempts} times, {queued} wait: {_one_line(parked.error)}"
        )
    if not waiting:
        print("nothing is parked")
    return 1 if waiting else 0


async def rebuild_all(settings: Settings, pool: Pool, models: Sequence[ReadModel]) -> int:
    async with pool.connection() as connection:
        if await reanchor(connection):
            print("this PostgreSQL is a restored copy: the outbox now counts as its own")
        for model in models:
            began_s = monotonic()
            async with _progress(pool, model.name):
                filled = await fill(connection, model, anew=True)
            if not filled:
                raise OperatorError(f"{model.name} is being filled by somebody else")
            print(f"{model.name}: rebuilt in {monotonic() - began_s:.1f} s")
    await _tell_readers(settings)
    return 0


async def audit_all(
    settings: Settings, pool: Pool, models: Sequence[ReadModel], *, is_repairing: bool
) -> int:
    wrong = 0
    async with pool.connection() as connection:
        for model in models:
            differing = [each async for each in _differences(connection, model)]
            wrong += len(differing)
            if is_repairing:
                for each in differing:
                    await rederive(connection, model, each.aggregate_id)
    if not wrong:
        return 0
    print(f"{wrong} rows differ{', and were taken from the normalized tables' * is_repairing}")
    if is_repairing:
        await _tell_readers(settings)
    return 0 if is_repairing else 1


async def _differences(connection: Connection, model: ReadModel) -> AsyncGenerator[Difference]:
    began_s = monotonic()
    differing = compared = 0
    async for compared, differences in audit(connection, model):
        for each in differences:
            print(f"{model.name} {each.aggregate_id}: {_sentence(each)}")
            yield each
        differing += len(differences)
        _say_progress(f"{model.name}: {compared} compared")
    _say_progress("")
    print(f"{model.name}: {compared} compared in {monotonic() - began_s:.1f} s, {differing} differ")


async def mend(
    settings: Settings, pool: Pool, verb: str, model: ReadModel, aggregate_id: str
) -> int:
    found: Parked | None = None
    async with pool.connection() as connection:
        if verb == "rederive":
            await rederive(connection, model, aggregate_id)
        else:
            outbox = Outbox(connection)
            found = await retry(connection, outbox, model, aggregate_id, skip_first=verb == "skip")
    if found is not None:
        print(f"event {found.event_id} failed: {_one_line(found.error)}")
        return 1
    print(f"{aggregate_id} is no longer parked in {model.name}")
    await _tell_readers(settings)
    return 0


async def _tell_readers(settings: Settings) -> None:
    if settings.redis_url is not None:
        async with open_redis(settings.redis_url) as redis:
            if await Push(redis).reset():
                return
    print(READERS_FORGET, file=sys.stderr)


@asynccontextmanager
async def _progress(pool: Pool, table: str) -> AsyncGenerator[None]:
    """Show on a terminal how long it takes and how the table grows."""

    async def look() -> None:
        began_s = monotonic()
        async with pool.connection() as connection:
            while True:
                size = await (await connection.execute(TABLE_BYTES, [table])).fetchone()
                megabytes = size[0] / 1e6 if size else 0.0
                _say_progress(f"{table}: {monotonic() - began_s:.0f} s, {megabytes:.0f} MB")
                await asyncio.sleep(PROGRESS_S)

    looking = asyncio.create_task(look()) if sys.stderr.isatty() else None
    try:
        yield
    finally:
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            _say_progress("")


def _say_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _sentence(difference: Difference) -> str:
    """What is wrong with a row, in one line."""
    expected, shown = difference.expected, difference.shown
    if expected is None:
        return "there should be no row"
    if shown is None:
        return "the row is missing"
    return ", ".join(
        f"{column} is {_short(shown[column])}, should be {_short(value)}"
        for column, value in expected.items()
        if shown[column] != value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
