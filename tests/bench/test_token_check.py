"""The benchmark of token checks does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro.token_check import Figure, main


def test_the_table_the_file_and_the_exit_code_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    code = main(["--tokens", "300", "--checks", "500", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)
    assert ("FAIL" in table) == (code == 1)
    assert {row["name"] for row in rows if row["bar"]} >= {"check, p99.9", "memory above the empty registry"}


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--checks", "0"], ["--tokens", "x"]])
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "bar", "at_least", "holds"),
    [
        (9.9, 10, False, True),
        (10, 10, False, False),
        (10, 10, True, True),
        (9.9, 10, True, False),
        (5, None, False, True),
    ],
)
def test_a_bar_holds_or_not(value: float, bar: float | None, at_least: bool, holds: bool) -> None:
    assert Figure("figure", value, "us", bar, at_least).holds is holds


def test_a_missed_bar_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "bench.micro.token_check.measure", lambda tokens, checks: [Figure("bad", 11, "us", 10)]
    )
    assert main([]) == 1
    assert "FAIL" in capsys.readouterr().out
