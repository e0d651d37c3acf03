"""A run as a page of Markdown with its plots: spec/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.requirements.requirement import SECTIONS
from bench.requirements.run import Run
from bench.requirements.table import aim, figure, sentence
from zcproto.load.hdr import PERCENTILES, percentiles_ms
from zcproto.load.report import LATENCY_LABELS

COMMAND: Final = "python -m bench requirements --curves --markdown spec/benchmarks.md"
IMAGES: Final = "images"
"""The folder of the plots, beside the page."""


def beginning(moment: str, machine: str) -> list[str]:
    """Return what the page is, and what its figures depend on."""
    return [
        "# Benchmarks",
        "",
        "The last full run on one machine. This page is written by",
        "",
        f"    {COMMAND}",
        "",
        "in a clone of the repository, which measures all of it again, anywhere.",
        "",
        f"- When: {moment}",
        f"- Machine: {_escaped(machine)}",
        "- Method: servers and their clients in processes of their own on this one machine, over its loopback",
        "  interface, with TLS as in production. How a figure is found stands beside it; what figures mean, and",
        "  how to repeat them, is in [bench/README.md](../bench/README.md).",
        "",
    ]


def requirements(run: Run) -> list[str]:
    lines = ["## Requirements", "", _escaped(f"Outcome: {sentence(run)}."), ""]
    for section in SECTIONS:
        rows = [row for row in run.rows if row.requirement.section == section]
        if not rows:
            continue
        lines += [
            f"### {section}",
            "",
            "| requirement | target | figure | verdict | aim | how |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            each = row.requirement
            cells = (each.name, each.target, figure(row), row.verdict.value, aim(row), each.how)
            lines.append("| " + " | ".join(map(_escaped, cells)) + " |")
        lines.append("")
    return [*lines, *_more_figures(run)]


def _more_figures(run: Run) -> list[str]:
    """Figures that have no row of their own."""
    drawn, lines = run.drawn, list[str]()
    latencies = {f"handshake at rest, {name}": each.latencies for name, each in drawn.handshakes.items()}
    if drawn.many is not None:
        measured = drawn.many.result.record.latencies
        latencies |= {label: measured[name] for name, label in LATENCY_LABELS.items() if measured[name].total}
    if latencies:
        columns = (*PERCENTILES, "max")
        lines += [
            f"| latency in ms | count | {' | '.join(columns)} |",
            "|---|" + "---:|" * (len(columns) + 1),
        ]
        for name, each in latencies.items():
            found = percentiles_ms(each)
            cells = [f"{found[column]:.2f}" for column in columns]
            lines.append(f"| {name} | {each.total:,} | {' | '.join(cells)} |")
        lines.append("")
    if drawn.handshakes:
        lines += ["| key type | server CPU for a handshake |", "|---|---:|"]
        lines += [f"| {name} | {each.cpu_ms:.2f} ms |" for name, each in drawn.handshakes.items()] + [""]
    if drawn.payloads:
        lines += ["| payload | server CPU for a request | its client waits |", "|---:|---:|---:|"]
        lines += [
            f"| {payload:,} B | {cost.cpu_us:,.1f} us | {cost.wait_us:,.1f} us |"
            for payload, cost in drawn.payloads.items()
        ] + [""]
    return ["### More figures", "", *lines] if lines else []


def save_plots(page: Path, plots: Mapping[str, Figure]) -> list[str]:
    """Write plots beside a page; return the lines that show them, by their captions."""
    if not plots:
        return []
    folder, lines = page.parent / IMAGES, list[str]()
    folder.mkdir(exist_ok=True)
    for caption, plot in plots.items():
        name = "bench-" + re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-") + ".svg"
        with rc_context({"svg.hashsalt": "zcproto", "svg.fonttype": "none"}):
            plot.savefig(folder / name, metadata={"Date": None})
        lines += [f"![{caption}]({IMAGES}/{name})", ""]
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("\n", " ")
