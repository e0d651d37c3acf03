"""Curves as tables on a terminal, as Markdown with plots, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bench.curves.curve import Curve, number
from bench.curves.plot import draw
from bench.curves.run import Grown
from bench.report import plain_table
from bench.requirements.markdown import save_plots


def show(grown: Grown, console: Console) -> None:
    for curve in grown.curves:
        table = plain_table(curve.title)
        for name in _columns(curve):
            table.add_column(name, justify="right")
        for cells in _rows(curve):
            table.add_row(*cells)
        console.print(table)
        for each in curve.described():
            console.print(Text(f"  {each.sentence}"), soft_wrap=True)
        for note in (*curve.notes, curve.how):
            console.print(Text(f"  {note}", "dim"), soft_wrap=True)
        console.print()
    for key, reason in grown.failed.items():
        console.print(Text(f"curve {key}: not measured: {reason}", "bold red"), soft_wrap=True)


def _columns(curve: Curve) -> list[str]:
    return [curve.axis, *(f"{each.name}, {each.unit}" for each in curve.series)]


def _rows(curve: Curve) -> list[list[str]]:
    return [
        [f"{size:,}", *(number(each.values[at]) for each in curve.series)]
        for at, size in enumerate(curve.sizes)
    ]


def markdown(grown: Grown, page: Path) -> list[str]:
    """Return the lines of a page. Its plots are written beside it."""
    lines = ["## How cost grows", ""]
    for curve in grown.curves:
        lines += [f"### {curve.title}", "", f"{curve.how[0].upper()}{curve.how[1:]}.", ""]
        lines += [f"- {each.sentence}." for each in curve.described()]
        lines += [f"- {note}." for note in curve.notes]
        lines += ["", *save_plots(page, {f"curve {curve.key}": draw(curve)})]
        columns = _columns(curve)
        lines += [f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in _rows(curve)] + [""]
    lines += [f"{key}: not measured: {reason}" for key, reason in grown.failed.items()]
    return lines


def as_json(grown: Grown) -> dict[str, Any]:
    return {
        "curves": [curve.as_json() for curve in grown.curves],
        "failed": grown.failed,
        "seconds": round(grown.seconds, 1),
    }
