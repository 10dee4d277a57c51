"""Habits that no linter knows: where things stand and what they are called."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("app", "bench", "commands", "migrations", "projections", "queries", "workers")
SERVICE = ("app", "commands", "projections", "queries", "workers")  # the others stand alone
PROCESSES = ("__main__.py", "web.py")  # where a process begins, and reads its settings
BANNED = {"base", "common", "core", "helpers", "lib", "manager", "misc", "services", "utils"}
DATABASE_CALLS = {"execute", "executemany", "fetch", "fetchrow", "fetchval", "prepare"}
BESIDE = {
    ".ci",
    ".dockerignore",
    ".gitignore",
    "CHANGELOG.md",
    "Dockerfile",
    "LICENSE",
    "README.md",
    "docker-compose.yml",
    "docs",
    "pyproject.toml",
    "requirements-dev.in",
    "requirements-dev.txt",
    "requirements.in",
    "requirements.txt",
    "tests",
    "waybill",
}
HOSTS = re.compile(r"pythonhosted|pypi\.org|registry\.npmjs|deb\.debian")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text())


def offences(rule: str) -> list[str]:
    found: list[str] = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if rule == "environ" and path.parts[0] in SERVICE and path.name not in PROCESSES:
                if is_environment(node):
                    found.append(f"{path}:{getattr(node, 'lineno', 0)} reads the environment")
            elif rule == "sql" and is_built_sql(node):
                found.append(
                    f"{path}:{getattr(node, 'lineno', 0)} gives SQL that is not a constant"
                )
    return found


def is_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}


def is_built_sql(node: ast.AST) -> bool:
    """A database call whose statement is glued together on the spot."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in DATABASE_CALLS
        and bool(node.args)
        and isinstance(node.args[0], ast.JoinedStr | ast.BinOp)
    )


def test_packages_export_nothing() -> None:
    full = [
        path for path, _ in sources() if path.name == "__init__.py" and (ROOT / path).stat().st_size
    ]
    assert full == []


def test_no_module_is_a_drawer() -> None:
    assert [
        path for path, _ in sources() if path.stem in BANNED or path.parent.name in BANNED
    ] == []


def test_every_module_says_what_is_in_it() -> None:
    silent = [
        path
        for path, tree in sources()
        if path.name != "__init__.py" and not ast.get_docstring(tree)
    ]
    assert silent == []


@pytest.mark.parametrize("rule", ["sql", "environ"])
def test_no_rule_is_broken(rule: str) -> None:
    assert offences(rule) == []


@pytest.mark.parametrize("code", ['c.execute(f"SELECT {x}")', 'c.fetch("SELECT " + x)'])
def test_built_sql_is_noticed(code: str) -> None:
    assert any(is_built_sql(node) for node in ast.walk(ast.parse(code)))


def test_a_look_at_the_environment_is_noticed() -> None:
    assert any(is_environment(node) for node in ast.walk(ast.parse("os.environ['HOME']")))


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()


def test_the_top_level_is_the_agreed_one() -> None:
    assert {name.split("/")[0] for name in tracked()} <= {*ROOMS, *BESIDE}


def test_no_file_names_a_package_host() -> None:
    texts = [name for name in tracked() if not name.endswith((".png", "test_house_rules.py"))]
    named = [name for name in texts if HOSTS.search((ROOT / name).read_text(errors="replace"))]
    assert named == []
