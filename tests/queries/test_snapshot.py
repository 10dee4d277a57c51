"""Snapshots and lanes, as PostgreSQL means them."""

import asyncpg
import pytest

from queries.snapshot import Reach, Snapshot, covers, parse


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("10:10:", [1, 9], [10, 11]),
        ("10:20:10,15", [9, 11, 14, 16, 19], [10, 15, 20, 21]),
        ("4294967300:4294967302:4294967300", [4294967299, 4294967301], [4294967300, 4294967302]),
    ],
)
def test_a_snapshot_contains_what_it_shows(
    text: str, inside: list[int], outside: list[int]
) -> None:
    snapshot = Snapshot(text)
    assert [xid for xid in inside if xid not in snapshot] == []
    assert [xid for xid in outside if xid in snapshot] == []


async def test_it_agrees_with_postgresql(asyncpg_pool: asyncpg.Pool) -> None:
    rows = await asyncpg_pool.fetch(
        "SELECT xid, pg_visible_in_snapshot(xid::text::xid8, '90:120:90,93,110,119') AS visible"
        " FROM generate_series(80, 130) AS xid"
    )
    snapshot = parse("90:120:90,93,110,119")
    assert [(row["xid"] in snapshot) == row["visible"] for row in rows] == [True] * 51


@pytest.mark.parametrize(
    ("earlier", "later"),
    [("10:10:", "10:11:"), ("10:20:10", "11:20:"), ("10:20:10,12,15", "10:20:10,15")],
)
def test_the_later_snapshot_is_known(earlier: str, later: str) -> None:
    assert Snapshot(earlier).order < Snapshot(later).order


def test_a_lane_never_goes_back() -> None:
    reach = Reach()
    reach.is_complete = True
    assert reach.advance({0: parse("20:20:")})
    assert not reach.advance({0: parse("10:10:")})
    assert 19 in reach


def test_a_transaction_is_there_when_every_lane_has_it() -> None:
    reach = Reach()
    reach.is_complete = True
    reach.advance({0: parse("20:20:"), 1: parse("10:10:")})
    assert 9 in reach
    assert 15 not in reach
    reach.advance({1: parse("15:30:15,16")})
    assert 15 not in reach
    reach.advance({1: parse("16:30:16")})
    assert 15 in reach


def test_nothing_is_there_before_all_lanes_are_known() -> None:
    reach = Reach()
    reach.advance({0: parse("20:20:")})
    assert 5 not in reach


def test_a_missing_lane_is_not_covered() -> None:
    assert covers({0: parse("20:20:")}, {0: parse("10:10:")})
    assert not covers({0: parse("20:20:")}, {0: parse("10:10:"), 1: parse("1:1:")})
    assert not covers({0: parse("10:10:")}, {0: parse("20:20:")})
