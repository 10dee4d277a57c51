"""Projection lag as an interval."""

import math
from itertools import pairwise

from bench.lag import Lags, Sighting


def test_the_interval_holds_the_lag_whatever_the_polling() -> None:
    """Committed at 10.005, visible at 10.3; looked for at 10.1, 10.2 and 10.32."""
    sighting = Sighting(sent=10.0, acked=10.01)
    sighting.blind(sent=10.1)
    sighting.blind(sent=10.2)
    sighting.seen(received=10.33)
    low_ms, high_ms = sighting.interval_ms()
    assert abs(low_ms - 190) < 1e-6
    assert abs(high_ms - 330) < 1e-6
    assert low_ms <= 295 <= high_ms


def test_a_write_seen_at_once_has_a_lag_of_nothing_at_least() -> None:
    sighting = Sighting(sent=10.0, acked=10.01)
    sighting.seen(received=10.012)
    assert sighting.interval_ms()[0] == 0


def test_a_write_never_seen_has_no_upper_bound() -> None:
    sighting = Sighting(sent=10.0, acked=10.01)
    sighting.blind(sent=12.01)
    low_ms, high_ms = sighting.interval_ms()
    assert abs(low_ms - 2000) < 1e-6
    assert high_ms == math.inf


def test_of_several_readers_the_first_that_sees_counts() -> None:
    sighting = Sighting(sent=10.0, acked=10.0)
    sighting.seen(received=10.3)
    sighting.seen(received=10.4)
    sighting.blind(
        sent=10.35
    )  # on its way when another saw; its answer came from a lagging replica
    low_ms, high_ms = sighting.interval_ms()
    assert abs(high_ms - 300) < 1e-6
    assert low_ms <= high_ms


def test_intervals_are_kept_in_columns() -> None:
    lags = Lags()
    sighting = Sighting(sent=1.0, acked=1.1)
    sighting.seen(received=1.2)
    lags.add(0.9, sighting)
    assert len(lags) == 1
    assert next(iter(lags)).due == 0.9


def test_witnesses_are_sent_seldom_and_not_for_ever() -> None:
    moments = list(Sighting(sent=0.0, acked=0.0).witness_times())
    assert moments[0] >= 0.01
    assert moments[-1] < 10
    assert all(b / a <= 1.5 + 1e-9 for a, b in pairwise(moments))
