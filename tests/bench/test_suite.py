"""The load suite as its users start it: Locust, a server, a verdict, an exit code."""

from collections.abc import Callable
from pathlib import Path

from tests.bench.conftest import Offer
from tests.bench.fake_waybill import Faults

Fake = Callable[[Faults], str]


def test_a_frozen_server_shows_in_the_percentiles(fake: Fake, offer: Offer) -> None:
    """Two seconds of six; a closed loop would ask less meanwhile, and report next to nothing."""
    url = fake(Faults(freeze_after_s=2, freeze_s=2))
    ended = offer(url, rate=280, duration_s=6, browse=90)
    browse = next(each for each in ended.result["latencies"] if each["operation"] == "browse_stock")
    assert browse["response"]["p99"] > 1500
    assert browse["service"]["p99"] > 1500, "the server's delay is not the generator's lateness"
    assert ended.result["rates"]["offered"] > 0.9 * 280, "the plan is kept while the server stands"


def test_writes_that_show_late_are_seen_late(fake: Fake, offer: Offer) -> None:
    ended = offer(fake(Faults(visible_after_s=0.3)), duration_s=2.5)
    lag = ended.result["lag"]
    assert lag["low"]["p50"] <= 300 <= lag["high"]["p50"]
    assert lag["low"]["p50"] > 100, "the lower bound says something"
    assert lag["unseen"] == 0
    assert (ended.code, ended.result["verdict"]) == (0, "PASS")
    assert ended.out.lstrip().startswith("PASS (exit 0)"), "the verdict comes first"


def test_a_server_that_loses_acknowledged_orders_fails(fake: Fake, offer: Offer) -> None:
    ended = offer(fake(Faults(lose_every=10)), duration_s=1.5)
    assert ended.result["judged"]["audit"]["missing"] > 0
    assert (ended.code, ended.result["verdict"]) == (1, "FAIL")


def test_a_listener_that_burns_exits_2(fake: Fake, offer: Offer, tmp_path: Path) -> None:
    """Locust swallows what a listener raises; the exit code must not say that all is well."""
    burnt = tmp_path / "burnt.py"
    burnt.write_text(
        "from bench import locustfile\n"
        "from bench.locustfile import OpenModel, PlanShape\n"
        "def burn(*_):\n"
        "    raise RuntimeError('burnt')\n"
        "locustfile.render = burn\n"
    )
    ended = offer(fake(Faults()), duration_s=1.5, locustfile=str(burnt))
    assert ended.code == 2
    assert ended.result["verdict"] != "ERROR", "it burnt after the verdict, which would have been"


def test_a_server_that_is_not_there_exits_2(offer: Offer) -> None:
    ended = offer("http://127.0.0.1:9")
    assert (ended.code, ended.result["verdict"]) == (2, "ERROR")


def test_an_slo_file_with_a_fault_exits_2_and_names_it(offer: Offer) -> None:
    ended = offer("http://127.0.0.1:9", slo="schema = 1\nservic = 'x'\n")
    assert ended.code == 2
    assert "servic" in ended.err
