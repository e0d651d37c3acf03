"""`zcproto doctor`: the check of the collector, which answers at a port of this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.server_process import free_port
from tests.cli.doctor_report import Doctor, Report, doctor
from tests.limits import TIMEOUT
from tests.telemetry.helpers import Collector
from zcproto.telemetry import export

__all__ = ["doctor"]

Check = Callable[..., Report]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector().run() as collector:
        yield collector


@pytest.fixture
def check(home: Path, doctor: Doctor, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run the doctor with these keys of `[telemetry]`."""
    monkeypatch.setattr(export, "TRY_S", TIMEOUT)

    def check(more: str = "", endpoint: str = collector.address) -> Report:
        home.mkdir(0o700)
        (home / "config.toml").write_text(
            f"[server]\nport = {free_port()}\n[store]\nurl = 'memory'\n"
            f"[telemetry]\nendpoint = '{endpoint}'\n{more}"
        )
        return doctor()

    return check


def test_collector_that_takes_each_signal_is_ok(check: Check, collector: Collector) -> None:
    found = check("traces = true\nmetrics = true\nlogs = true")
    assert [each["state"] for each in found.of("collector")] == ["ok", "ok", "ok"]
    assert sorted(path for path, _, _ in collector.requests) == ["/v1/logs", "/v1/metrics", "/v1/traces"]


def test_collector_is_not_checked_without_signals(check: Check, collector: Collector) -> None:
    assert check().of("collector") == []
    assert collector.requests == []


def test_collector_that_refuses_is_a_warning(check: Check, collector: Collector) -> None:
    collector.status = 401
    assert "traces: Failed to export" in check("traces = true").one("collector", "warning")


def test_collector_that_is_down_is_a_warning(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TRY_S", 0.1)
    found = check("traces = true", endpoint=f"http://127.0.0.1:{free_port()}")
    assert "check telemetry.endpoint" in found.one("collector", "warning")


def test_unusable_file_of_headers_is_a_fault(check: Check, tmp_path: Path) -> None:
    found = check(f"traces = true\nheaders_file = '{tmp_path / 'missing'}'")
    assert "telemetry.headers_file" in found.one("collector", "fault")


def test_missing_extra_is_a_fault(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "zcproto.telemetry.export")
    assert 'in a clone of zcproto: pip install ".[otel]"' in check("traces = true").one("collector", "fault")
