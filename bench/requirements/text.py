"""A run as Markdown: `spec/benchmarks.md`, which is written by `zcproto bench --requirements --markdown FILE`."""

from __future__ import annotations

from typing import Final

from bench.requirements.requirement import SECTIONS
from bench.requirements.run import Run
from bench.requirements.table import aim, figure, sentence
from zcproto.load.hdr import PERCENTILES, percentiles_ms
from zcproto.load.report import LATENCY_LABELS

COMMAND: Final = "zcproto bench --requirements --curves --markdown spec/benchmarks.md"


def beginning(moment: str, machine: str) -> list[str]:
    """What the page is, and what its figures depend on."""
    return [
        "# Benchmarks",
        "",
        "What the last full run has found, on one machine. This page is written by",
        "",
        f"    {COMMAND}",
        "",
        "which measures and checks all of it again, anywhere.",
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
    return [*lines, *_beside(run)]


def _beside(run: Run) -> list[str]:
    """Figures that have no row of their own."""
    drawn, lines = run.drawn, ["### Figures beside them", ""]
    latencies = {f"handshake at rest, {name}": each.latencies for name, each in drawn.handshakes.items()}
    if drawn.many is not None:
        record = drawn.many.result.record
        latencies |= {label: record.latencies[name] for name, label in LATENCY_LABELS.items()}
    if latencies:
        columns = (*PERCENTILES, "max")
        lines += [
            f"| latency in ms | count | {' | '.join(columns)} |",
            "|---|" + "---:|" * (len(columns) + 1),
        ]
        for name, each in latencies.items():
            found = percentiles_ms(each)
            cells = [f"{found[column]:.2f}" if found else "-" for column in columns]
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
    return lines if len(lines) > 2 else []


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("\n", " ")
