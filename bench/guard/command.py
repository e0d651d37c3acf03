"""Count what a request, an item, a connection and a client's call execute, and compare with the accepted counts.

A fixed script runs against a whole server in memory: its counts of bytecode instructions and calls are the same on
every machine, however busy. Growth of a count by more than 3 % fails, and the functions that grew are listed.

After a change that is worth its cost, accept the new counts, with a reason that is stored beside them:

    python -m bench guard --accept "check the new header field"

Work inside functions in C (TLS, msgpack, copies of bytes) is not counted.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Final

import click

from bench.command import measurement
from bench.guard.accepted import Counts, file_of, read, total, write
from bench.guard.counting import Cost
from bench.guard.script import STEPS
from bench.report import Report, Row
from bench.stage import bench_environment
from zcproto.errors import ZcprotoError
from zcproto.load.processes import module_command

MAX_GROWTH: Final = 0.03
HANG_S: Final = 1_800.0
"""Seconds after which the script has certainly stopped working. It takes ten on an idle machine."""

SHOWN: Final = 5
"""Functions listed for each count that grew."""


def count_all() -> dict[str, dict[str, Cost]]:
    """Run the script in a new process; return what each function costs, by step."""
    environment = {**bench_environment(), "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            module_command("bench.guard.run"),
            env=environment,
            stdout=subprocess.PIPE,
            check=False,
            timeout=HANG_S,
        )
    except subprocess.TimeoutExpired:
        raise ZcprotoError(f"the script did not end within {HANG_S:.0f} s; run it alone to see why") from None
    if done.returncode:
        raise ZcprotoError(f"the script failed with exit code {done.returncode}; its output is above")
    counts = json.loads(done.stdout)
    return {step: {name: Cost(*cost) for name, cost in costs.items()} for step, costs in counts.items()}


def compare(now: Counts, accepted: Counts) -> Report:
    """Hold counts against the accepted ones."""
    report = Report({"accepted": [], "now": []})
    for step, costs in now.items():
        before = accepted.get(step)
        if before is None:
            report.faults.append(f"{STEPS[step].label}: no accepted count; accept it with --accept REASON")
            continue
        for kind, was, new in zip(Cost._fields, total(before), total(costs), strict=True):
            key, label = f"{step}_{kind}", f"{STEPS[step].label}: {kind}"
            report.columns["accepted"].append(Row(key, label, was))
            report.columns["now"].append(Row(key, label, new, below=round(was * (1 + MAX_GROWTH), 2)))
            if new > was * (1 + MAX_GROWTH):
                report.notes += [f"{label} grew by {new / was - 1:.1%}:", *changes(before, costs, kind)]
            elif new < was * (1 - MAX_GROWTH):
                report.notes.append(
                    f"{label} fell by {1 - new / was:.1%}; accept it, or later growth hides in the difference"
                )
    return report


def changes(before: Mapping[str, Cost], now: Mapping[str, Cost], kind: str) -> list[str]:
    """Return the functions whose counts grew most."""
    nothing = Cost(0, 0)
    grown = []
    for name in before.keys() | now.keys():
        was, new = (getattr(each.get(name, nothing), kind) for each in (before, now))
        if new > was:
            grown.append((new - was, name, was, new))
    grown.sort(key=lambda each: (-each[0], each[1]))
    return [f"  +{more:,.2f}  {name} ({was:,.2f} -> {new:,.2f})" for more, name, was, new in grown[:SHOWN]]


def _reason(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("give a reason, which is stored beside the counts")
    return value


@measurement
@click.option(
    "--accept", metavar="REASON", callback=_reason, help="Store these counts as accepted, with the reason."
)
def command(accept: str | None) -> Report:
    path = file_of()
    if accept is None:
        accepted = read(path)  # before the work
        return compare(count_all(), accepted)
    counts = count_all()
    write(path, counts, accept)
    return compare(counts, counts)
