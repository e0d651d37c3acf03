"""One soak from its options to its exit code."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.row import Row
from bench.soak.outcome import SoakOutcome
from bench.soak.plan import SoakPlan, check_plan
from bench.soak.run import run_soak
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import temporary_home

SCHEMA: Final = "zcproto-bench-soak/1"
FAILED: Final = 1
INTERRUPTED: Final = 130


def soak_and_report(plan: SoakPlan, json_file: Path | None, plot: Path | None, console: Console) -> int:
    """Carry it out on a server of its own, print the report and write its files; the exit code.

    Raises ConfigError before anything is started.
    """
    check_plan(plan)
    check_outputs(Outputs(json=json_file, plot=plot))
    started = time.time()
    with temporary_home() as home:
        outcome = run_soak(plan, home, lambda line: console.print(line, highlight=False, soft_wrap=True))
    show(outcome, console)
    if json_file is not None:
        content = {
            "schema": SCHEMA,
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "machine": {
                "cpus": os.cpu_count(),
                "system": platform.platform(),
                "python": platform.python_version(),
            },
            **outcome.as_json(),
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from bench.soak.plot import write_plot  # noqa: PLC0415  matplotlib takes half a second to import

        write_plot(plot, outcome)
    if outcome.interrupted:
        return INTERRUPTED
    return FAILED if outcome.reasons() else 0


def show(outcome: SoakOutcome, console: Console) -> None:
    """Print the table, what was wrong, and the verdict."""
    title = f"{outcome.plan.minutes:g} minutes, seed {outcome.plan.seed}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "figure", "unit", "target", ""):
        table.add_column(column, justify="right" if column in ("figure", "target") else "left", no_wrap=True)
    for row in outcome.rows():
        table.add_row(row.label, *_cells(row))
    console.print(table)
    told = [f"wrong: {why}: {count:,}" for why, count in outcome.seen.wrong.items()]
    told += [f"lost: {why}: {count:,}" for why, count in outcome.seen.lost.items()]
    told += [f"gone wrong: {what}: {why}" for what, why in outcome.failed.items()]
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if outcome.log_events:
        events = ", ".join(f"{name} {count:,}" for name, count in sorted(outcome.log_events.items()))
        console.print(f"in the server's log: {events}", highlight=False, markup=False, soft_wrap=True)
    reasons = outcome.reasons()
    if outcome.interrupted:
        said, style = "interrupted: nothing is proven", "bold yellow"
    elif reasons:
        said, style = f"failed: {'; '.join(reasons)}", "bold red"
    else:
        said, style = "passed: every answer was right, and nothing grew", "bold green"
    console.print(Text(said, style), soft_wrap=True)


def _cells(row: Row) -> list[str | Text]:
    value = "-" if row.value is None else f"{row.value:,.2f}" if row.unit else f"{row.value:,.0f}"
    if row.bar is None:
        return [value, row.unit, "", ""]
    return [value, row.unit, row.target, Text("pass", "green") if row.holds else Text("FAIL", "bold red")]
