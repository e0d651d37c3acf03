"""The benchmark of the header does what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import hsts_header
from bench.micro.token_check import Figure
from zcproto.http.security_headers import SecurityHeaders


def test_the_table_the_file_and_the_exit_code_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    code = hsts_header.main(["--responses", "200", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)
    assert ("FAIL" in table) == (code == 1)
    assert {row["name"] for row in rows if row["bar"]} == {"added by the header", "its own part alone"}


def test_what_is_measured_has_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsts_header, "WITH", SecurityHeaders(None))
    with pytest.raises(AssertionError):
        hsts_header.measure(100)


def test_each_response_is_timed() -> None:
    on, off = hsts_header.time_responses(50)
    assert len(on) == len(off) == 50
    assert min(*on, *off) > 0


def test_a_missed_bar_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsts_header, "measure", lambda responses: [Figure("bad", 1_000, "ns", 1_000)])
    assert hsts_header.main([]) == 1


def test_too_few_responses_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        hsts_header.main(["--responses", "1"])
    assert caught.value.code == 2
    assert "at least" in capsys.readouterr().err
