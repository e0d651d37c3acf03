"""A run from its options to its exit code: check, carry out, print, write files."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from zcproto.common.process import new_event_loop
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.load import hdr, report
from zcproto.load.plan import SPARE_FILES, Plan, check_plan, require_open_files
from zcproto.load.progress import view_for
from zcproto.load.result import Result, Verdict
from zcproto.load.run import Stop, View, run

PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")
EXIT_CODES: Final = {Verdict.VERIFIED: 0, Verdict.FAILED: 1, Verdict.INTERRUPTED: 130}


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files to write, and the bars of figures by their keys."""

    json: Path | None = None
    hdr: Path | None = None
    plot: Path | None = None
    bars: Mapping[str, float] = field(default_factory=dict)


def check_outputs(outputs: Outputs) -> None:
    """Raise ConfigError before the run for a file that cannot be written after it."""
    faults = []
    for path in (outputs.json, outputs.hdr, outputs.plot):
        if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
            faults.append(f"{escape_text(str(path))}: cannot be written; give a file in a writable folder")
    if outputs.plot is not None:
        importlib.import_module("matplotlib")  # fail before the run if it is missing
        if outputs.plot.suffix not in PLOT_SUFFIXES:
            faults.append(
                f"{escape_text(str(outputs.plot))}: the name must end in {', '.join(PLOT_SUFFIXES)}"
            )
    if faults:
        raise ConfigError(faults)


def run_and_report(plan: Plan, outputs: Outputs, console: Console) -> Result:
    """Carry out a plan, print its report and write its files. Raises ConfigError before it connects."""
    check_plan(plan)
    check_outputs(outputs)
    require_open_files(
        -(-plan.connections // plan.processes) + SPARE_FILES,
        plan.connections,
        lambda limit: (limit - SPARE_FILES) * plan.processes,
    )
    started = time.time()
    with view_for(console) as view, asyncio.Runner(loop_factory=new_event_loop) as runner:
        result = runner.run(_run_interruptible(plan, view))
    report.show(result, console, outputs.bars)
    if outputs.json is not None:
        content = json.dumps(report.as_json(result, outputs.bars, started), indent=2)
        outputs.json.write_text(content + "\n", encoding="utf-8")
    if outputs.hdr is not None:
        hdr.write_file(outputs.hdr, result.record, started)
    if outputs.plot is not None:
        from zcproto.load.plot import write_plot  # noqa: PLC0415 - importing matplotlib takes half a second

        write_plot(outputs.plot, result)
    return result


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
