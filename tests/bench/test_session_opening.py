"""The benchmark of sessions in a file does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import session_opening
from bench.micro.session_opening import main
from bench.micro.token_check import Figure


def test_the_table_the_file_and_the_exit_code_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    code = main(["--sessions", "300", "--concurrency", "8", "--folder", str(tmp_path), "--json", str(file)])
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)
    assert ("FAIL" in table) == (code == 1)
    barred = {row["name"] for row in rows if row["bar"]}
    assert barred >= {
        "durable openings a second",
        "memory above the empty server",
        "opening and reading the file",
        "sessions cleaned away a second",
    }
    assert all(row["value"] > 0 for row in rows if row["name"] in barred - {"memory above the empty server"})
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("arguments", [["--sessions", "0"], ["--concurrency", "0"], ["--sessions", "x"]])
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_missed_bar_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def bad(folder: Path, sessions: int, concurrency: int) -> list[Figure]:
        return [Figure("bad", 2_999, "", 3_000, at_least=True)]

    monkeypatch.setattr(session_opening, "measure", bad)
    assert main([]) == 1
    assert "FAIL" in capsys.readouterr().out
