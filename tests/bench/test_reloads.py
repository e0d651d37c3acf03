"""The tool that reloads a server under load: it passes where it should, and sees what is wrong."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bench.reloads as module
from bench.reloads import CHANGES, FAULTY, ReloadPlan, Report, Settings, main, measure
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.config.changes import TAKES_EFFECT, Effect
from zcproto.errors import ConfigError
from zcproto.load.result import Verdict

QUICK = ReloadPlan(reloads=10, connections=10, rate=200.0, interval_s=0.1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return Home(path)


def run(home: Home, plan: ReloadPlan = QUICK) -> Report:
    return measure(home, plan, Console(file=io.StringIO()), lambda line: None)[0]


def failing(report: Report, plan: ReloadPlan = QUICK) -> set[str]:
    return {figure.name for figure in report.figures(plan) if not figure.holds}


def test_every_change_is_one_that_takes_no_restart_and_the_files_are_sound(home: Home) -> None:
    settings = Settings(home, 10)
    before = load_config(None, home=home.path, environ={})
    changed: set[str] = set()
    for _ in range(2 * len(CHANGES)):
        changed |= settings.change()
        load_config(None, home=home.path, environ={})
    assert all(TAKES_EFFECT[key] is not Effect.RESTART for key in changed)
    assert load_config(None, home=home.path, environ={}) == before  # each went back and forth
    settings.write(FAULTY)
    with pytest.raises(ConfigError):
        load_config(None, home=home.path, environ={})


def test_a_server_that_reloads_as_it_should_passes(home: Home) -> None:
    report = run(home)
    assert report.wrong == []
    assert failing(report) == set()
    assert (report.reloads, report.changing, report.refused) == (10, 5, 1)
    assert report.load is not None
    assert report.load.verdict is Verdict.VERIFIED


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, {"changed": [], "restart": []}), "instead of"),
        ((422, {"error": "x"}), "422"),
        ((200, {"changed": [{"key": "log.level"}], "restart": []}), "['log.level'] instead of"),
        ((200, {"changed": [], "restart": [{"key": "server.port"}]}), "instead of"),
    ],
)
def test_a_reload_that_does_something_else_is_seen(
    home: Home, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
) -> None:
    monkeypatch.setattr(module, "ask_reload", lambda home: answer)
    report = run(home)
    assert any(reason in each for each in report.wrong)
    assert "reloads that did other than they must" in failing(report)


def test_a_server_that_cannot_be_asked_is_seen(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(home: Home) -> Any:
        raise ConnectionRefusedError

    monkeypatch.setattr(module, "ask_reload", gone)
    report = run(home)
    assert len(report.wrong) == 10
    assert "reloads" in failing(report)


def test_a_connection_that_is_lost_is_seen(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Home], Any] = module.ask_reload

    def end_sessions(home: Home) -> Any:
        """What a reload must not do."""
        with socket.socket(socket.AF_UNIX) as connected, module.address_of(home.control) as address:
            connected.connect(address)
            connection = http.client.HTTPConnection("localhost")
            connection.sock = connected
            connection.request("POST", "/v1/sessions/revoke", '{"user": "load-1"}')
            connection.getresponse().read()
        return real(home)

    monkeypatch.setattr(module, "ask_reload", end_sessions)
    report = run(home)
    assert {"requests failed", "connections that answered to the end"} <= failing(report)


def test_the_command_tells_and_writes_how_it_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    options = ["--reloads", "10", "--connections", "10", "--rate", "200", "--interval", "0.1"]
    assert main([*options, "--json", str(file)]) == 0
    assert capsys.readouterr().out.endswith("10 connections undisturbed\n")
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert rows["requests failed"]["value"] == 0
    assert all(row["holds"] for row in rows.values())


def test_a_run_that_is_broken_off_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = module.ask_reload
    asked = []

    def interrupt(home: Home) -> Any:
        asked.append(home)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(home)

    monkeypatch.setattr(module, "ask_reload", interrupt)
    assert main(["--reloads", "500", "--connections", "10", "--rate", "100", "--interval", "0.1"]) == 130
    assert "nothing is proven" in capsys.readouterr().out


def test_what_cannot_be_measured_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "no" / "run.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
