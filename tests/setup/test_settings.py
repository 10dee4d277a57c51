"""Settings come from WAYBILL_* variables, and a slip of the finger is told."""

from pathlib import Path

import pytest

from app.settings import Settings, SettingsError, client_url, read_settings, server_urls


def test_nothing_set_is_a_laptop() -> None:
    assert read_settings({"HOME": "/home/ada"}) == Settings()


def test_every_setting_can_be_set() -> None:
    given = {
        "WAYBILL_POSTGRES_URL": "postgresql://db/waybill",
        "WAYBILL_REDIS_URL": "rediss://cache",
        "WAYBILL_DATA_DIR": "/srv/waybill",
        "WAYBILL_HOST": "::",
        "WAYBILL_PORT": "80",
        "WAYBILL_WORKERS": "2",
        "WAYBILL_WEBS": "3",
        "WAYBILL_OTLP_ENDPOINT": "http://collector:4318",
        "WAYBILL_TRACE_RATIO": "1",
        "WAYBILL_LOG_LEVEL": "debug",
        "WAYBILL_WORKER_METRICS_PORT": "9100",
    }
    settings = read_settings(given)
    assert settings == Settings(
        postgres_url="postgresql://db/waybill",
        redis_url="rediss://cache",
        data_dir=Path("/srv/waybill"),
        host="::",
        port=80,
        workers=2,
        webs=3,
        otlp_endpoint="http://collector:4318",
        trace_ratio=1.0,
        log_level="debug",
        worker_metrics_port=9100,
    )
    assert len(given) == len(Settings.__struct_fields__)


def test_an_empty_variable_counts_as_unset() -> None:
    assert read_settings({"WAYBILL_OTLP_ENDPOINT": "", "WAYBILL_PORT": ""}) == Settings()


def test_what_up_writes_for_its_clients_is_no_slip() -> None:
    assert read_settings({"WAYBILL_URL": "http://x", "WAYBILL_API_KEY": "wb_x"}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WAYBILL_PROT", "8000"),
        ("WAYBILL_PORT", "eighty"),
        ("WAYBILL_PORT", "0"),
        ("WAYBILL_PORT", "65536"),
        ("WAYBILL_WORKERS", "1.5"),
        ("WAYBILL_WEBS", "65"),
        ("WAYBILL_TRACE_RATIO", "nan"),
        ("WAYBILL_TRACE_RATIO", "1.1"),
        ("WAYBILL_LOG_LEVEL", "loud"),
        ("WAYBILL_OTLP_ENDPOINT", "collector:4318"),
        ("WAYBILL_REDIS_URL", "localhost"),
    ],
)
def test_a_slip_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        read_settings({name: value})
    assert "\n" not in str(caught.value)


def test_a_refused_address_is_not_repeated_since_it_may_hold_a_password() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"WAYBILL_POSTGRES_URL": "mysql://ada:geheim@db"})
    assert "geheim" not in str(caught.value)


def test_a_process_that_needs_servers_says_which_address_is_missing() -> None:
    with pytest.raises(SettingsError, match="WAYBILL_REDIS_URL"):
        server_urls(Settings(postgres_url="postgresql://db"))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("waybill.example", "http://waybill.example:8000"),
    ],
)
def test_a_process_that_listens_everywhere_is_found_at_home(host: str, url: str) -> None:
    assert client_url(Settings(host=host)) == url
