"""A server killed at random moments: a small run, and broken promises are detected."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import kills as module
from bench.scenarios.kills import Seen
from bench.scenarios.sessions import Broken


@pytest.fixture(autouse=True)
def kills_come_when_all_was_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first server work for as long as a slow machine needs to do something of each kind."""
    moment = module.Kills._moment

    async def later(self: module.Kills) -> None:
        done = self._seen.acknowledged
        while not (done["open"] and done["refresh"] and done["close"] + done["revoke"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await moment(self)

    monkeypatch.setattr(module.Kills, "_moment", later)


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_acknowledged_sessions_survive_each_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kills.json"
    code = main(["scenario", "kills", "--kills", "10", "--seed", "7", "--json", str(file)])
    printed = capsys.readouterr()
    assert code == 0, printed
    figures = json.loads(file.read_text())["figures"]["figure"]
    assert figures["kills"]["value"] == 10
    assert figures["live"]["value"] > 0
    assert "10 of 10 kills" in printed.err


def good() -> Seen:
    seen = Seen(kills=1, starts_s=[1.0, 3.0, 2.0])
    seen.acknowledged.update({"open": 3, "refresh": 2, "close": 1})
    return seen


def test_good_run_passes_and_short_or_empty_run_fails() -> None:
    assert good().report(1).reasons() == []
    assert good().report(1).row("start_p50_s").value == 2.0
    assert good().report(2).reasons()
    assert Seen().report(1).reasons()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"broken": Broken(lost={"a"})}, "lost"),
        ({"broken": Broken(revived={"a"})}, "revived"),
        ({"broken": Broken(reused={"a"})}, "reused"),
        ({"pairs_refused": 1}, "pairs_refused"),
        ({"half_done": 1}, "half_done"),
        ({"damage": 1}, "damage"),
    ],
)
def test_broken_promise_fails(changes: dict[str, Any], key: str) -> None:
    seen = good()
    for name, value in changes.items():
        setattr(seen, name, value)
    rows = seen.report(1).columns["figure"]
    assert [row.key for row in rows if not row.holds] == [key]


def test_failed_call_is_named() -> None:
    seen = good()
    seen.failed["close: NOT_FOUND"] = 2
    assert "2 times: close: NOT_FOUND" in seen.report(1).reasons()


@pytest.mark.timeout(120)
def test_server_that_loses_its_sessions_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = module.Kills.one_server

    async def forgetful(self: module.Kills, *, last: bool = False) -> None:
        await inner(self, last=last)
        for path in self.stage.home.path.glob("sessions.db*"):
            path.unlink()

    monkeypatch.setattr(module.Kills, "one_server", forgetful)
    file = tmp_path / "kills.json"
    assert main(["scenario", "kills", "--kills", "2", "--json", str(file)]) == 1
    figures = json.loads(file.read_text())["figures"]["figure"]
    assert figures["lost"]["value"] > 0
    assert [key for key, row in figures.items() if not row["holds"]] == ["lost"]
