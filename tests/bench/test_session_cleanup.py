"""The benchmark of cleaning does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import session_cleanup
from bench.micro.session_cleanup import main
from bench.micro.token_check import Figure
from tests.stores.valkey.server_process import PROGRAMS, needs


@pytest.mark.parametrize("program", [*PROGRAMS, "no-such-program"])
def test_the_table_the_file_and_the_exit_code_agree(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program in PROGRAMS:
        needs(program)
    monkeypatch.setattr(session_cleanup, "OPENED", 400)  # each waits for the disk
    file = tmp_path / "figures.json"
    arguments = ["--sessions", "500", "--program", program, "--folder", str(tmp_path), "--json", str(file)]
    code = main(arguments)
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)
    rates = [row for row in rows if row["name"].endswith("a second")]
    assert len(rates) == (5 if program in PROGRAMS else 4)
    assert all(row["value"] > 0 for row in rates[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("arguments", [["--sessions", "0"], ["--sessions", "x"]])
def test_what_cannot_be_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_missed_bar_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(*arguments: object) -> list[Figure]:
        return []

    monkeypatch.setattr(session_cleanup, "measure_registry", lambda sessions: [Figure("bad", 6, "ms", 5)])
    monkeypatch.setattr(session_cleanup, "measure_file", nothing)
    assert main(["--program", "no-such-program"]) == 1
    assert "FAIL" in capsys.readouterr().out
