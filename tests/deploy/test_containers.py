"""The Containerfile, the compose file and the Kubernetes manifests: valid, restricted, and true to the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ROOT
from zcproto.admin.resources import Resources
from zcproto.cli import COMMANDS, group
from zcproto.cli.health import LIMIT_S
from zcproto.config import Config, load_config

DEPLOY = ROOT / "zcproto" / "deploy"
CONTAINERFILE = (DEPLOY / "container" / "Containerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").iterdir())
    for document in yaml.safe_load_all(path.read_text())
]
SERVICES = COMPOSE["services"]
SERVER_USER = 10_001
KUBERNETES = ("1.30", "1.37")
"""The oldest version with `preStop.sleep` switched on, and the newest with a schema."""

BYTES_PER_CONNECTION = 37 * 1024
BYTES_AT_START = 75 * 1024**2
LEFT_FOR_BUFFERS = 1.5


def named(kind: str, name: str = "zcproto") -> dict[str, Any]:
    (found,) = [each for each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found  # type: ignore[no-any-return]


def pods() -> Iterator[dict[str, Any]]:
    for each in MANIFESTS:
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["spec"]["template"]


POD = named("Deployment")["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
(VALKEY,) = named("StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", CONTAINERFILE)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def last(name: str) -> str:
    return [value for each, value in instructions() if each == name][-1]


def parsed(arguments: list[str]) -> click.Context:
    """Parse the arguments of zcproto. Raises click.UsageError if they are wrong."""
    (name,) = [each for each in arguments if each in COMMANDS]
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command.make_context(name, [each for each in arguments if each != name])


def server_config(tmp_path: Path) -> Config:
    """Return the configuration of the replicas."""
    path = tmp_path / "config.toml"
    path.write_text(named("ConfigMap")["data"]["config.toml"])
    return load_config(path, home=tmp_path, environ={})


def compose_config(tmp_path: Path) -> Config:
    """Return the configuration of the server in the compose file."""
    variables = SERVICES["server"]["environment"].items()
    return load_config(None, home=tmp_path, environ=dict(variables))


def size_of(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|[kmg])b?", text).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** ("kmg".index(unit[0].lower()) + 1)


def test_container_runs_commands_that_exist() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["zcproto"]
    assert parsed(json.loads(last("CMD"))).params["host"] == ("::", "0.0.0.0")
    check = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert check == SERVICES["server"]["healthcheck"]["test"][1:] == ["zcproto", "health"]
    assert parsed(SERVER["args"]).info_name == "serve"
    assert "health" in COMMANDS
    assert float(re.search(r"--timeout=(\d+)s", last("HEALTHCHECK"))[1]) > LIMIT_S  # type: ignore[index]
    commented = re.search(r"^# CMD (\[.+\])$", CONTAINERFILE, re.MULTILINE)
    assert commented is not None
    assert parsed(json.loads(commented[1])).params["app"] == "shop.api:app"


def test_image_does_not_run_as_root_and_has_no_build_tools() -> None:
    assert last("USER") == f"{SERVER_USER}:{SERVER_USER}"
    assert last("VOLUME") in last("ENV")
    after = instructions()[[name for name, _ in instructions()].index("FROM", 1) :]
    assert [value for name, value in after if name == "COPY"] == ["--from=build /opt/zcproto /opt/zcproto"]
    assert "pip" not in "".join(value for name, value in after if name == "RUN")


def test_probes_ask_what_the_server_answers(serve: Serve) -> None:
    server = serve()
    paths = server.in_loop(lambda: {route.path for route in Resources(server.server.parts).routes()})
    config = Config()
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = SERVER[name]["httpGet"]
        assert probe["path"] in paths
        assert (probe["scheme"], probe["port"]) == ("HTTPS", "zcp")
    assert SERVER["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert SERVER["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert SERVER["ports"] == [{"name": "zcp", "containerPort": config.server.port}]
    assert last("EXPOSE") == str(config.server.port)
    assert SERVICES["server"]["ports"] == [f"{config.server.port}:{config.server.port}"]


def test_nothing_needs_a_shell() -> None:
    text = "".join(path.read_text() for path in DEPLOY.glob("[ck]o*/*")) + yaml.dump(MANIFESTS)
    assert re.findall(r"CMD-SHELL|/bin/sh|\bbash\b", text) == []
    assert SERVER["lifecycle"]["preStop"].keys() == {"sleep"}


def test_pod_outlives_its_drain(tmp_path: Path) -> None:
    drain = server_config(tmp_path).server.drain_timeout
    pause = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= pause + drain + 5
    assert float(SERVICES["server"]["stop_grace_period"].removesuffix("s")) > Config().server.drain_timeout


def test_pods_meet_the_restricted_security_standard() -> None:
    for pod in pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
    assert POD["securityContext"]["runAsUser"] == SERVER_USER
    assert named("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_memory_suffices_for_the_connections(tmp_path: Path) -> None:
    limits = (
        (SERVER["resources"]["limits"]["memory"], server_config(tmp_path)),
        (SERVICES["server"]["mem_limit"], compose_config(tmp_path)),
    )
    for limit, config in limits:
        used = BYTES_AT_START + config.limits.max_connections * BYTES_PER_CONNECTION
        assert size_of(limit) >= LEFT_FOR_BUFFERS * used
    sessions = VALKEY["args"][VALKEY["args"].index("--maxmemory") + 1]
    assert size_of(VALKEY["resources"]["limits"]["memory"]) >= 2 * size_of(sessions)
    assert VALKEY["args"][VALKEY["args"].index("--maxmemory-policy") + 1] == "noeviction"
    assert VALKEY["args"][3:] == SERVICES["valkey"]["command"][2:]


def test_configuration_names_files_that_are_mounted(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    mounts = {each["mountPath"]: each for each in SERVER["volumeMounts"]}
    volumes = {each["name"]: each for each in POD["volumes"]}
    assert {each["name"] for each in mounts.values()} == volumes.keys()
    assert all("subPath" not in each for each in mounts.values()), "a subPath does not follow its Secret"
    users = Path(POD["initContainers"][0]["args"][-1]) / "users.toml"
    config_file = Path(SERVER["args"][1])
    assert config.store.password_file is not None
    for path in (
        *config.certificates.certificate,
        *config.certificates.key,
        config.store.password_file,
        users,
    ):
        mount = mounts[str(path.parent)]
        assert mount["readOnly"] is True
        assert volumes[mount["name"]]["secret"]["defaultMode"] == 0o440
        assert "optional" not in volumes[mount["name"]]["secret"]
    assert config_file.name in named("ConfigMap")["data"]
    assert volumes[mounts[str(config_file.parent)]["name"]]["configMap"] == {"name": "zcproto"}
    (home,) = [each["value"] for each in SERVER["env"] if each["name"] == "ZCPROTO_HOME"]
    assert Path(home).parent == Path(last("VOLUME")), "others may write to the root of a volume"
    assert POD["initContainers"][0]["args"][1] == home


def test_init_container_links_users_and_tokens(tmp_path: Path) -> None:
    container = POD["initContainers"][0]
    home, secret = tmp_path / "a" / "home", tmp_path / "secret"
    command = [*container["command"], container["args"][0], home, secret]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=TIMEOUT)
    assert (done.returncode, home.exists()) == (1, False)
    assert "has no users.toml" in done.stderr
    secret.mkdir()
    for name in ("users.toml", "tokens.toml"):
        (secret / name).touch()
        for _ in range(2):  # also when the container is started again
            subprocess.run(command, check=True, timeout=TIMEOUT)
        assert (home / name).readlink() == secret / name
        assert os.path.lexists(home / "tokens.toml") is (secret / "tokens.toml").exists()
    assert home.stat().st_mode & 0o777 == 0o700


def test_parts_refer_to_each_other(tmp_path: Path) -> None:
    labels = {pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in pods()}
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
        for each in [each for each in MANIFESTS if each["kind"] == kind]:
            spec = each["spec"]
            selector = spec.get("podSelector", spec.get("selector"))
            chosen = selector.get("matchLabels", selector)["app.kubernetes.io/name"]
            assert chosen == each["metadata"]["name"]
            assert chosen in labels
    namespaces = {each["metadata"].get("namespace") for each in MANIFESTS} - {None}
    assert namespaces == {named("Namespace")["metadata"]["name"]}
    config = server_config(tmp_path)
    assert config.store.url == f"valkey://valkey:{named('Service', 'valkey')['spec']['ports'][0]['port']}"
    (rule,) = named("NetworkPolicy", "valkey")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "zcproto"}}}]
    assert named("Deployment")["spec"]["replicas"] > named("PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_environment_of_the_compose_file_is_a_valid_configuration(tmp_path: Path) -> None:
    store = compose_config(tmp_path).store
    assert store.url == "valkey://valkey:6379"
    assert store.password_file == Path("/run/secrets") / SERVICES["server"]["secrets"][0]
    assert SERVICES["valkey"]["command"][1] == f"/run/secrets/{SERVICES['valkey']['secrets'][0]}"
    assert {each for service in SERVICES.values() for each in service["secrets"]} == COMPOSE["secrets"].keys()
    assert "environment" not in SERVICES["valkey"]
    assert SERVICES["server"]["networks"] == ["clients", "store"]
    assert SERVICES["valkey"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"] == {"internal": True}


def test_images_have_one_version() -> None:
    assert SERVICES["valkey"]["image"] == VALKEY["image"]
    assert {each["image"] for each in [*POD["initContainers"], *POD["containers"]]} == {SERVER["image"]}
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    version = re.search(r"python:(3\.\d+)-slim", CONTAINERFILE)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in python


# --- by other programs: .ci/container installs them ------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_fit_the_schemas_of_kubernetes(version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in MANIFESTS:
        assert schemas.validate(document, version, strict=True)
    # Counter-check: an unknown field is refused.
    wrong = {**named("Service"), "spce": {}}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(wrong, version, strict=True)


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
def test_compose_accepts_its_file() -> None:
    command = ["docker-compose", "--file", str(DEPLOY / "compose" / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_headless_service_names_the_pods_of_its_stateful_set() -> None:
    service = named("Service", "valkey")
    assert service["spec"]["clusterIP"] == "None"
    assert named("StatefulSet", "valkey")["spec"]["serviceName"] == service["metadata"]["name"]


def test_pod_monitor_scrapes_each_pod_with_a_machine_token(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "PodMonitor" in each]
    spec = yaml.safe_load(block)["spec"]
    labels = named("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = spec["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["scheme"]) == (SERVER["ports"][0]["name"], "https")
    assert server_config(tmp_path).http.metrics == "token"


def test_hadolint_accepts_the_containerfile() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs hadolint")
    command = [program, "--failure-threshold", "style", str(DEPLOY / "container" / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (0, "")
