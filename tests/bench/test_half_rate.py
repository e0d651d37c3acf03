"""Half of the maximum: what is asked for, what is held against the bar, and that what is wrong is told."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import bench.half_rate as module
from bench.curves.watch import Watched
from bench.half_rate import HalfPlan, Halved, main, measure
from bench.requirements.homes import Workshop
from tests.load import helpers
from zcproto.errors import ConfigError, ConnectionClosed
from zcproto.load.record import Record
from zcproto.load.result import Result
from zcproto.load.tally import Kind

QUICK = HalfPlan(connections=10, too_many=3_000.0, flood_s=0.3, seconds=0.5, arrival_rate=100.0)


def result(answered: int, seconds: float, wait_ms: float = 1.0) -> Result:
    """A run in which so many requests were answered, all after the same wait."""
    made = Result(helpers.plan(), Record())
    made.record.tallies[Kind.LOAD].equal = answered
    made.record.latencies["request"].add(wait_ms / 1000)
    made.load_s = seconds
    return made


class Loads:
    """What stands for `load_on`: gives one result after the other, and notes what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *results: Result, faults: int = 0) -> None:
        monkeypatch.setattr(Result, "reasons", lambda result: ["a fault"] * faults)
        self._results = list(results)
        self.asked: list[tuple[str, float, float]] = []

    def __call__(
        self,
        workshop: Workshop,
        name: str,
        connections: int,
        rate: float,
        load_s: float,
        arrival_rate: float,
        console: Console,
    ) -> Watched:
        self.asked.append((name, rate, load_s))
        return Watched(self._results.pop(0), [])


def halved(folder: Path, loads: Loads, plan: HalfPlan = QUICK) -> Halved:
    return measure(folder, plan, Console(file=io.StringIO()), loads)


def failing(found: Halved) -> set[str]:
    return {figure.name for figure in found.figures() if not figure.holds}


def test_half_of_what_was_answered_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch, result(9_000, 0.5), result(4_500, 0.5))
    found = halved(tmp_path, loads)
    assert loads.asked == [("most", 3_000.0, 0.3), ("half", 9_000.0, 0.5)]
    assert failing(found) == set()


def test_who_waits_longer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = halved(tmp_path, Loads(monkeypatch, result(900, 0.5), result(450, 0.5, wait_ms=26.0)))
    assert failing(found) == {"request, p99.9"}


def test_what_is_not_verified_fails_and_is_not_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch, result(900, 0.5), faults=2)
    found = halved(tmp_path, loads)
    assert [name for name, _, _ in loads.asked] == ["most"]
    assert failing(found) == {"reasons why not all is verified"}
    assert found.reasons


def test_nothing_answered_is_no_figure_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Result(helpers.plan(), Record())
    found = halved(tmp_path, Loads(monkeypatch, empty))
    assert failing(found) == {"request, p99.9"}


def test_the_whole_on_a_small_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "HalfPlan", lambda **asked: QUICK)
    monkeypatch.setattr(module, "MAX_P99_9_MS", 60_000.0)  # a busy machine is no fault here
    file = tmp_path / "half.json"
    assert main(["--json", str(file)]) == 0
    figures = {each["name"]: each for each in json.loads(file.read_text())}
    assert figures["connections that answered to the end"]["value"] == 10
    assert 0 < figures["half of it, asked for"]["value"] <= 1_500
    assert "request, p99.9" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(ConfigError(["too many"]), 2), (ConnectionClosed("gone"), 1)])
def test_what_cannot_be_measured_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(*_: object) -> Halved:
        raise error

    monkeypatch.setattr(module, "measure", fail)
    assert main([]) == code
    assert capsys.readouterr().err
