"""docker-compose.yml and the Dockerfile hold what the program needs, and no secret."""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from app.servers import POSTGRES_SETTINGS, VALKEY_SETTINGS
from app.settings import CLIENT_VARIABLES, ROOT, Settings, read_settings, variable_of

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

OURS = ("migrate", "web", "worker")
ONE_SHOT = ("migrate",)

# ${NAME}, ${NAME:-default}, ${NAME:?error}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<rule>:[-?][^}]*)?\}")

# Of the embedded server alone: there are no sockets to share and no titles to read in a container.
EMBEDDED_ONLY = {"cluster_name", "listen_addresses", "unix_socket_permissions"}


def settings_of(service: str) -> dict[str, str]:
    environment: dict[str, str] = SERVICES[service]["environment"]
    return {name: VARIABLE.sub(default_of, value) for name, value in environment.items()}


def default_of(variable: re.Match[str]) -> str:
    rule: str = variable["rule"] or ""
    return rule.removeprefix(":-") if rule.startswith(":-") else "given"


def test_the_file_meets_the_compose_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, "docker-compose.yml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", OURS)
def test_every_setting_has_its_line_and_can_be_read(service: str) -> None:
    given = settings_of(service)
    assert set(given) == {variable_of(field) for field in Settings.__struct_fields__}
    settings = read_settings(given)
    assert settings.postgres_url == "postgresql://waybill:given@postgres/waybill"
    assert settings.host == "0.0.0.0"


def test_the_load_suite_gets_an_address_and_a_key() -> None:
    assert set(SERVICES["load"]["environment"]) == CLIENT_VARIABLES
    assert SERVICES["load"]["profiles"] == ["load"]


@pytest.mark.parametrize("service", OURS)
def test_every_command_is_a_verb_of_the_command_line(service: str) -> None:
    (verb,) = SERVICES[service]["command"]
    done = subprocess.run(
        [sys.executable, "-m", "app", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(rf"^ +{verb} ", done.stdout, re.MULTILINE)
    assert verb in {"migrate", "web", "worker"}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_limited(service: str) -> None:
    limits = SERVICES[service]["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory"}
    assert SERVICES[service]["logging"]["options"]["max-size"]


@pytest.mark.parametrize("service", sorted(set(SERVICES) - set(ONE_SHOT)))
def test_every_service_that_stays_has_a_health_check(service: str) -> None:
    check = SERVICES[service]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= set(check)


@pytest.mark.parametrize("service", SERVICES)
def test_every_image_is_ours_or_has_a_version(service: str) -> None:
    name, _, version = SERVICES[service]["image"].partition(":")
    assert ("build" in SERVICES[service]) == (not version)
    assert version != "latest", name


def test_two_web_and_two_worker_replicas_wait_for_the_schema() -> None:
    for service in ("web", "worker"):
        assert SERVICES[service]["deploy"]["replicas"] == 2
        waits_for = SERVICES[service]["depends_on"]["migrate"]["condition"]
        assert waits_for == "service_completed_successfully"


def test_the_proxy_asks_each_replica_whether_it_is_ready() -> None:
    rules = COMPOSE["configs"]["haproxy"]["content"]
    assert "uri /health/ready" in rules
    assert f"web:{settings_of('web')['WAYBILL_PORT']} resolvers docker" in rules


def test_only_this_machine_reaches_the_ports() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_database_is_set_up_like_the_embedded_one() -> None:
    given = dict(
        option.removeprefix("-c").split("=", 1) for option in SERVICES["postgres"]["command"]
    )
    assert given.pop("client_connection_check_interval") == "1s"
    wanted = {name: value for name, value in POSTGRES_SETTINGS.items() if name not in EMBEDDED_ONLY}
    assert given == wanted


def test_the_cache_is_set_up_like_the_embedded_one() -> None:
    program, *options = SERVICES["valkey"]["command"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert program == "valkey-server"
    assert given == {
        f"--{name}": VALKEY_SETTINGS[name]
        for name in ("save", "appendonly", "maxmemory", "maxmemory-policy")
    }


def test_no_secret_stands_in_the_file_and_none_has_a_default() -> None:
    for variable in VARIABLE.finditer(TEXT):
        if re.search("PASSWORD|SECRET|TOKEN", variable["name"]):
            assert (variable["rule"] or "").startswith(":?"), variable[0]
        if "KEY" in variable["name"]:
            assert variable["rule"] in {":-", None}, variable[0]
    literal = VARIABLE.sub("", TEXT)
    assert re.findall(r"://\w+:([^@/\s]+)@", literal) == []
    assert re.findall(r"(?i)(?:password|secret|token): *[^\s/]", literal) == []
    assert COMPOSE["secrets"] == {"postgres_password": {"environment": "POSTGRES_PASSWORD"}}


def test_the_image_is_built_in_stages_and_runs_as_an_ordinary_user() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} <= {
        stage for _, stage in stages
    }
    assert len(stages) == len(re.findall(r"^FROM", DOCKERFILE, re.MULTILINE)) > 2
    for target in ("waybill", "load"):
        stage = DOCKERFILE.split(f"AS {target}\n")[1].split("\nFROM")[0]
        assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stage, re.MULTILINE)
        assert "COPY . " not in stage


def test_the_image_is_given_what_it_copies() -> None:
    copied = set(re.findall(r"^COPY (?!--)(\S+)", DOCKERFILE, re.MULTILINE))
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
