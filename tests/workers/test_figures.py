"""The figures of a server of several processes, as users see them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.server.helpers import TIMEOUT, Client, eventually
from tests.server.process import ServerProcess
from zcproto.auth import UserFile
from zcproto.cli.control import ControlError, require_control
from zcproto.common.home import Home
from zcproto.common.roles import OPERATORS

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[server]
hang_timeout = "1h"

[http]
metrics = "open"
"""


@pytest.fixture
def server(home: Path, certs: Path, key: str) -> Iterator[ServerProcess]:
    with ServerProcess(home, certs, "--workers", "2") as server:
        yield server


@pytest.fixture
def key(home: Path) -> str:
    return UserFile(home / "users.toml").add("ada", roles=OPERATORS)


def get(server: ServerProcess, path: str) -> tuple[int, str]:
    context = ssl.create_default_context(cafile=server.home / "certs" / "ca.crt")
    try:
        with urllib.request.urlopen(f"https://localhost:{server.port}{path}", context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(server: ServerProcess) -> dict[tuple[str, ...], float]:
    status, text = get(server, "/metrics")
    assert status == 200, text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def metrics_of_all(server: ServerProcess, echoes: int) -> dict[tuple[str, ...], float]:
    """Return the metrics once every process has answered and those echoes are counted.

    A busy machine may delay a process, and a report is used again for a moment.
    """
    found: dict[tuple[str, ...], float] = {}

    def is_whole() -> bool:
        found.update(metrics(server))
        is_up = all(found["zcproto_worker_up", name] for name in ALL)
        return is_up and found["zcproto_method_calls_total", "echo"] >= echoes

    eventually(is_whole)
    return found


def status_of(server: ServerProcess) -> dict[str, Any]:
    with contextlib.closing(require_control(Home(server.home), TIMEOUT)) as control:
        status: dict[str, Any] = control.get("/v1/status")
    return status


def states(server: ServerProcess) -> dict[str, str]:
    return {line["worker"]: line["state"] for line in status_of(server)["workers"]}


def status_of_all(server: ServerProcess) -> dict[str, Any]:
    """Return the status once every process has answered."""
    status: dict[str, Any] = {}

    def is_whole() -> bool:
        status.update(status_of(server))
        return {line["worker"]: line["state"] for line in status["workers"]} == ALL

    eventually(is_whole)
    return status


def pid_of(server: ServerProcess, name: str) -> int:
    """Return the process id of a worker once all answer."""
    pid = next(line["pid"] for line in status_of_all(server)["workers"] if line["worker"] == name)
    assert isinstance(pid, int)
    assert pid > 1
    return pid


ALL = {"coordinator": "serving", "1": "serving", "2": "serving"}


def test_drain_reports_the_connections_of_all_workers(server: ServerProcess, key: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client("ada", key)) for _ in range(4)]
        for client in clients:
            client.call("echo", {})
        eventually(lambda: status_of(server)["connections"]["zcp"] == 4)
        with contextlib.closing(require_control(Home(server.home), TIMEOUT)) as control:
            assert control.post("/v1/drain", timeout=5)["connections"] == 4


def test_any_worker_reports_the_whole(server: ServerProcess, key: str) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.client("ada", key))
        clients = [first]
        for _ in range(7):
            client = stack.enter_context(server.client())
            client.token = first.token
            clients.append(client)
        for client in clients:
            client.call("echo", {})
        found = metrics_of_all(server, 8)
        assert found["zcproto_method_calls_total", "echo"] == 8
        assert found["zcproto_connections",] == 8
        assert found["zcproto_sessions_opened_total",] == found["zcproto_sessions", "live"] == 1
        by_worker = [found["zcproto_worker_requests_total", name] for name in "12"]
        assert sum(by_worker) == found["zcproto_requests_total",] == 9
        assert found["zcproto_limit_use", "limits.max_connections"] >= 8
        status = status_of_all(server)
        assert status["connections"]["zcp"] == 8
        assert status["pid"] == server.process.pid
        assert status["requests"]["total"] == 9
        assert status["sessions"]["live"] == 1
        assert {line["pid"] for line in status["workers"]}.isdisjoint({status["pid"]})
        for client in clients:

            def stats(client: Client = client) -> tuple[int, int, int]:
                found = client.call("server.stats", {})
                return found["connections"], found["sessions"], len(found["workers"])

            eventually(lambda stats=stats: stats() == (8, 1, 3))  # a process may answer too late
    assert json.loads(get(server, "/readyz")[1])["ready"]


def test_counters_do_not_go_backwards_when_processes_are_killed(server: ServerProcess, key: str) -> None:
    with server.client("ada", key) as client:
        for _ in range(20):
            client.call("echo", {})
    before = metrics_of_all(server, 20)
    for name in ("1", "coordinator", "2", "coordinator"):
        pid = pid_of(server, name)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: pid not in {line["pid"] for line in answered(server)})
        eventually(lambda: {line["worker"]: line["state"] for line in answered(server)} == ALL)
        eventually(lambda: get(server, "/metrics")[0] == 200)
        after = metrics_of_all(server, 20)
        for series in (
            "zcproto_requests_total",
            "zcproto_sessions_opened_total",
            "process_cpu_seconds_total",
        ):
            assert after[series,] >= before[series,], (name, series)
        assert after["zcproto_method_calls_total", "echo"] == 20
        before = after
    assert after["zcproto_worker_restarts_total", "1"] == 1
    assert after["zcproto_worker_restarts_total", "coordinator"] == 2


def answered(server: ServerProcess) -> list[dict[str, Any]]:
    """Return the lines of the processes; none while the coordinator is being replaced."""
    with contextlib.suppress(ControlError):
        return list(status_of(server)["workers"])
    return []


def test_server_is_not_ready_while_its_coordinator_is_stopped(home: Path, certs: Path, key: str) -> None:
    """Every login would fail, also if none is tried."""
    (home / "config.toml").write_text(CONFIG + '\n[store]\ntimeout = "250ms"\n')
    with ServerProcess(home, certs, "--workers", "2") as server:
        pid = pid_of(server, "coordinator")
        eventually(lambda: get(server, "/readyz")[0] == 200)
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: "store: it does not answer" in get(server, "/readyz")[1])
            eventually(lambda: get(server, "/readyz")[0] == 503)
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: get(server, "/readyz")[0] == 200)


def test_stopped_worker_is_named_and_the_rest_is_shown(server: ServerProcess, key: str) -> None:
    with server.client("ada", key) as client:
        client.call("echo", {})
    metrics_of_all(server, 1)
    pid = pid_of(server, "1")
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: states(server) == {**ALL, "1": "silent"})
        assert status_of(server)["requests"]["total"] == 2  # with the login, in whichever worker
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: states(server) == ALL)
