"""The web process: granian in front of the ASGI app that app/web.py builds."""

import gc
import multiprocessing
import resource
import signal
from functools import partial
from typing import Any

from granian.constants import HTTPModes, Interfaces, Loops
from granian.log import LogLevels
from granian.server import Server

from app.children import die_with
from app.logs import configure_logging
from app.settings import Settings

CONNECTIONS_MAX = 4096
"""Open connections per process; more wait in the kernel. What a process can work on at a time is
bounded further in: the executors' queues answer 503, they do not let requests pile up."""

GC_OBJECTS = 50_000
"""New objects between two searches for cycles; they take some 10 MB."""

STOP_PATIENCE_S = 10
"""How long requests under way may take after SIGTERM."""

# granian's own lines go the way of all others; dictConfig leaves the root logger as it is.
GRANIAN_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"propagate": True}, "granian.access": {"propagate": True}},
}


def serve(settings: Settings) -> None:
    """Serve until SIGTERM; requests under way are finished first."""
    configure_logging(settings.log_level, process="web")
    _allow_descriptors(2 * CONNECTIONS_MAX)
    Server(
        "app.web:create_app",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        workers=settings.webs,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        backlog=CONNECTIONS_MAX,
        backpressure=CONNECTIONS_MAX,
        # Several processes: granian replaces one that died while the others serve. A single one
        # takes this process with it, and who started us starts us again.
        respawn_failed_workers=settings.webs > 1,
        workers_kill_timeout=STOP_PATIENCE_S,
        log_level=LogLevels.warning,
        log_dictconfig=GRANIAN_LOGGING,
    ).serve(target_loader=partial(load_app, settings.log_level))


def load_app(log_level: str, _target: str) -> Any:
    """Build the app, in the process that will serve it."""
    configure_logging(log_level, process="web")
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with(parent.pid, signal.SIGTERM)
    from app.web import create_app  # noqa: PLC0415  (granian's first process never needs it)

    app = create_app()
    # Requests make few cycles and many objects: looking for cycles every 700 of them takes 6 % of
    # the process, and looking through the modules each time takes most of that.
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)
    return app


def _allow_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
