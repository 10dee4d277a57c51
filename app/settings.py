"""What differs between deployments: WAYBILL_* variables, read once, and nothing else is read."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the children are started here, and the default data directory stands here."""

PROCESSES_MAX = 64
"""More web or worker processes than this on one machine is a slip of the finger."""

# Written by `up` into demo.env for its clients; whoever sourced that file may still run Waybill.
CLIENT_VARIABLES = frozenset({"WAYBILL_URL", "WAYBILL_API_KEY"})

LOG_LEVELS = ("debug", "info", "warning", "error")


class OperatorError(Exception):
    """What the person at the terminal must change. The text is one line that says it."""


class SettingsError(OperatorError):
    """A variable is unknown or has no usable value; the text names it."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one deployment; the defaults are those of `./waybill up` on a laptop."""

    postgres_url: str | None = None
    redis_url: str | None = None
    data_dir: Path = ROOT / ".waybill"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    webs: int = 1
    otlp_endpoint: str | None = None
    trace_ratio: float = 0.01
    log_level: str = "info"
    worker_metrics_port: int | None = None


def variable_of(field: str) -> str:
    """Name the environment variable of a field of `Settings`."""
    return f"WAYBILL_{field.upper()}"


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the WAYBILL_* variables; an empty one counts as unset, as Compose passes them.

    Raises:
        SettingsError: a name is unknown, or a value is out of its range.
    """
    fields = {variable_of(field): field for field in Settings.__struct_fields__}
    given: dict[str, str] = {}
    for name, text in environ.items():
        if not name.startswith("WAYBILL_") or name in CLIENT_VARIABLES:
            continue
        if name not in fields:
            raise SettingsError(f"{name} is not a setting; known are {', '.join(sorted(fields))}")
        if text:
            given[fields[name]] = text
    try:
        settings = msgspec.convert(given, Settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise SettingsError(_one_line(error, given)) from error
    _check(settings)
    return settings


def server_urls(settings: Settings) -> tuple[str, str]:
    """Return the PostgreSQL and the Redis address, for the processes that cannot do without.

    Raises:
        SettingsError: one of them is unset.
    """
    if settings.postgres_url is None:
        raise SettingsError("WAYBILL_POSTGRES_URL is not set; `up` brings servers of its own")
    if settings.redis_url is None:
        raise SettingsError("WAYBILL_REDIS_URL is not set; `up` brings servers of its own")
    return settings.postgres_url, settings.redis_url


def client_url(settings: Settings) -> str:
    """Return the address under which a client on this machine finds the web process."""
    # A process that listens everywhere is reached at home.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _decode(wanted: type, value: object) -> object:
    if wanted is Path:
        return Path(str(value)).expanduser().absolute()
    raise NotImplementedError(wanted)


def _one_line(error: msgspec.ValidationError, given: Mapping[str, str]) -> str:
    # msgspec ends its text with the place of the fault: "Expected `int`, got `str` - at `$.port`".
    what, _, field = str(error).removesuffix("`").rpartition(" - at `$.")
    if field not in given:
        return str(error)
    return f"{variable_of(field)}={given[field]!r} cannot be used: {what}"


def _check(settings: Settings) -> None:
    _check_url("postgres_url", settings.postgres_url, ("postgresql", "postgres"))
    _check_url("redis_url", settings.redis_url, ("redis", "rediss", "unix"))
    _check_url("otlp_endpoint", settings.otlp_endpoint, ("http", "https"))
    _check_range("port", settings.port, 1, 65535)
    _check_range("worker_metrics_port", settings.worker_metrics_port, 1, 65535)
    _check_range("workers", settings.workers, 1, PROCESSES_MAX)
    _check_range("webs", settings.webs, 1, PROCESSES_MAX)
    _check_range("trace_ratio", settings.trace_ratio, 0, 1)
    if settings.log_level not in LOG_LEVELS:
        raise SettingsError(f"WAYBILL_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}")


def _check_url(field: str, url: str | None, schemes: tuple[str, ...]) -> None:
    # The value itself is not repeated: it may hold a password.
    if url is not None and urlsplit(url).scheme not in schemes:
        raise SettingsError(f"{variable_of(field)} must start with {' or '.join(schemes)}://")


def _check_range(field: str, value: float | None, low: int, high: int) -> None:
    # The negation also refuses NaN, which no comparison holds for.
    if value is not None and not low <= value <= high:
        raise SettingsError(f"{variable_of(field)} must be between {low} and {high}")
