"""A server reloaded under load: it passes, and wrong answers and lost connections are detected."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bench.scenarios.reloads as module
from bench.__main__ import main
from bench.report import Report
from bench.scenarios.harness import ask_control
from bench.scenarios.reloads import CHANGES, FAULTY, ReloadPlan, Settings, reload_under_load
from bench.stage import Stage
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.config.changes import TAKES_EFFECT, Effect
from zcproto.errors import ConfigError

QUICK = ReloadPlan(reloads=10, connections=10, rate=200.0, interval_s=0.1)


@pytest.fixture(autouse=True)
def changes_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file have the last word on what it changes."""
    monkeypatch.delenv("ZCPROTO_LIMITS__WRITE_TIMEOUT")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return Home(path)


def failing(report: Report) -> set[str]:
    return {row.key for row in report.columns["figure"] if not row.holds}


def test_changes_need_no_restart_and_files_are_valid(home: Home) -> None:
    settings = Settings(Stage(home.path), 10)
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


def test_correct_reloads_pass(home: Home) -> None:
    report = reload_under_load(home, QUICK)
    assert report.reasons() == []
    assert [report.row(key).value for key in ("reloads", "changing", "refused")] == [10, 5, 1]


def test_reloads_that_outlast_the_load_are_carried_out(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Home], Any] = module.ask_reload

    def slow(home: Home) -> Any:
        time.sleep(0.2)
        return real(home)

    monkeypatch.setattr(module, "ask_reload", slow)
    monkeypatch.setattr(module, "TAIL_S", 0.05)
    assert reload_under_load(home, replace(QUICK, interval_s=0.0)).reasons() == []


def test_wrong_answer_to_reload_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reloads with odd numbers are of a changed file, the tenth is of a faulty one.
    given = itertools.cycle(
        [
            (422, {"error": "x"}),
            (200, {"changed": [], "restart": [{"key": "server.port"}]}),
            (200, {"changed": [], "restart": []}),
            (200, {"changed": [{"key": "log.level"}], "restart": []}),
        ]
    )
    monkeypatch.setattr(module, "ask_reload", lambda home: next(given))
    report = reload_under_load(home, QUICK)
    for reason in (
        "reload 1: 422",
        "reload 2: 200, [] instead of []",
        "reload 3: 200, [] instead of ['",
        "reload 4: 200, ['log.level'] instead of []",
        "reload 10: a faulty file was answered with 200",
    ):
        assert any(reason in each for each in report.faults), reason
    assert report.row("wrong").value == 10
    assert "wrong" in failing(report)


def test_unreachable_control_socket_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(home: Home) -> Any:
        raise ConnectionRefusedError

    monkeypatch.setattr(module, "ask_reload", gone)
    report = reload_under_load(home, QUICK)
    assert report.row("wrong").value == 10
    assert "reloads" in failing(report)


def test_lost_connection_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Home], Any] = module.ask_reload

    def end_sessions(home: Home) -> Any:
        """Do what a reload must not do."""
        ask_control(home, "POST", "sessions/revoke", '{"user": "load-1"}')
        return real(home)

    monkeypatch.setattr(module, "ask_reload", end_sessions)
    assert {"requests_lost", "connections_kept"} <= failing(reload_under_load(home, QUICK))


def test_command_prints_and_writes_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    options = ["--reloads", "10", "--connections", "10", "--rate", "200", "--interval", "0.1"]
    assert main(["scenario", "reloads", *options, "--json", str(file)]) == 0
    assert "passed" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["figures"]["figure"]["requests_lost"]["value"] == 0
    assert written["load"]["verified_connections"] == 10


def test_interrupted_run_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, asked = module.ask_reload, []

    def interrupt(home: Home) -> Any:
        asked.append(home)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(home)

    monkeypatch.setattr(module, "ask_reload", interrupt)
    options = ["--reloads", "500", "--connections", "10", "--rate", "100", "--interval", "0.1"]
    assert main(["scenario", "reloads", *options]) == 130
    assert "prove nothing" in capsys.readouterr().out
