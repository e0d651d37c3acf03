"""One open stream on each of 10,000 connections, which yields one item a second.

Each item must be the one that follows the one before: none is lost, reordered or doubled. The latency of an item
counts from when it was due, a whole number of seconds after its stream was, so that a server that falls behind
shows it. What the memory of a server grows by under the load is divided by the number of streams: it includes what
their methods keep, here a timer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, RATE, SECONDS, measurement
from bench.curves.watch import Watched, load_new_server
from bench.report import Report, Row
from zcproto.load.demo import ARRIVAL_RATE, temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.report import generator_saturated
from zcproto.load.result import Verdict

METHOD: Final = "repeat"
MAX_ITEM_P99_MS: Final = 100.0
KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class StreamsPlan:
    """One run. `rate` is in items a second of each stream."""

    connections: int = 10_000
    rate: float = 1.0
    seconds: float = 20.0
    arrival_rate: float = ARRIVAL_RATE


def open_streams(folder: Path, plan: StreamsPlan) -> Report:
    """Carry out the load. Raises ConfigError for what cannot be measured here."""
    rate = plan.rate * plan.connections
    return report(
        load_new_server(folder, plan.connections, rate, plan.seconds, plan.arrival_rate, stream=METHOD)
    )


def report(watched: Watched) -> Report:
    result = watched.result
    items = result.record.items
    waits, firsts, gaps = (
        percentiles_ms(result.record.latencies[name]) for name in ("item", "first_item", "between_items")
    )
    late = percentiles_ms(result.record.latencies["lag"])
    faults = result.reasons()
    rows = [
        Row("streams", "streams, one on each connection", result.plan.streams),
        Row("asked", "items a second, asked for", result.plan.rate),
        Row("reached", "items a second, with opening and ending", result.item_rate),
        Row("items", "items in order", items.equal),
        Row("lost", "items lost", items.lost + sum(items.not_sent.values()), equals=0),
        Row("wrong", "items reordered, doubled or wrong", items.unequal, equals=0),
        Row("unverified", "reasons why not all is verified", len(faults), equals=0),
        Row("cpu_us", "server CPU of an item", result.cpu_per_item_us, "us"),
        Row("first_p99_ms", "first item, p99", firsts.get("p99"), "ms"),
        Row("p50_ms", "item, p50", waits.get("p50"), "ms"),
        Row("p99_ms", "item, p99", waits.get("p99"), "ms", below=MAX_ITEM_P99_MS),
        Row("longest_ms", "item, longest", waits.get("max"), "ms"),
        Row("between_p99_ms", "from the item before, p99", gaps.get("p99"), "ms"),
        Row("late_p99_ms", "lateness of the generator, p99", late.get("p99"), "ms"),
        Row("connection_kib", "server memory of a connection", result.kib_per_connection, "KiB"),
        Row("stream_kib", "server memory of its open stream", stream_kib(watched), "KiB"),
    ]
    notes = (
        ["the generator was late itself: its lateness is in these figures"]
        if generator_saturated(result)
        else []
    )
    return Report({"figure": rows}, faults[:5], notes, interrupted=result.verdict is Verdict.INTERRUPTED)


def stream_kib(watched: Watched) -> float | None:
    """Return by how much the resident memory was above that of the first sample of the load, for each stream."""
    samples = watched.samples.get("load", [])
    if len(samples) < 2:
        return None
    most = max(sample.rss_bytes for sample in samples)
    return (most - samples[0].rss_bytes) / KIB / watched.result.plan.streams


@measurement
@click.option("--connections", type=COUNT, default=10_000, show_default=True, help="Each with one stream.")
@click.option("--rate", type=RATE, default=1.0, show_default=True, help="Items a second of each stream.")
@click.option("--seconds", type=SECONDS, default=20.0, show_default=True, help="Of each stream.")
def command(connections: int, rate: float, seconds: float) -> Report:
    with temporary_home() as home:
        return open_streams(home.path, StreamsPlan(connections, rate, seconds))
