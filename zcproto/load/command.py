"""A run from its options to its exit code: check, carry out, print, write files."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Final, TextIO

import click

from zcproto.common.process import new_event_loop
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.load import hdr, report
from zcproto.load.find_max import Search, show_search
from zcproto.load.plan import SPARE_FILES, Plan, check_plan, require_open_files
from zcproto.load.plot import draw_run, draw_search
from zcproto.load.progress import Progress
from zcproto.load.result import Result, Verdict
from zcproto.load.run import Stop, View, run

PLOT_SUFFIX: Final = ".svg"
EXIT_CODES: Final = {Verdict.VERIFIED: 0, Verdict.FAILED: 1, Verdict.INTERRUPTED: 130}


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files to write, and the bars of figures by their keys."""

    json: Path | None = None
    hdr: Path | None = None
    plot: Path | None = None
    bars: Mapping[str, float] = field(default_factory=dict)
    html: Path | None = None


def check_outputs(outputs: Outputs) -> None:
    """Raise ConfigError before the run for a file that cannot be written after it."""
    if outputs.hdr is not None:
        importlib.import_module("hdrh")  # of an extra
    faults = []
    for path in (outputs.json, outputs.hdr, outputs.plot, outputs.html):
        if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
            faults.append(f"{escape_text(str(path))}: cannot be written; give a file in a writable folder")
    if outputs.plot is not None and outputs.plot.suffix != PLOT_SUFFIX:
        faults.append(f"{escape_text(str(outputs.plot))}: the name must end in {PLOT_SUFFIX}")
    if faults:
        raise ConfigError(faults)


def check(plan: Plan, outputs: Outputs) -> None:
    """Raise ConfigError with the reasons why a plan cannot be carried out, or its files not written."""
    check_plan(plan)
    check_outputs(outputs)
    require_open_files(
        -(-plan.connections // plan.processes) + SPARE_FILES,
        plan.connections,
        lambda limit: (limit - SPARE_FILES) * plan.processes,
    )


def measure(plan: Plan, out: TextIO, *, keeps_part: bool = True) -> Result:
    """Carry out a checked plan and show its progress. Raises ConfigError if the server refuses its first user.

    Ctrl-C ends the run early with partial results, or raises KeyboardInterrupt unless `keeps_part`.
    """
    with closing(Progress(out)) as view, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_run_interruptible(plan, view) if keeps_part else run(plan, view, Stop()))


def run_and_report(plan: Plan, outputs: Outputs, out: TextIO, *, keeps_part: bool = True) -> Result:
    """Carry out a plan like `measure`, print its report and write its files. Raises ConfigError before that."""
    check(plan, outputs)
    started = time.time()
    result = measure(plan, out, keeps_part=keeps_part)
    report.show(result, out, outputs.bars)
    write_outputs(
        outputs,
        report.as_json(result, outputs.bars, started),
        lambda page: report.show(result, page, outputs.bars),
        lambda: draw_run(result),
    )
    if outputs.hdr is not None:
        hdr.write_file(outputs.hdr, result.record, started)
    return result


def find_max_and_report(plan: Plan, limit_ms: float, outputs: Outputs, out: TextIO) -> Search:
    """Search the highest rate whose p99 is below a limit, print the report and write the files.

    The search begins at the rate of the plan. Raises ConfigError before it connects.
    """
    check(plan, outputs)
    started = time.time()
    search = Search(limit_ms)
    for rate in search.rates(plan.rate):
        click.echo(f"{rate:,.0f} requests/s", out)
        search.add(measure(replace(plan, rate=rate), out))
    show_search(search, out)
    value = {"started": report.moment(started), "machine": report.machine(), **search.as_json()}
    write_outputs(outputs, value, lambda page: show_search(search, page), lambda: draw_search(search))
    return search


def write_outputs(
    outputs: Outputs, value: dict[str, Any], show: Callable[[TextIO], None], draw: Callable[[], str]
) -> None:
    """Write the result as JSON, as a plot, and as a page with both the plot and the report."""
    if outputs.json is not None:
        outputs.json.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if outputs.plot is not None:
        outputs.plot.write_text(draw(), encoding="utf-8")
    if outputs.html is not None:
        write_page(outputs.html, value, show, draw())


async def _run_interruptible(plan: Plan, view: View) -> Result:
    """End the run early, with partial results, at the first Ctrl-C; the second one ends the program."""
    loop = asyncio.get_running_loop()
    stop = Stop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.request()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        return await run(plan, view, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


_TEMPLATE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>zcproto: measured</title>
<style>
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; font-family: system-ui, sans-serif; color: #1f2933 }
pre { white-space: pre-wrap; font: clamp(0.5rem, 2vw, 0.9rem)/1.4 ui-monospace, monospace }
figure { margin: 0; overflow-x: auto }
svg { width: 100%; min-width: 34rem }
@media (max-width: 40rem) { body { margin-top: 1rem } }
</style>
<body>
<h1>zcproto</h1>
<p>ABOUT</p>
<figure>PLOT</figure>
<pre>REPORT</pre>
</body>
</html>
"""


def write_page(path: Path, value: Mapping[str, Any], show: Callable[[TextIO], None], plot: str) -> None:
    """Write what `show` prints, below when and where it was measured, and a plot."""
    machine = value["machine"]
    about = (
        f"{value['started']} on {machine['host']}, zcproto {machine['zcproto']}, {machine['cpus']} CPUs,"
        f" {machine['system']}, Python {machine['python']}, {machine['openssl']}"
    )
    printed = io.StringIO()
    show(printed)
    parts = {"ABOUT": escape(about), "PLOT": plot, "REPORT": escape(printed.getvalue())}
    page = re.sub("ABOUT|PLOT|REPORT", lambda match: parts[match[0]], _TEMPLATE)
    path.write_text(page, encoding="utf-8")
