"""The arrival plan."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec

from bench.plan import plan_arrivals, skewed, skewed_distinct
from bench.slo import load_slo

WORKLOAD = load_slo(Path(__file__).parents[2] / "bench/slo.toml").workload


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first = plan_arrivals(WORKLOAD, stretch=0, duration_s=20)
    assert first == plan_arrivals(WORKLOAD, stretch=0, duration_s=20)
    assert first[0].draws == (0.43393794815606856, *first[0].draws[1:])  # on every machine


def test_another_seed_or_stretch_gives_others() -> None:
    other_seed = msgspec.structs.replace(WORKLOAD, seed=1)
    plans = [
        plan_arrivals(WORKLOAD, stretch=0, duration_s=5),
        plan_arrivals(WORKLOAD, stretch=1, duration_s=5),
        plan_arrivals(other_seed, stretch=0, duration_s=5),
    ]
    assert len({plan[0].due_s for plan in plans}) == 3
    assert len({arrival.number for plan in plans[:2] for arrival in plan}) == sum(
        map(len, plans[:2])
    )


def test_rate_and_mix_are_those_asked_for() -> None:
    arrivals = plan_arrivals(WORKLOAD, stretch=0, duration_s=100)
    assert abs(len(arrivals) / (100 * WORKLOAD.rate) - 1) < 0.05
    shares = Counter(arrival.operation for arrival in arrivals)
    for operation, weight in WORKLOAD.mix.items():
        expected = weight / sum(WORKLOAD.mix.values())
        assert abs(shares[operation] / len(arrivals) - expected) < 0.02
    assert all(a.due_s <= b.due_s for a, b in pairwise(arrivals))


def test_uniform_arrivals_keep_one_distance() -> None:
    uniform = msgspec.structs.replace(WORKLOAD, arrivals="uniform")
    arrivals = plan_arrivals(uniform, stretch=0, duration_s=1)
    assert abs(arrivals[1].due_s - arrivals[0].due_s - 1 / WORKLOAD.rate) < 1e-9


def test_a_skewed_pick_stays_within_and_prefers_the_first() -> None:
    picks = Counter(skewed(draw / 10_000, 100) for draw in range(10_000))
    assert set(picks) <= set(range(100))
    assert picks[0] > 4 * picks[9] > 0
    assert skewed(0.999_999_999, 3) == 2


def test_distinct_picks_are_distinct() -> None:
    assert skewed_distinct([0.0, 0.0, 0.0], 3) == [0, 1, 2]
    assert skewed_distinct([0.999, 0.999], 3) == [2, 0]
