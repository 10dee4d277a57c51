"""./waybill makes the environment once, whatever happens to it on the way, and hands over."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.settings import ROOT

INSTALLS = "installing the packages pinned in"

# Tells what it was given, in place of the real command line.
SAY_WHAT_WAS_GIVEN = """
import os, sys
print(*sys.argv[1:], os.environ.get("WAYBILL_DATA_DIR", ""), sys.prefix, sep="|")
"""


def new_checkout(parent: Path) -> Path:
    """The script with nothing to install, so that no test needs the network."""
    checkout = parent / "a checkout"
    (checkout / "app").mkdir(parents=True)
    (checkout / "app/__main__.py").write_text(SAY_WHAT_WAS_GIVEN)
    shutil.copy(ROOT / "waybill", checkout)
    for pins in ("requirements.txt", "requirements-dev.txt"):
        (checkout / pins).write_text("# nothing\n")
    return checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return new_checkout(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The first run in a checkout."""
    checkout = new_checkout(tmp_path_factory.mktemp("script"))
    return waybill(checkout, "keys", "create", "--name", "two words")


@pytest.fixture
def made(first: subprocess.CompletedProcess[str]) -> Path:
    """A checkout whose environment is made; its pins may be changed."""
    return Path(first.args[0]).parent


def environment(checkout: Path, **more: str) -> dict[str, str]:
    home = checkout.parent / "home"
    home.mkdir(exist_ok=True)
    return {"HOME": str(home), "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", **more}


def waybill(checkout: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "waybill", *arguments],
        cwd=checkout.parent,
        env=environment(checkout, **more),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_is_made_once_and_the_arguments_are_handed_over(
    first: subprocess.CompletedProcess[str], made: Path
) -> None:
    assert INSTALLS in first.stderr
    assert first.stdout == f"keys|create|--name|two words||{made}/.venv\n"
    again = waybill(made, "up")
    assert again.stderr == ""
    assert again.returncode == 0


def test_changed_pins_are_installed_and_each_verb_has_its_own(made: Path) -> None:
    assert "requirements-dev.txt" in waybill(made, "test").stderr
    (made / "requirements.txt").write_text("# nothing new\n")
    assert "requirements.txt" in waybill(made, "up").stderr
    assert waybill(made, "bench").stderr == ""


def test_two_at_once_make_one_environment(checkout: Path) -> None:
    both = [
        subprocess.Popen(
            [checkout / "waybill", "up"],
            env=environment(checkout),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(errors for _, errors in said).count(INSTALLS) == 1


def test_one_that_was_killed_half_way_is_taken_up_again(checkout: Path) -> None:
    killed = subprocess.Popen(
        [checkout / "waybill", "up"],
        env=environment(checkout),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1)  # in the midst of making .venv
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert waybill(checkout, "up").returncode == 0


def test_a_package_that_was_cut_short_is_not_taken_for_installed(made: Path) -> None:
    (packages,) = (made / ".venv/lib").glob("python*/site-packages")
    (packages / "half-1.0.dist-info").mkdir()
    (packages / "half-1.0.dist-info/METADATA").write_text("Name: half\nVersion: 1.0\n")
    (made / "requirements.txt").write_text("# changed\n")
    waybill(made, "up")
    assert not (packages / "half-1.0.dist-info").exists()


def test_pins_that_cannot_be_installed_are_said_and_not_taken_for_installed(made: Path) -> None:
    (made / "requirements.txt").write_text("no-hash==1.0\n")
    for _ in range(2):
        failed = waybill(made, "up")
        assert failed.returncode != 0
        assert "could not be installed" in failed.stderr.splitlines()[-1]
        assert failed.stdout == ""


def test_without_a_python_of_3_11_it_says_so(checkout: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dirname", "cksum", "cat", "date", "flock", "touch", "rm"):
        found = shutil.which(name)
        if found:
            (programs / name).symlink_to(found)
    (programs / "python3").write_text("#!/bin/sh\nexit 1\n")
    (programs / "python3").chmod(0o755)
    failed = waybill(checkout, "up", PATH=str(programs))
    assert failed.returncode == 1
    assert "needs Python 3.11" in failed.stderr.splitlines()[-1]


def test_a_relative_data_directory_is_the_callers(made: Path) -> None:
    said = waybill(made, "bench", WAYBILL_DATA_DIR="shop").stdout
    assert f"|{made.parent}/shop|" in said


def test_an_environment_whose_python_has_gone_is_made_anew(made: Path) -> None:
    for name in (made / ".venv/bin").glob("python*"):
        name.unlink()
    (made / "requirements.txt").write_text("# nothing\n")
    assert waybill(made, "up").returncode == 0
