"""Logs of every process: one JSON object per line on stderr, or readable lines in a terminal."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import msgspec
import structlog
from structlog.typing import Processor

# Their info lines repeat what ours say, or come once per request.
QUIETED = ("arq", "asyncio", "granian.access", "httpx", "opentelemetry", "psycopg.pool")


def configure_logging(level: str, *, process: str) -> None:
    """Send our own logs and those of every library through one chain, in UTC.

    Whatever is bound with `structlog.contextvars` (request_id, trace_id) stands in each line.
    `process` is `web`, `worker`, ... and stands in each line, too.
    """

    def add_process(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    shared: list[Processor] = [
        add_process,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_rendering())
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in QUIETED:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


def _rendering() -> list[Processor]:
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if sys.stderr.isatty():
        plain = structlog.dev.plain_traceback
        return [remove_meta, structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    # A traceback without local variables: they may hold a key or a customer's data.
    return [remove_meta, structlog.processors.format_exc_info, _to_json]


def _to_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    # What msgspec does not know (an exception, a path) is told by its repr, never dropped.
    return msgspec.json.encode(event, enc_hook=repr).decode()
