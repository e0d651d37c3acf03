"""The report of a run: figures with units and limits, as tables on a console and as one JSON object."""

from __future__ import annotations

import dataclasses
import os
import platform
import ssl
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zcproto.common.text import counted
from zcproto.load.hdr import PERCENTILES, percentiles_ms
from zcproto.load.record import TICKS_PER_SECOND, Latencies, RequestKind
from zcproto.load.result import Counted, Moment, Result, Verdict

SCHEMA: Final = "zcproto-bench/1"
SATURATED_LAG_MS: Final = 5.0
SATURATED_CPU_SHARE: Final = 0.95
"""Beyond these, latencies are dominated by the generator."""

LATENCY_LABELS: Final = {
    "handshake": "TCP and TLS handshake",
    "session_open": "session.open",
    "request": "request",
    "from_send": "request, from when it was sent",
    "first_item": "first item, from when its stream was due",
    "item": "item",
    "between_items": "item, from the one before",
    "last_request": "last request on each",
}
_STYLES: Final = {
    Verdict.VERIFIED: "bold green",
    Verdict.FAILED: "bold red",
    Verdict.INTERRUPTED: "bold yellow",
}


class Figure(NamedTuple):
    """A measured number. `value` is None if it could not be measured; `bar` is the value it must stay below."""

    key: str
    label: str
    unit: str
    value: float | None
    bar: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value was measured and is below its bar. True without a bar."""
        return self.bar is None or (self.value is not None and self.value < self.bar)

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 6)
        return {"value": value, "unit": self.unit, "bar": self.bar, "holds": self.holds}


def _percentile(name: str, percentile: str) -> Callable[[Result], float | None]:
    return lambda result: percentiles_ms(result.record.latencies[name]).get(percentile)


_Figures = tuple[tuple[str, str, str, Callable[[Result], float | None]], ...]

_REQUEST_FIGURES: Final[_Figures] = (
    ("request_p99_ms", "request under load, p99", "ms", _percentile("request", "p99")),
    (
        "request_cpu_us",
        "server CPU per request, at this rate",
        "us",
        lambda result: result.cpu_per_request_us,
    ),
)
_ITEM_FIGURES: Final[_Figures] = (
    ("first_item_p99_ms", "time to the first item, p99", "ms", _percentile("first_item", "p99")),
    ("item_p99_ms", "item, p99", "ms", _percentile("item", "p99")),
    ("between_items_p99_ms", "time between items, p99", "ms", _percentile("between_items", "p99")),
    ("item_cpu_us", "server CPU per item, at this rate", "us", lambda result: result.cpu_per_item_us),
)
_FIGURES: Final[_Figures] = (
    ("handshake_p99_ms", "TLS handshake while connecting, p99", "ms", _percentile("handshake", "p99")),
    (
        "pause_connecting_ms",
        "peak lag of the server's event loop, connecting",
        "ms",
        lambda result: result.longest_pause_ms(Moment.CONNECTED),
    ),
    (
        "pause_loading_ms",
        "peak lag of the server's event loop, under load",
        "ms",
        lambda result: result.longest_pause_ms(Moment.LOADED),
    ),
    (
        "memory_per_connection_kib",
        "server memory per connection and session",
        "KiB",
        lambda result: result.kib_per_connection,
    ),
    (
        "connect_cpu_s",
        "server CPU to connect and open all sessions",
        "s",
        lambda result: result.connect_cpu_s,
    ),
    (
        "generator_arrival_lag_p99_ms",
        "generator lag, connecting, p99",
        "ms",
        _percentile("arrival_lag", "p99"),
    ),
    ("generator_lag_p99_ms", "generator lag, under load, p99", "ms", _percentile("lag", "p99")),
    (
        "generator_cpu_percent",
        "CPU of the busiest generator process, of one core",
        "%",
        lambda result: result.record.cpu_share * 100,
    ),
)


def figures(result: Result, bars: Mapping[str, float]) -> list[Figure]:
    """Return all figures of a run. `bars` are by key."""
    of_load = _ITEM_FIGURES if result.plan.stream else _REQUEST_FIGURES
    return [
        Figure(key, label, unit, measure(result), bars.get(key))
        for key, label, unit, measure in (*of_load, *_FIGURES)
    ]


def _latencies(result: Result) -> dict[str, Latencies]:
    """Return the latencies of this kind of load by name."""
    target = result.plan.target
    if result.plan.stream:
        others = {"request", "from_send"}
    else:
        others = (
            {"item"} if target is not None and target.is_stream else {"first_item", "item", "between_items"}
        )
    return {name: each for name, each in result.record.latencies.items() if name not in others}


def generator_saturated(result: Result) -> bool:
    """Return whether the generator was the bottleneck, so that latencies do not describe the server."""
    latencies = result.record.latencies
    late_ms = [percentiles_ms(latencies[name]).get("p99", 0.0) for name in ("arrival_lag", "lag")]
    return max(late_ms) > SATURATED_LAG_MS or result.record.cpu_share > SATURATED_CPU_SHARE


def show(result: Result, console: Console, bars: Mapping[str, float]) -> None:
    """Print the tables and the verdict."""
    console.print()
    console.print(_latency_table(result))
    console.print(_rate_table(result))
    rows, saturated = figures(result, bars), generator_saturated(result)
    console.print(_figure_table(rows, saturated))
    if not saturated and not all(row.holds for row in rows):
        console.print(
            "no: the figure is above what an idle machine reaches. Other programs or a slow processor raise it;"
            " nothing that was verified depends on it.",
            soft_wrap=True,
        )
    console.print(_count_table(result))
    _show_errors(result, console)
    if saturated:
        console.print(
            Text(
                "generator saturated: it could not keep its schedule, so latencies and pauses do not describe the"
                " server and are not judged; use more --processes, a lower --rate, or another machine",
                "yellow",
            )
        )
    if result.plan.operator is None:
        console.print("the server's own count was not read; give --operator-key-file to compare it")
    if result.server_was_used:
        console.print(
            "memory per connection is omitted: this server has had connections before, whose memory is reused"
        )
    console.print(Text(_sentence(result), _STYLES[result.verdict]), soft_wrap=True)


def _sentence(result: Result) -> str:
    if result.verdict is Verdict.VERIFIED:
        requests = (
            result.record.tallies[RequestKind.LOAD].equal + result.record.tallies[RequestKind.LAST].equal
        )
        items = f"{counted(result.record.items.equal, 'item')} in order, " if result.plan.stream else ""
        connections = counted(result.plan.connections, "connection")
        return (
            f"verified: {result.verified_connections:,} of {connections}, {items}"
            f"{counted(requests, 'correct answer')}, 0 errors"
        )
    if result.verdict is Verdict.INTERRUPTED:
        return "interrupted: the figures cover part of the run, and nothing is verified"
    return "failed: " + "; ".join(result.reasons())


def new_table(title: str, *columns: str) -> Table:
    """Return a table whose first column is on the left and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _latency_table(result: Result) -> Table:
    table = new_table("Latency in ms, from when each was due", "", "count", *PERCENTILES, "max")
    measured = _latencies(result)
    for name, label in LATENCY_LABELS.items():
        if name not in measured:
            continue
        latencies = measured[name]
        values = percentiles_ms(latencies)
        cells = [f"{values[key]:.2f}" if values else "-" for key in (*PERCENTILES, "max")]
        table.add_row(label, f"{latencies.total:,}", *cells)
    return table


def _rate_table(result: Result) -> Table:
    table = new_table("Rate per second", "", "planned", "reached", "seconds")
    plan = result.plan
    table.add_row(
        "connections", f"{plan.arrival_rate:,.0f}", f"{result.connect_rate:,.0f}", f"{result.connect_s:.1f}"
    )
    load, reached = _load_rate(result)
    table.add_row(load, f"{plan.rate:,.0f}", f"{reached:,.0f}", f"{result.load_s:.1f}")
    return table


def _load_rate(result: Result) -> tuple[str, float]:
    """Return what the load consists of, and how many arrived per second."""
    return ("items", result.item_rate) if result.plan.stream else ("requests", result.request_rate)


def _figure_table(rows: list[Figure], saturated: bool) -> Table:
    with_bars = any(row.bar is not None for row in rows)
    table = new_table("Figures", "", "figure", "unit", *(("below", "") if with_bars else ()))
    table.columns[2].justify = "left"
    for row in rows:
        value = "-" if row.value is None else f"{row.value:,.2f}"
        cells: list[str | Text] = [row.label, value, row.unit]
        if with_bars:
            cells += ["", ""] if row.bar is None else [f"{row.bar:g}", _mark_bar(row, saturated)]
        table.add_row(*cells)
    return table


def _count_table(result: Result) -> Table:
    table = new_table("Counts of both sides", "", "planned", "client", "server", "")
    for row in result.counted():
        table.add_row(*_count_cells(row))
    verified = result.verified_connections
    planned = result.plan.connections
    table.add_row(
        "verified by a last request", f"{planned:,}", f"{verified:,}", "", _mark(verified == planned)
    )
    return table


def _count_cells(row: Counted) -> list[str | Text]:
    server = "-" if row.server is None else f"{row.server:,}"
    return [row.what, f"{row.asked:,}", f"{row.client:,}", server, _mark(row.agree)]


def _mark(holds: bool) -> Text:
    return Text("ok", "green") if holds else Text("no", "bold red")


def _mark_bar(row: Figure, saturated: bool) -> Text:
    if row.holds:
        return Text("ok", "green")
    return Text("not judged" if saturated else "no", "yellow")


def _show_errors(result: Result, console: Console) -> None:
    table = new_table("Failures", "", "count")
    for kind, tally in result.record.tallies.items():
        for name, number in sorted(tally.errors.items()):
            table.add_row(f"{kind.value}: error {name}", f"{number:,}")
        for cause, number in sorted(tally.not_sent.items()):
            table.add_row(f"{kind.value}: not sent, {cause}", f"{number:,}")
        if tally.unequal:
            table.add_row(f"{kind.value}: wrong answer", f"{tally.unequal:,}")
        if tally.lost:
            table.add_row(f"{kind.value}: no answer", f"{tally.lost:,}")
    items = result.record.items
    for outcome, number in (("wrong or out of order", items.unequal), ("did not arrive", items.lost)):
        if number:
            table.add_row(f"items: {outcome}", f"{number:,}")
    for cause, number in sorted(result.record.lost_connections.items()):
        table.add_row(f"connection: {cause}", f"{number:,}")
    if table.row_count:
        console.print(table)


def as_json(result: Result, bars: Mapping[str, float], started: float) -> dict[str, Any]:
    """Return the whole result without any API key. `started` is the start of the run in Unix seconds."""
    plan = result.plan
    record = result.record
    load, reached = _load_rate(result)
    return {
        "schema": SCHEMA,
        "started": moment(started),
        "machine": machine(),
        "plan": {
            field.name: getattr(plan, field.name)
            for field in dataclasses.fields(plan)
            if field.name not in ("credentials", "operator", "ca_file", "target")
        }
        | ({} if plan.target is None else {"method": plan.target.method}),
        "verdict": result.verdict.value,
        "reasons": result.reasons(),
        "verified_connections": result.verified_connections,
        "counted": [{**row._asdict(), "agree": row.agree} for row in result.counted()],
        "latency_ms": {
            name: {"count": each.total, **percentiles_ms(each)} for name, each in _latencies(result).items()
        },
        "rate_per_s": {
            "connections": {"asked": plan.arrival_rate, "reached": round(result.connect_rate, 1)},
            load: {"asked": plan.rate, "reached": round(reached, 1)},
        },
        "duration_s": {
            "connecting": round(result.connect_s, 3),
            "loading": round(result.load_s, 3),
            "total": round(result.total_s, 3),
        },
        "figures": {each.key: each.as_json() for each in figures(result, bars)},
        "generator_saturated": generator_saturated(result),
        "requests": {kind.value: tally.as_json() for kind, tally in record.tallies.items()},
        **({"items": record.items.as_json()} if plan.stream else {}),
        "lost_connections": record.lost_connections,
        "server": {
            moment.value: {"at_s": round(reading.at, 3), **reading.stats._asdict()}
            for moment, reading in result.readings.items()
        },
        "over_time": {
            "tick_s": 1 / TICKS_PER_SECOND,
            "connected": dict(sorted(record.connected_over_time.items())),
            "answered": dict(sorted(record.answered_over_time.items())),
        },
    }


def moment(seconds: float) -> str:
    """Return Unix seconds as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Return the properties of the machine that affect figures."""
    return {
        "host": platform.node(),
        "zcproto": metadata.version("zcproto"),
        "cpus": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "openssl": ssl.OPENSSL_VERSION,
    }
