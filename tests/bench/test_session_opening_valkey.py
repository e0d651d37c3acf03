"""The benchmark of sessions in Valkey does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import session_opening_valkey
from bench.micro.session_opening_valkey import main
from bench.micro.token_check import Figure
from tests.stores.valkey.server_process import PROGRAMS, needs


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_the_file_and_the_exit_code_agree(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(program)
    file = tmp_path / "figures.json"
    arguments = ["--program", program, "--sessions", "500", "--folder", str(tmp_path), "--json", str(file)]
    code = main(arguments)
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table and row["value"] > 0 for row in rows)
    assert {row["name"] for row in rows if row["bar"]} == {"openings a second", "revocation known, longest"}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    "arguments", [["--sessions", "1"], ["--concurrency", "0"], ["--fsync", "x"], ["--program", "no-such"]]
)
def test_what_cannot_be_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_missed_bar_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def bad(url: str, sessions: int, concurrency: int) -> list[Figure]:
        return [Figure("bad", 1_999, "", 2_000, at_least=True)]

    needs(PROGRAMS[0])
    monkeypatch.setattr(session_opening_valkey, "measure", bad)
    assert main([]) == 1
    assert "FAIL" in capsys.readouterr().out
