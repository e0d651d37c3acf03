"""Curves as tables on a terminal, as parts of a page, as Markdown, as JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import page
from bench.curves.curve import Curve, number
from bench.curves.plot import draw
from bench.curves.run import Grown
from bench.requirements.plots import svg


def show(grown: Grown, console: Console) -> None:
    for curve in grown.curves:
        table = Table(
            title=curve.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
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


def html(grown: Grown) -> list[str]:
    """Parts of a page."""
    parts = []
    for curve in grown.curves:
        parts.append(page.heading(curve.title))
        parts += [page.paragraph(each.sentence) for each in curve.described()]
        parts.append(page.picture("", svg(draw(curve))))
        columns = [(name, "number") for name in _columns(curve)]
        parts.append(
            page.table(
                "numbers", columns, ([page.cell(cell, "number") for cell in row] for row in _rows(curve))
            )
        )
        parts += [page.paragraph(note, "meta") for note in (*curve.notes, curve.how)]
    parts += [
        page.paragraph(f"{key}: not measured: {reason}", "fail") for key, reason in grown.failed.items()
    ]
    return parts


def markdown(grown: Grown) -> list[str]:
    lines = ["## How cost grows", ""]
    for curve in grown.curves:
        lines += [f"### {curve.title}", "", f"{curve.how[0].upper()}{curve.how[1:]}.", ""]
        lines += [f"- {each.sentence}." for each in curve.described()]
        lines += [f"- {note}." for note in curve.notes]
        columns = _columns(curve)
        lines += ["", f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in _rows(curve)] + [""]
    lines += [f"{key}: not measured: {reason}" for key, reason in grown.failed.items()]
    return lines


def as_json(grown: Grown) -> dict[str, Any]:
    return {
        "curves": [curve.as_json() for curve in grown.curves],
        "failed": grown.failed,
        "seconds": round(grown.seconds, 1),
    }
