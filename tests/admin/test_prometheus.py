"""A real Prometheus scrapes a server and evaluates the alert rules and the dashboard."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.server_process import free_port
from docs.dashboard import PANELS
from tests.interop.support import needs
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.cli import main
from zcproto.observe.metrics import METRICS
from zcproto.sessions.token import token_text

DEPLOY = Path(__file__).parents[2] / "zcproto" / "deploy"

pytestmark = [needs("prometheus"), pytest.mark.timeout(180)]


class Prometheus:
    """A running Prometheus with its HTTP API."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, what: str, **query: str) -> Any:
        url = f"{self._address}{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            value = json.load(answer)
        assert value["status"] == "success", value
        return value["data"]

    def is_up(self) -> bool:
        try:
            self.get("status/runtimeinfo")
        except OSError:
            return False
        return True

    def target(self) -> dict[str, Any]:
        """Return the one scrape target."""
        (target,) = self.get("targets")["activeTargets"] or [{"health": "unknown", "lastError": ""}]
        return dict(target)

    def value(self, expression: str) -> float | None:
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds; poll ten times a second, since it concerns another process."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.1)


@contextmanager
def prometheus(folder: Path, server: ServerThread, token: str | None) -> Iterator[Prometheus]:
    """Start a Prometheus that scrapes a server all the time, with the alert rules."""
    job: dict[str, Any] = {
        "job_name": "zcproto",
        "scheme": "https",
        "tls_config": {"ca_file": str(server.home / "certs" / "ca.crt"), "server_name": "localhost"},
        "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}],
    }
    if token is not None:
        (folder / "token").write_text(token)
        job["authorization"] = {"credentials_file": str(folder / "token")}
    settings = {
        "global": {"scrape_interval": "5s", "scrape_timeout": "5s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
        "scrape_configs": [job],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            witness = Prometheus(port)
            until(lambda: process.poll() is not None or witness.is_up())
            assert process.poll() is None, (folder / "log").read_text()
            yield witness
        finally:
            process.kill()
            process.wait(TIMEOUT)


def expressions() -> dict[str, str]:
    """Return the queries of the dashboard as Grafana sends them."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": re.sub(
            r"\$(job|instance)", ".*", target["expr"].replace("$__rate_interval", "1m")
        )
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }


def test_prometheus_scrapes_with_a_token_and_evaluates_all_expressions(serve: Serve, tmp_path: Path) -> None:
    server = serve(store__url="sqlite")
    with (
        server.client("prometheus") as client,
        prometheus(tmp_path, server, token_text(client.token)) as witness,
    ):
        for _ in range(10):
            client.echo()
        client.call("sleep", {"ms": 1})
        until(lambda: (witness.value('zcproto_method_calls_total{method="echo"}') or 0) >= 10)
        until(lambda: witness.target()["health"] == "up")
        known = {name for name in witness.get("label/__name__/values") if name.startswith("zcproto_")}
        assert {re.sub("_(bucket|sum|count)$", "", name) for name in known} <= METRICS.keys()
        assert len(known) > 50
        types = {name: entries[0]["type"] for name, entries in witness.get("metadata").items()}
        for metric in METRICS.values():
            if metric.name in known:
                assert types.get(metric.name.removesuffix("_total"), types.get(metric.name)) == metric.kind

        until(lambda: witness.value("rate(zcproto_http_responses_total[1m])") is not None)
        assert {
            title for title, expression in expressions().items() if witness.value(expression) is None
        } <= {
            *(f"{panel.title} A" for panel in PANELS["Workers"]),  # only with several
            "Errors by code A",  # present only after an error
            "TLS failures by cause A",
            "Certificates: events per day A",
            "Connections ended A",
            "Frames refused A",
            "Tokens looked up A",
            "Topics: events A",  # present only for applications with topics
            "Topics: events B",
            "Topics: events C",
            "Topics: events D",
            "Durable runs A",  # present only with durable methods
            "Durable runs B",
            "Durable runs: ends A",
            "Topics: subscribers A",
        }
        rules = [rule for group in witness.get("rules")["groups"] for rule in group["rules"]]
        assert len(rules) >= 18
        until(
            lambda: all(
                rule["health"] == "ok" for group in witness.get("rules")["groups"] for rule in group["rules"]
            ),
        )
        firing = {alert["labels"]["alertname"] for alert in witness.get("alerts")["alerts"]}
        assert firing <= {"ZcprotoLoopLag"}  # a busy machine delays the event loop


def test_prometheus_with_a_bad_token_is_refused(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with prometheus(tmp_path, server, token_text(bytes(range(32)))) as witness:
        until(lambda: "401" in witness.target()["lastError"])
        assert witness.target()["health"] == "down"


def test_prometheus_scrapes_with_a_token_of_a_machine_until_it_is_revoked(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(http__metrics="token")
    assert main(["token", "create", "prometheus", "--scope", "metrics", "--home", str(server.home)]) == 0
    with prometheus(tmp_path, server, capsys.readouterr().out) as witness:
        until(lambda: witness.value("zcproto_build_info") == 1)
        until(lambda: witness.target()["health"] == "up")
        assert main(["token", "revoke", "prometheus", "--home", str(server.home)]) == 0
        until(lambda: "401" in witness.target()["lastError"])
        assert witness.target()["health"] == "down"


def test_prometheus_scrapes_from_an_allowed_address(serve: Serve, tmp_path: Path) -> None:
    server = serve(http__metrics="address", http__allow=["127.0.0.1/32"])
    with prometheus(tmp_path, server, None) as witness:
        until(
            lambda: witness.value("zcproto_build_info") == 1
        )  # the target is up shortly before its samples are stored
        until(lambda: witness.target()["health"] == "up")
