"""The command line: every verb of ./waybill, and the processes that `up` starts."""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

from app.settings import (
    ROOT,
    OperatorError,
    Settings,
    SettingsError,
    read_settings,
    server_urls,
    variable_of,
)
from app.stack import read_stack

DEFAULT_REQUESTS_PER_MINUTE: Final = 6_000

# Each of our tests is far quicker; one that hangs is ended and named.
TEST_TIMEOUT_S: Final = 120
TEST_PROCESSES: Final = 2

# Programs of other rooms, which `app` starts but does not import. They read their own arguments.
PROGRAMS: Final[Mapping[str, Sequence[str]]] = {
    "worker": ["workers"],
    "projections": ["workers", "projections"],
    "migrate": ["migrations"],
}


def main(arguments: Sequence[str]) -> None:
    """Do what the verb says; an error that the operator can mend is one line and exit code 1."""
    os.umask(0o077)  # whatever is written belongs to this user alone
    try:
        match list(arguments):
            case ["test", *rest]:
                test(rest)
            case ["bench", *rest]:
                _become("bench", *rest)
            case [("worker" | "projections" | "migrate") as verb, *rest]:
                use_running_servers()
                _become(*PROGRAMS[verb], *rest)
            case _:
                run(parser().parse_args(arguments))
    except OperatorError as error:
        sys.exit(f"waybill: {error}")


def parser() -> argparse.ArgumentParser:
    """Describe the verbs; `worker`, `projections`, `bench` and `test` describe themselves."""
    settings = map(variable_of, Settings.__struct_fields__)
    top = argparse.ArgumentParser(
        prog="./waybill",
        description="Waybill, an order-management service.",
        epilog=f"Settings, from the environment: {', '.join(settings)}. app/settings.py tells all.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20),
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("up", help="start everything, with its own PostgreSQL and Valkey if need be")
    verbs.add_parser("test", help="run all checks and tests; further arguments go to pytest")
    verbs.add_parser("bench", help="measure latencies, lag and cost, and give a verdict")
    keys = verbs.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)
    _describe_create(actions.add_parser("create", help="make a key and print it, this once"))
    actions.add_parser("list", help="list all keys, never their secrets")
    revoke = actions.add_parser("revoke", help="end a key; web processes notice within 10 s")
    revoke.add_argument("key_id", type=UUID)
    verbs.add_parser("projections", help="show, rebuild and repair the read models")
    verbs.add_parser("migrate", help="bring the database up to date and end")
    verbs.add_parser("web", help="serve HTTP on the servers given")
    verbs.add_parser("worker", help="project events on the servers given")
    verbs.add_parser("demo", help="load the demo shop and write demo.env")
    return top


def _describe_create(create: argparse.ArgumentParser) -> None:
    create.add_argument("--owner", required=True, help="whose key it is")
    create.add_argument("--name", required=True, help="what it is for")
    create.add_argument("--scope", action="append", required=True, help="repeat for several")
    create.add_argument("--customer", type=UUID, help="act for this customer alone (storefronts)")
    create.add_argument(
        "--requests-per-minute", type=int, default=DEFAULT_REQUESTS_PER_MINUTE, metavar="N"
    )
    create.add_argument("--expires-in-days", type=int, metavar="N")


def run(asked: argparse.Namespace) -> None:
    """Run one verb of our own. Each imports what it needs, which keeps every start short."""
    settings = read_settings(os.environ)
    match asked.verb:
        case "up":
            from app.up import Supervisor  # noqa: PLC0415

            Supervisor(settings, os.environ).run()
        case "web":
            from app.serve import serve  # noqa: PLC0415

            server_urls(settings)  # a line here, rather than a traceback in the web process
            serve(settings)
        case "demo":
            from app.demo import prepare_demo  # noqa: PLC0415

            print(asyncio.run(prepare_demo(settings, _postgres_url(settings))))
        case _:
            from app.keys import manage_keys  # noqa: PLC0415

            asyncio.run(manage_keys(_postgres_url(settings), asked))


def test(arguments: Sequence[str]) -> None:
    """Become pytest; the linters and type checkers are among the tests."""
    # One Redis has one set of channels, so on a given one the tests run one at a time.
    processes = 0 if read_settings(os.environ).redis_url else TEST_PROCESSES
    options = (f"--numprocesses={processes}", f"--timeout={TEST_TIMEOUT_S}")
    _become("pytest", *options, *arguments)


def use_running_servers() -> None:
    """Let what follows work on the servers of an `up` that runs here, unless others are given."""
    settings = read_settings(os.environ)
    if stack := read_stack(settings.data_dir):
        os.environ.setdefault(variable_of("postgres_url"), stack.postgres_url)
        os.environ.setdefault(variable_of("redis_url"), stack.redis_url)


def _become(*arguments: str) -> None:
    os.chdir(ROOT)
    os.execv(sys.executable, (sys.executable, "-m", *arguments))  # noqa: S606


def _postgres_url(settings: Settings) -> str:
    stack = read_stack(settings.data_dir)
    url = settings.postgres_url or (stack and stack.postgres_url)
    if not url:
        raise SettingsError("WAYBILL_POSTGRES_URL is not set, and no `up` runs here")
    return url


if __name__ == "__main__":
    main(sys.argv[1:])
