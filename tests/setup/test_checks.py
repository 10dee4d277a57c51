"""Format, lint, types and the arrows between the rooms: checked with the rest, never apart."""

import subprocess
import sys

import pytest

from app.settings import ROOT

CHECKS = {
    "ruff": ("-m", "ruff", "check"),
    "format": ("-m", "ruff", "format", "--check"),
    "mypy": ("-m", "mypy"),
    # It would look for an environment of its own liking otherwise.
    "pyright": ("-m", "pyright", "--pythonpath", sys.executable),
    # import-linter has no `python -m`, and its script does not survive a move of the checkout.
    "arrows": ("-c", "from importlinter.cli import lint_imports_command as run; run()"),
}


@pytest.mark.timeout(300)  # a first run has no caches
@pytest.mark.parametrize("check", CHECKS)
def test_the_whole_tree_passes(check: str) -> None:
    command = [sys.executable, *CHECKS[check]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
