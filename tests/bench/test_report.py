"""Figures and their bars: what passes, what fails, and how a report is shown and written."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bench.report import Report, Row


def shown(report: Report, width: int = 110) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=width))
    return out.getvalue()


CASES = {"missed": 1.1, "reached": 1.0, "failed": 1.3}


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
        (Row("k", "figure", 1_000_000), True),
    ],
)
def test_bar_holds_or_fails(row: Row, holds: bool) -> None:
    assert row.holds is holds
    assert Report({"figure": [row]}).exit_code == (0 if holds else 1)


def test_missed_aim_is_shown_and_does_not_fail() -> None:
    missed, reached, failed = (Row(name, name, value, below=1.2, aim=1.05) for name, value in CASES.items())
    assert Report({"figure": [missed, reached]}).exit_code == 0
    text = shown(Report({"figure": [missed, reached]}))
    assert text.count("aim: no") == 1
    assert text.count("< 1.2 (aim 1.05)") == 2
    assert Report({"figure": [failed]}).reasons() == ["failed: 1.30, must be < 1.2"]
    assert "aim: no" not in shown(Report({"figure": [failed]}))


def test_unmeasured_figure_with_bar_is_named_as_reason() -> None:
    report = Report({"figure": [Row("p99", "request, p99", None, "ms", below=25)]})
    assert report.reasons() == ["request, p99: not measured ms, must be < 25"]
    assert "request, p99" in shown(report)


def test_fault_without_figure_fails_report() -> None:
    report = Report({"figure": [Row("n", "runs", 1)]}, ["a server process ended unexpectedly"])
    assert report.exit_code == 1
    assert "failed: a server process ended unexpectedly" in shown(report)


def test_interrupted_report_proves_nothing() -> None:
    report = Report({"figure": [Row("n", "runs", 1)]}, interrupted=True)
    assert report.exit_code == 130
    assert "prove nothing" in shown(report)
    assert report.as_json()["passed"] is False


def test_columns_stand_side_by_side_and_failing_one_is_named() -> None:
    columns = {
        name: [Row("p99", "p99", value, "ms", below=100)] for name, value in (("storm", 9.0), ("mix", 101.0))
    }
    report = Report(columns, notes=["the machine was busy"])
    text = shown(report)
    assert "storm" in text
    assert "101.00 FAIL" in text
    assert "< 100" in text
    assert "the machine was busy" in text
    assert report.reasons() == ["mix: p99: 101.00 ms, must be < 100"]


def test_many_columns_are_split_into_tables_that_fit_page() -> None:
    columns = {f"outage {number}": [Row("n", "requests", 1_000)] for number in range(16)}
    lines = shown(Report(columns)).splitlines()
    assert max(map(len, lines)) <= 110
    assert sum("requests" in line for line in lines) == 2


def test_figures_are_never_cut() -> None:
    columns = {
        f"server {number}, of another library": [Row("n", "label " * 30, 123_450.5 + number, "us", below=1)]
        for number in range(5)
    }
    lines = shown(Report(columns)).splitlines()
    for number in range(5):
        assert any(f"123,45{number}.50 FAIL" in line for line in lines)
    assert all(len(line) <= 110 for line in lines[:-1])  # the last is the verdict


@pytest.mark.parametrize(
    ("value", "unit", "figure"),
    [(0.1005, "", "0.101"), (0.0, "us", "0.00"), (1.5, "", "1.50"), (2000, "", "2,000"), (3, "ms", "3.00")],
)
def test_figure_shows_on_which_side_of_bar_it_is(value: float, unit: str, figure: str) -> None:
    assert Row("k", "figure", value, unit, below=0.1).figure == figure


def test_json_has_every_figure_with_its_bar() -> None:
    report = Report({"figure": [Row("lost", "requests lost", 1, equals=0)]}, details={"seed": 7})
    written = json.loads(json.dumps(report.as_json()))
    assert written["figures"]["figure"]["lost"] == {
        "key": "lost", "label": "requests lost", "value": 1, "unit": "", "below": None, "at_least": None,
        "equals": 0, "aim": None, "holds": False,
    }  # fmt: skip
    assert written["seed"] == 7
    assert report.row("lost").value == 1
