"""Runs from options to exit code: report, files, Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import json
import os
import platform
import re
import resource
import signal
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.load.helpers import plan, plan_for, verified_result
from tests.server.conftest import Serve
from zcproto.app.app import App
from zcproto.errors import ConfigError
from zcproto.load import command, find_max, report
from zcproto.load.command import EXIT_CODES, Outputs, check_outputs, find_max_and_report, run_and_report
from zcproto.load.result import Verdict
from zcproto.load.run import Stop


def test_run_prints_its_report_and_writes_its_files(serve: Serve, tmp_path: Path) -> None:
    out = io.StringIO()
    outputs = Outputs(
        tmp_path / "run.json",
        tmp_path / "run.hlog",
        tmp_path / "run.svg",
        {"connect_cpu_s": 1e-9},
        tmp_path / "run.html",
    )
    result = run_and_report(plan_for(serve()), outputs, out)
    assert EXIT_CODES[result.verdict] == 0
    assert "verified: 10 of 10 connections" in out.getvalue()
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["verdict"] == "verified"
    assert written["figures"]["connect_cpu_s"]["holds"] is False
    assert "HISTF" in (tmp_path / "run.hlog").read_text()
    assert "<svg" in (tmp_path / "run.svg").read_text()
    page = (tmp_path / "run.html").read_text()
    assert "verified: 10 of 10 connections" in page
    assert "<svg" in page
    for part in (platform.node(), metadata.version("zcproto"), written["started"][:10]):
        assert part in page[: page.index("<svg")]
    assert not re.search("(src|href)=.http", page)


def test_search_for_the_highest_rate_writes_its_report(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(find_max, "MAX_RATE", 400.0)
    monkeypatch.setattr(report, "SATURATED_LAG_MS", 1e6)
    out = io.StringIO()
    outputs = Outputs(json=tmp_path / "s.json", plot=tmp_path / "s.svg", html=tmp_path / "s.html")
    search = find_max_and_report(plan_for(serve()), TIMEOUT * 1000, outputs, out)
    assert search.highest == 400.0
    assert [step.rate for step in search.steps] == [200.0, 400.0]
    sentence = "highest rate with a p99 below 900000 ms: 400 requests/s"
    assert out.getvalue().splitlines()[-1] == sentence
    assert json.loads((tmp_path / "s.json").read_text())["conclusion"] == sentence
    assert "polyline" in (tmp_path / "s.svg").read_text()
    assert sentence in (tmp_path / "s.html").read_text()


def test_failed_run_has_exit_code_1(serve: Serve) -> None:
    app = App()
    app.method("echo")(lambda **params: {})
    out = io.StringIO()
    result = run_and_report(plan_for(serve(app)), Outputs(), out)
    assert EXIT_CODES[result.verdict] == 1
    assert "10 of 10 connections not verified" in out.getvalue()


def test_invalid_plan_is_refused_before_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", None)
    with pytest.raises(ConfigError, match="at most --sessions 10"):
        run_and_report(plan(sessions=11), Outputs(), io.StringIO())
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 100))
    with pytest.raises(ConfigError, match="--connections 72"):
        run_and_report(plan(connections=200, processes=2), Outputs(), io.StringIO())


def test_unwritable_files_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "run", None)
    outputs = Outputs(tmp_path / "no" / "run.json", tmp_path / "run.hlog", tmp_path / "run.gif")
    with pytest.raises(ConfigError) as caught:
        run_and_report(plan(), outputs, io.StringIO())
    assert [fault.partition(": ")[0] for fault in caught.value.faults] == [
        str(tmp_path / "no" / "run.json"),
        str(tmp_path / "run.gif"),
    ]


def test_ctrl_c_ends_a_run_early_with_a_report(serve: Serve) -> None:
    server = serve()
    out = io.StringIO()
    begun = threading.Timer(0, lambda: (server.until(lambda: server.server.state.counters.requests > 50),
                                        os.kill(os.getpid(), signal.SIGINT)))  # fmt: skip
    begun.start()
    before = signal.getsignal(signal.SIGINT)
    result = run_and_report(plan_for(server, duration_s=60.0), Outputs(), out)
    begun.join()
    assert EXIT_CODES[result.verdict] == 130
    assert "interrupted: the figures cover part of the run" in out.getvalue()
    assert signal.getsignal(signal.SIGINT) is before
    server.until_left()


def test_second_ctrl_c_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[bool] = []

    async def run(plan: Any, view: Any, stop: Stop) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.requested:  # noqa: ASYNC110 - a signal sets it
            await asyncio.sleep(0.001)
        requested.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(5)

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_and_report(plan(), Outputs(), io.StringIO())
    assert requested == [True]


def test_each_verdict_has_its_exit_code() -> None:
    assert EXIT_CODES == {Verdict.VERIFIED: 0, Verdict.FAILED: 1, Verdict.INTERRUPTED: 130}
    assert EXIT_CODES.keys() == {*Verdict}
    assert EXIT_CODES[verified_result().verdict] == 0


def test_missing_package_for_histograms_is_reported_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hdrh", None)
    check_outputs(Outputs(json=tmp_path / "run.json"))
    with pytest.raises(ModuleNotFoundError) as missing:
        check_outputs(Outputs(hdr=tmp_path / "run.hlog"))
    assert missing.value.name == "hdrh"
