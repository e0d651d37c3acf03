"""The budget of the hot path: every step has a figure, and the steps make up the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro.hot_path import NAMES, main, steps


def test_every_step_is_measured_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.json"
    assert main(["--requests", "500", "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    table = capsys.readouterr().out
    assert all(name in table for name in rows)
    for side in ("ours", "bare"):
        parts = [row[side] or 0.0 for name, row in rows.items() if name != "in all"]
        assert sum(parts) == pytest.approx(rows["in all"][side])
        assert rows["TLS record in"][side] > 0
    assert all(rows[name]["ours"] > 0 for name in NAMES.values() if name != "header, freshness, session")


def test_what_is_left_of_the_whole_is_between_the_steps() -> None:
    ours = {"whole": 10.0, "frame": 1.0, "body": 2.0, "method": 0.5, "result": 1.0, "answer": 1.5}
    bare = {"whole": 4.0, "frame": 1.0, "body": 1.0, "result": 0.5, "answer": 0.5}
    rows = {row.name: row for row in steps({**ours, "tls_in": 3.0, "tls_out": 2.0}, bare)}
    assert rows["between them"][1:] == (4.0, 1.0)
    assert rows["the method"].bare is None
    assert rows["in all"][1:] == (15.0, 9.0)


def test_no_requests_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--requests", "0"])
