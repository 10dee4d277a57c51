"""Logs are JSON lines in UTC that carry the request and the trace, and no secret by accident."""

import json
import subprocess
import sys
from datetime import datetime, timedelta
from typing import Any

from app.settings import ROOT

PROGRAM = """
import logging, structlog
from app.logs import configure_logging
configure_logging("info", process="web")
structlog.contextvars.bind_contextvars(request_id="r-1", trace_id="t-1")
log = structlog.stdlib.get_logger("waybill.web")
log.info("placed", orders=2)
log.debug("too fine")
logging.getLogger("arq.worker").warning("slow by %d ms", 7)
def fail(key):
    return 1 / 0
try:
    fail("wb_" + "secret")
except ZeroDivisionError:
    log.exception("failed")
"""


def lines() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_our_lines_and_those_of_libraries_have_one_form() -> None:
    placed, slow, failed = lines()
    for line in (placed, slow, failed):
        assert line["process"] == "web"
        assert line["request_id"] == "r-1"
        assert line["trace_id"] == "t-1"
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta()
    assert placed["event"] == "placed"
    assert placed["orders"] == 2
    assert placed["level"] == "info"
    assert slow["event"] == "slow by 7 ms"
    assert slow["logger"] == "arq.worker"


def test_a_traceback_has_no_local_variables() -> None:
    failed = lines()[2]
    assert "ZeroDivisionError" in failed["exception"]
    assert "wb_secret" not in failed["exception"]
