"""The machine and the database settings that a result was measured on."""

import os
import platform
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Final

import psycopg
from msgspec import Struct

FSYNCS: Final = 20  # about 0.1 s on a disk, 0.02 s on flash
BLOCK: Final = bytes(8192)  # a page of PostgreSQL's log
LOSSY_WHEN_OFF: Final = ("fsync", "synchronous_commit")
CONNECT_TIMEOUT_S: Final = 5

# Rows: one per setting. Locks nothing.
READ_SETTINGS: Final = """
SELECT name, current_setting(name) FROM pg_settings
WHERE name IN ('server_version', 'fsync', 'synchronous_commit', 'full_page_writes', 'wal_level',
               'shared_buffers', 'max_wal_size')
"""


class Environment(Struct, frozen=True):
    """What stands beside every figure."""

    cores: int
    processor: str
    kernel: str
    python: str
    fsync_ms: float  # median of writing a page to the data directory and flushing it
    postgres: dict[str, str]  # settings; empty where the database is not known

    @property
    def durable(self) -> bool | None:
        """Whether a commit survives a power cut; None where the database is not known."""
        if not self.postgres:
            return None
        return all(self.postgres[name] != "off" for name in LOSSY_WHEN_OFF)


def read_environment(postgres_url: str | None, beside: Path | None) -> Environment:
    """Look around; `beside` is a file on the disk that the database writes to."""
    return Environment(
        cores=os.cpu_count() or 1,
        processor=_processor(),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        fsync_ms=_fsync_ms(beside.parent if beside is not None else Path()),
        postgres=_settings(postgres_url),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _fsync_ms(directory: Path) -> float:
    durations: list[float] = []
    with TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(FSYNCS):
            started = time.perf_counter()
            file.write(BLOCK)
            os.fsync(file.fileno())
            durations.append((time.perf_counter() - started) * 1000)
    return median(durations)


def _settings(postgres_url: str | None) -> dict[str, str]:
    if postgres_url is None:
        return {}
    try:
        with psycopg.connect(postgres_url, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            return dict(connection.execute(READ_SETTINGS).fetchall())
    except psycopg.Error:
        return {}
