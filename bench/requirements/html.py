"""A run as parts of a page of HTML: the plots, the table, and under each row the facts that were looked at."""

from __future__ import annotations

from typing import Final

from bench import page
from bench.requirements.finding import Verdict
from bench.requirements.plots import plots, svg
from bench.requirements.requirement import SECTIONS
from bench.requirements.run import Row, Run
from bench.requirements.table import aim, figure, sentence

CLASSES: Final = {Verdict.PASS: "pass", Verdict.SMALL: "small", Verdict.FAIL: "fail", Verdict.NONE: "fail"}
COLUMNS: Final = (
    ("requirement", ""), ("target", ""), ("figure", ""), ("verdict", ""), ("aim", ""), ("how", ""),
)  # fmt: skip


def parts(run: Run) -> list[str]:
    """Parts of a page."""
    parts = [
        page.paragraph(
            sentence(run), f"outcome {'fail' if not run.passes else 'small' if run.small else 'pass'}"
        )
    ]
    for section in SECTIONS:
        rows = [row for row in run.rows if row.requirement.section == section]
        if rows:
            parts += [page.heading(section), page.table("rows", COLUMNS, map(_cells, rows))]
    drawn = plots(run.drawn)
    if drawn:
        parts.append(page.heading("Plots"))
        parts += [page.picture(caption, svg(each)) for caption, each in drawn.items()]
    return parts


def _cells(row: Row) -> list[str]:
    each = row.requirement
    facts = () if row.finding is None else row.finding.facts
    shown = page.cell(figure(row))
    if facts:
        items = [
            ("" if fact.right else "fail", f"{fact.what}{f': {fact.seen}' if fact.seen else ''}")
            for fact in facts
        ]
        right = sum(fact.right for fact in facts)
        shown = shown.removesuffix("</td>") + page.facts(f"{right} of {len(facts)} facts", items) + "</td>"
    return [
        page.cell(each.name),
        page.cell(each.target),
        shown,
        page.cell(row.verdict.value, f"verdict {CLASSES[row.verdict]}"),
        page.cell(aim(row)),
        page.cell(each.how, "how"),
    ]
