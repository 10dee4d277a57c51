"""API keys are made, listed and ended from the command line; the key itself is shown once."""

import os
import re
import subprocess
import sys

from app.settings import ROOT


def keys(postgres_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", "keys", *arguments],
        cwd=ROOT,
        env=os.environ | {"WAYBILL_POSTGRES_URL": postgres_url},
        capture_output=True,
        text=True,
        check=False,
    )


def create(postgres_url: str, *more: str) -> tuple[str, str]:
    scopes = ("--scope", "orders:read", "--scope", "orders:write")
    made = keys(postgres_url, "create", "--owner", "shop", "--name", "till 1", *scopes, *more)
    found = re.fullmatch(r"key id: (\S+)\nkey: +(wb_\S+)   \(shown this once\)\n", made.stdout)
    assert found, made.stderr
    return found[1], found[2]


def test_a_key_is_shown_once_and_listed_without_its_secret(postgres_url: str) -> None:
    key_id, key = create(postgres_url, "--requests-per-minute", "120")
    listed = keys(postgres_url, "list").stdout
    assert key not in listed
    assert key_id in listed
    for shown in (key[:8], "shop", "till 1", "120/min", "active", "orders:read", "orders:write"):
        assert shown in listed


def test_a_key_can_end_by_itself_or_by_hand(postgres_url: str) -> None:
    create(postgres_url, "--expires-in-days", "1")
    key_id, _ = create(postgres_url)
    assert keys(postgres_url, "revoke", key_id).stdout == f"{key_id} is revoked\n"
    assert keys(postgres_url, "list").stdout.count("  ends ") == 2
    again = keys(postgres_url, "revoke", key_id)
    assert again.returncode == 1
    assert again.stderr == f"waybill: there is no active key {key_id}\n"


def test_an_unknown_scope_is_one_line_that_names_the_known_ones(postgres_url: str) -> None:
    refused = keys(postgres_url, "create", "--owner", "a", "--name", "b", "--scope", "everything")
    assert refused.returncode == 1
    assert refused.stderr.startswith("waybill: unknown scope everything; known are customers:write")
    assert refused.stderr.count("\n") == 1


def test_a_database_out_of_reach_is_one_line() -> None:
    refused = keys("postgresql://waybill@/waybill?host=/nowhere", "list")
    assert refused.returncode == 1
    assert refused.stderr.startswith("waybill: the database does not answer")
    assert refused.stderr.count("\n") == 1
