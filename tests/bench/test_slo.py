"""The SLO file: what it may say, and how it refuses what it may not."""

from pathlib import Path

import pytest

from bench.slo import SloError, load_slo, parse_good, seconds

SHIPPED = Path(__file__).parents[2] / "bench/slo.toml"


def test_the_shipped_file_is_read() -> None:
    slo = load_slo(SHIPPED)
    assert slo.workload.order_rate > 0
    assert slo.probe is not None


def test_what_is_given_replaces_the_file() -> None:
    workload = load_slo(SHIPPED, rate=50, duration_s=999, seed=3).workload
    assert (workload.rate, workload.seed) == (50, 3)
    assert seconds(workload.duration) == seconds(workload.max_duration) == 999


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rate = 150", "rate = 150\nrates = 1", "rates"),
        ("[validity]", "[validity]\nlateness = 1", "lateness"),
        ('name = "writes-fast"', 'name = "writes-fast"\ntresholds = 2', "tresholds"),
        ("rate = 150", 'rate = "150"', "rate"),
        ("seed = 20261120", "", "seed"),
        ('warmup = "10s"', 'warmup = "10 s"', "warmup"),
        ('warmup = "10s"', 'warmup = "90s"', "workload"),
        ("in_flight_max = 2000", "in_flight_max = 100", "in_flight_max"),
        ("conservation = true", "conservation = false", "conservation"),
        ("browse_stock = 20", "brows_stock = 20", "brows_stock"),
        ('events = ["place_order"]', 'events = ["place_orders"]', "place_orders"),
        ("lag_high_ms <= 500", "lag_high_ms >= 500", "lag_high_ms"),
        ("response_ms <= 100", "open('x')", "open"),
        ("status == 201 and", "status == 201 or", "or"),
        ("target = 1.0 ", "target = 0.9 ", "acked_exactly_once"),
        ('max_duration = "180s"', 'max_duration = "9999m"', "max_duration"),
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1", "schema = ", "line"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = SHIPPED.read_text()
    assert old in text
    path = tmp_path / "slo.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SloError, match=named):
        load_slo(path)


def test_a_condition_is_the_conjunction_of_its_clauses() -> None:
    good = parse_good("status in (200, 304) and response_ms <= 50", latency="response_ms")
    assert good(200, 50.0)
    assert good(304, 1.0)
    assert not good(200, 50.1)
    assert not good(404, 1.0)
