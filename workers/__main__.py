"""The worker process (`python -m workers`), and what operators do (`... projections VERB`)."""

import asyncio
import os
import sys
from collections.abc import Coroutine, Sequence
from typing import TypeVar

import uvloop

from app.logs import configure_logging
from app.settings import OperatorError, read_settings
from workers.operate import operate
from workers.process import run_worker

T = TypeVar("T")


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; what the operator can mend is one line and exit code 1."""
    try:
        settings = read_settings(os.environ)
        if not arguments:
            configure_logging(settings.log_level, process="worker")
            _run(run_worker(settings))
            return 0
        return _run(operate(settings, arguments))
    except OperatorError as error:
        print(f"waybill: {error}", file=sys.stderr)
        return 1


def _run(work: Coroutine[None, None, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
