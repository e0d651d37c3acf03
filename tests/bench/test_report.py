"""Figures and their bars: what passes, what fails, and how a report is shown and written."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bench.report import Report, Row


def shown(report: Report) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=110))
    return out.getvalue()


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (Row("k", "figure", 9.9, below=10), True),
        (Row("k", "figure", 10, below=10), False),
        (Row("k", "figure", 10, at_least=10), True),
        (Row("k", "figure", 9.9, at_least=10), False),
        (Row("k", "figure", 0, equals=0), True),
        (Row("k", "figure", 1, equals=0), False),
        (Row("k", "figure", None, below=10), False),
        (Row("k", "figure", None, equals=0), False),
        (Row("k", "figure", None), True),
    ],
)
def test_bar_holds_or_fails(row: Row, holds: bool) -> None:
    assert row.holds is holds
    assert Report({"figure": [row]}).exit_code == (0 if holds else 1)


def test_missed_aim_is_shown_and_does_not_fail() -> None:
    missed, reached, failed = (Row("k", "figure", each, below=1.2, aim=1.05) for each in (1.1, 1.0, 1.3))
    for row, words in ((missed, "1.10 aim: no"), (reached, " 1"), (failed, "1.30 FAIL")):
        report = Report({"figure": [row]})
        assert report.exit_code == (row is failed)
        assert f"{words} " in shown(report)
        assert "< 1.2 (aim 1.05)" in shown(report)


@pytest.mark.parametrize(
    ("report", "code", "words"),
    [
        (
            Report({"figure": [Row("p99", "request, p99", None, "ms", below=25)]}),
            1,
            "request, p99: not measured ms, must be < 25",
        ),
        (Report({"figure": []}, ["a server process ended"]), 1, "failed: a server process ended"),
        (Report({"figure": []}, interrupted=True), 130, "prove nothing"),
        (Report({"figure": []}, notes=["the machine was busy"]), 0, "the machine was busy"),
    ],
)
def test_report_shows_why_it_fails(report: Report, code: int, words: str) -> None:
    assert report.exit_code == code
    assert words in shown(report)
    assert report.as_json()["passed"] is (code == 0)


def test_many_columns_are_split_into_tables_that_fit_a_page_and_no_figure_is_cut() -> None:
    columns = {
        f"server {number}, of another library": [Row("n", "label " * 30, 123_450.5 + number, "us", below=1)]
        for number in range(8)
    }
    report = Report(columns)
    lines = shown(report).splitlines()
    assert all(any(f"123,45{number}.50 FAIL" in line for line in lines) for number in range(8))
    assert all(len(line) <= 110 for line in lines[:-1])  # the last is the verdict
    assert report.reasons()[0].startswith("server 0, of another library: label ")


def test_json_has_every_figure_with_its_bar() -> None:
    report = Report({"figure": [Row("lost", "requests lost", 1, equals=0)]}, details={"seed": 7})
    written = json.loads(json.dumps(report.as_json()))
    assert written["figures"]["figure"]["lost"] == {
        "key": "lost", "label": "requests lost", "value": 1, "unit": "", "below": None, "at_least": None,
        "equals": 0, "aim": None, "holds": False,
    }  # fmt: skip
    assert written["seed"] == 7
