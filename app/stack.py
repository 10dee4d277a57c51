"""What `up` tells of itself: demo.env for its clients, stack.json for whoever works beside it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

DEMO_FILE: Final = "demo.env"
STACK_FILE: Final = "stack.json"


class Stack(Struct, frozen=True):
    """The addresses of the servers, and the processes by role; each is the root of a tree."""

    postgres_url: str
    redis_url: str
    pids: Mapping[str, Sequence[int]]


def write_demo(data_dir: Path, *, url: str, key: str) -> Path:
    """Keep address and key, and return the file's path."""
    write_privately(data_dir / DEMO_FILE, f"WAYBILL_URL={url}\nWAYBILL_API_KEY={key}\n")
    return data_dir / DEMO_FILE


def read_demo_key(data_dir: Path) -> str | None:
    """Return the key of the last start, if there was one."""
    try:
        lines = (data_dir / DEMO_FILE).read_text().splitlines()
    except FileNotFoundError:
        return None
    return dict(line.split("=", 1) for line in lines if "=" in line).get("WAYBILL_API_KEY")


def write_stack(data_dir: Path, stack: Stack) -> None:
    write_privately(data_dir / STACK_FILE, msgspec.json.encode(stack).decode())


def read_stack(data_dir: Path) -> Stack | None:
    """Return what the `up` in this directory says; None if none is ready there."""
    try:
        return msgspec.json.decode((data_dir / STACK_FILE).read_bytes(), type=Stack)
    except FileNotFoundError:
        return None


def forget_stack(data_dir: Path) -> None:
    (data_dir / STACK_FILE).unlink(missing_ok=True)


def write_privately(path: Path, text: str) -> None:
    """Replace the file in one step; nobody but its owner can ever read it."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)
