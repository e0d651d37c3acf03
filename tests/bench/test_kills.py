"""A server killed at random moments: on a small scale, and that a broken promise is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import kills as module
from bench.kills import Report, main
from bench.micro.token_check import Figure
from bench.told import Broken
from zcproto.errors import ConfigError, ConnectionClosed


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_what_was_acknowledged_is_there_after_each_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kills.json"
    code = main(["--kills", "10", "--seed", "7", "--json", str(file)])
    said = capsys.readouterr()
    assert code == 0, said
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    assert figures["kills"] == 10
    assert figures["live sessions tried"] > 0
    assert "10 of 10 kills" in said.err
    assert "FAIL" not in said.out


def figure(report: Report, name: str) -> Figure:
    (found,) = (each for each in report.figures(1) if each.name == name)
    return found


def good() -> Report:
    report = Report(kills=1, starts_s=[1.0, 3.0, 2.0])
    report.acknowledged.update({"open": 3, "refresh": 2, "close": 1})
    return report


def test_a_good_report_passes() -> None:
    assert all(each.holds for each in good().figures(1))
    assert figure(good(), "start of the server, p50").value == 2.0
    assert not all(each.holds for each in good().figures(2))
    assert not all(each.holds for each in Report().figures(1))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"broken": Broken(lost={"a"})}, "of these lost"),
        ({"broken": Broken(risen={"a"})}, "of these alive again"),
        ({"broken": Broken(spent={"a"})}, "of these taken"),
        ({"pairs_refused": 1}, "newest pairs that were refused"),
        ({"halves": 1}, "calls done by halves"),
        ({"bad_news": 1}, "damage told by the server"),
    ],
)
def test_a_broken_promise_fails(changes: dict[str, Any], name: str) -> None:
    report = good()
    for key, value in changes.items():
        setattr(report, key, value)
    assert [each.name for each in report.figures(1) if not each.holds] == [name]


@pytest.mark.timeout(120)
def test_a_server_that_forgets_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = module.Kills.one_server

    async def forgetful(self: module.Kills, *, last: bool = False) -> None:
        await inner(self, last=last)
        for path in self._home.path.glob("sessions.db*"):
            path.unlink()

    monkeypatch.setattr(module.Kills, "one_server", forgetful)
    monkeypatch.setattr(module, "LONGEST_S", (2.0,))
    assert main(["--kills", "2"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError(["no"]), 2), (ConnectionClosed("gone"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_breaks_it_off_has_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(module, "kill_often", fail)
    assert main(["--kills", "1"]) == code


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--seed", "x"]])
def test_what_cannot_be_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
