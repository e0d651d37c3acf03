"""The benchmark of metrics does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import metrics_cost
from bench.micro.token_check import Figure
from zcproto.server.protocol import ServerProtocol


def test_the_table_the_file_and_the_exit_code_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    code = metrics_cost.main(["--requests", "2000", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)
    assert {row["name"] for row in rows if row["bar"]} == {"added by counting"}


def test_what_does_not_count_is_the_same_in_all_else() -> None:
    uncounted = metrics_cost.without_counting()
    assert set(vars(uncounted)) - {"__module__", "__doc__", "__slots__"} == {"_process"}
    ours = set(ServerProtocol._process.__code__.co_names)
    assert ours - set(uncounted._process.__code__.co_names) == {
        "calls",
        "reads",
        "part",
        "PART_BITS",
        "counters",
        "requests",
    }


def test_lines_that_are_not_there_any_more_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics_cost.COUNTING, "method.calls += 2", "pass")
    with pytest.raises(AssertionError, match="not there once any more"):
        metrics_cost.without_counting()


def test_a_missed_bar_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_cost, "measure", lambda requests: [Figure("bad", 6, "%", 5)])
    assert metrics_cost.main([]) == 1


def test_too_few_requests_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        metrics_cost.main(["--requests", "1"])
    assert caught.value.code == 2
    assert "at least" in capsys.readouterr().err
