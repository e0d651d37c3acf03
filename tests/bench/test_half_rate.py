"""Half of the maximum rate: what is asked for, the bar, and unverified loads."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench.scenarios.half_rate as module
from bench.curves.watch import Watched
from bench.report import Report
from bench.scenarios.half_rate import HalfPlan, half_of_maximum
from tests.load import helpers
from zcproto.load.record import Record, RequestKind
from zcproto.load.result import Result

QUICK = HalfPlan(connections=10, flood_rate=3_000.0, flood_s=0.3, seconds=0.5, arrival_rate=100.0)


def result(answered: int, seconds: float, wait_ms: float = 1.0) -> Result:
    """A run in which so many requests were answered, all after the same wait."""
    made = Result(helpers.plan(), Record())
    made.record.tallies[RequestKind.LOAD].equal = answered
    made.record.latencies["request"].add(wait_ms / 1000)
    made.load_s = seconds
    return made


class FakeLoads:
    """Stands for `load_new_server`: returns one result after the other, and notes what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *results: Result, faults: int = 0) -> None:
        monkeypatch.setattr(Result, "reasons", lambda result: ["a fault"] * faults)
        monkeypatch.setattr(module, "load_new_server", self)
        self._results = list(results)
        self.asked: list[tuple[str, float, float]] = []

    def __call__(
        self, folder: Path, connections: int, rate: float, seconds: float, arrival_rate: float
    ) -> Watched:
        self.asked.append((folder.name, rate, seconds))
        return Watched(self._results.pop(0), {})


def failing(report: Report) -> set[str]:
    return {row.key for row in report.columns["figure"] if not row.holds}


def test_half_of_answered_rate_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = FakeLoads(monkeypatch, result(9_000, 0.5), result(4_500, 0.5))
    assert failing(half_of_maximum(tmp_path, QUICK)) == set()
    assert loads.asked == [("flood", 3_000.0, 0.3), ("half", 9_000.0, 0.5)]


def test_long_latency_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLoads(monkeypatch, result(900, 0.5), result(450, 0.5, wait_ms=26.0))
    assert failing(half_of_maximum(tmp_path, QUICK)) == {"p99_9_ms"}


def test_unverified_flood_fails_and_is_not_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = FakeLoads(monkeypatch, result(900, 0.5), faults=2)
    report = half_of_maximum(tmp_path, QUICK)
    assert [name for name, _, _ in loads.asked] == ["flood"]
    assert "unverified" in failing(report)
    assert "a fault" in report.reasons()


def test_nothing_answered_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLoads(monkeypatch, Result(helpers.plan(), Record()))
    assert failing(half_of_maximum(tmp_path, QUICK)) == {"p99_9_ms"}


def test_small_run_verifies_all_connections(tmp_path: Path) -> None:
    report = half_of_maximum(tmp_path, QUICK)
    assert report.row("verified").value == 10
    maximum = report.row("maximum").value
    assert maximum
    assert report.row("asked").value == maximum / 2
    assert failing(report) <= {"p99_9_ms"}  # on a busy machine latency proves nothing
