"""Latency at half of the rate that this machine can sustain, with 10,000 connections.

First, for some seconds, more requests are due than can be answered: the rate at which they are answered in the
end is the maximum of server and generator together, each in a process of its own. Then a new server gets half
of it, in an open loop over all connections; each latency counts from when its request was due.

Every answer is compared with what was sent, both times. Where the generator was late itself, the figure
includes its lateness; the report has a note, and the bar stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, SECONDS, measurement, progress
from bench.curves.watch import load_new_server
from bench.report import Report, Row
from zcproto.load.demo import ARRIVAL_RATE, temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.report import generator_saturated
from zcproto.load.result import Result, Verdict

MAX_P99_9_MS: Final = 25.0


@dataclass(frozen=True, slots=True)
class HalfPlan:
    """One run. Rates are requests a second over all connections."""

    connections: int = 10_000
    flood_rate: float = 60_000.0
    """Several times what a server in Python can do."""
    flood_s: float = 2.0
    seconds: float = 15.0
    """Of half of the maximum."""
    arrival_rate: float = ARRIVAL_RATE


def half_of_maximum(folder: Path, plan: HalfPlan) -> Report:
    """Carry out both loads. Raises ConfigError for what cannot be measured here."""

    def load(name: str, rate: float, seconds: float) -> Result:
        return load_new_server(folder / name, plan.connections, rate, seconds, plan.arrival_rate).result

    progress("the maximum: more requests than can be answered ...")
    flood = load("flood", plan.flood_rate, plan.flood_s)
    if flood.verdict is not Verdict.VERIFIED or not flood.request_rate:
        return report(flood, flood)
    progress(f"half of {flood.request_rate:,.0f} a second ...")
    return report(flood, load("half", flood.request_rate / 2, plan.seconds))


def report(flood: Result, half: Result) -> Report:
    waits = percentiles_ms(half.record.latencies["request"])
    late = percentiles_ms(half.record.latencies["lag"])
    faults = [*flood.reasons(), *(half.reasons() if half is not flood else ())]
    rows = [
        Row("maximum", "maximum, requests a second", flood.request_rate),
        Row("asked", "half of it, asked for", half.plan.rate),
        Row("answered", "half of it, answered", half.request_rate),
        Row("verified", "connections that answered to the end", half.verified_connections),
        Row("unverified", "reasons why not all is verified", len(faults), equals=0),
        Row("cpu_us", "server CPU of a request", half.cpu_per_request_us, "us"),
        Row("p50_ms", "request, p50", waits.get("p50"), "ms"),
        Row("p99_ms", "request, p99", waits.get("p99"), "ms"),
        Row("p99_9_ms", "request, p99.9", waits.get("p99.9"), "ms", below=MAX_P99_9_MS),
        Row("longest_ms", "request, longest", waits.get("max"), "ms"),
        Row("late_p99_9_ms", "lateness of the generator, p99.9", late.get("p99.9"), "ms"),
    ]
    notes = (
        ["the generator was late itself: its lateness is in these figures"]
        if generator_saturated(half)
        else []
    )
    interrupted = Verdict.INTERRUPTED in (flood.verdict, half.verdict)
    return Report({"figure": rows}, faults[:5], notes, interrupted=interrupted)


@measurement
@click.option("--connections", type=COUNT, default=10_000, show_default=True, help="Each with a session.")
@click.option("--seconds", type=SECONDS, default=15.0, show_default=True, help="Of half of the maximum.")
def command(connections: int, seconds: float) -> Report:
    with temporary_home() as home:
        return half_of_maximum(home.path, HalfPlan(connections=connections, seconds=seconds))
