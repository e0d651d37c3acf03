"""A run as a table on a terminal, its conclusion, and all of it as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from bench.report import plain_table
from bench.requirements.finding import Verdict
from bench.requirements.requirement import SECTIONS
from bench.requirements.run import RequirementRow, Run
from zcproto.load.hdr import percentiles_ms

STYLES: Final = {
    Verdict.PASS: "green",
    Verdict.SMALL: "yellow",
    Verdict.FAIL: "bold red",
    Verdict.NONE: "bold red",
}


def show(run: Run, console: Console) -> None:
    """Print the table, by section, and the conclusion."""
    for section in SECTIONS:
        rows = [row for row in run.rows if row.requirement.section == section]
        if not rows:
            continue
        table = plain_table(section)
        table.expand = True
        table.add_column("requirement", ratio=5, overflow="fold")
        table.add_column("target", ratio=5, overflow="fold")
        table.add_column("figure", ratio=9, overflow="fold")
        table.add_column("", no_wrap=True)
        table.add_column("aim", ratio=3, overflow="fold")
        table.add_column("how", ratio=10, overflow="fold", style="dim")
        for row in rows:
            each = row.requirement
            cells = (each.name, each.target, figure(row))
            verdict = Text(row.verdict.value, STYLES[row.verdict])
            table.add_row(*map(Text, cells), verdict, Text(aim(row)), Text(each.how))
        console.print(table)
    console.print(Text(sentence(run), "bold green" if run.passes else "bold red"), soft_wrap=True)


def figure(row: RequirementRow) -> str:
    if row.finding is not None:
        return row.finding.figure
    return f"not measured: {row.reason or 'nothing filled this row'}"


def aim(row: RequirementRow) -> str:
    """Return the aim beyond the target, and whether it was reached."""
    wanted, reached = row.requirement.aim, None if row.finding is None else row.finding.aim
    if not wanted:
        return ""
    return wanted if reached is None else f"{wanted}: {'yes' if reached else 'no'}"


def sentence(run: Run) -> str:
    failed = [row.requirement.name for row in run.rows if not row.passes]
    small = sum(row.verdict is Verdict.SMALL for row in run.rows)
    took = f"{run.total_s:.0f} s"
    if failed:
        return f"{len(failed)} of {len(run.rows)} requirements do not hold: {', '.join(failed)} ({took})"
    if small:
        return (
            f"all of {len(run.rows)} requirements hold, but {small} were measured at a smaller size, which proves "
            f"nothing ({took})"
        )
    return f"all of {len(run.rows)} requirements hold ({took})"


def as_json(run: Run) -> dict[str, Any]:
    """Return the whole run, without keys and tokens."""
    drawn = run.drawn
    return {
        "sizes": dataclasses.asdict(run.sizes),
        "passed": run.passes and not run.small,
        "requirements": [
            {
                "key": row.requirement.key,
                "section": row.requirement.section,
                "requirement": row.requirement.name,
                "target": row.requirement.target,
                "aim": row.requirement.aim,
                "how": row.requirement.how,
                "verdict": row.verdict.value,
                "reason": row.reason,
                **({} if row.finding is None else row.finding.as_json()),
            }
            for row in run.rows
        ],
        "handshakes": {
            key_type: {"latency_ms": percentiles_ms(each.latencies), "server_cpu_ms": each.cpu_ms}
            for key_type, each in drawn.handshakes.items()
        },
        "payloads": {str(payload): cost._asdict() for payload, cost in drawn.payloads.items()},
        "over_time": {}
        if drawn.many is None
        else {phase: [each._asdict() for each in samples] for phase, samples in drawn.many.samples.items()},
        "slowdown": round(run.scale.slowdown, 3),
        "steps_s": {name: round(seconds, 2) for name, seconds in run.steps_s.items()},
    }
