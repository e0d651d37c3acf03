"""The report of a run: figures with units and limits, as tables on a console and as one JSON object."""

from __future__ import annotations

import dataclasses
import os
import platform
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final, NamedTuple, TextIO

import click

from zcproto.common.text import aligned, counted, escape_text
from zcproto.load.hdr import PERCENTILES, percentiles_ms
from zcproto.load.record import TICKS_PER_SECOND, Latencies, RequestKind
from zcproto.load.result import Moment, Result, Verdict

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
_COLOURS: Final = {Verdict.VERIFIED: "green", Verdict.FAILED: "red", Verdict.INTERRUPTED: "yellow"}


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


def show(result: Result, out: TextIO, bars: Mapping[str, float]) -> None:
    """Print the tables and the verdict."""
    rows, saturated = figures(result, bars), generator_saturated(result)
    for part in ("", _latency_table(result), _rate_table(result), _figure_table(rows, saturated)):
        click.echo(part, out)
    if not saturated and not all(row.holds for row in rows):
        click.echo(
            "no: the figure is above what an idle machine reaches. Other programs or a slow processor raise it;"
            " nothing that was verified depends on it.\n",
            out,
        )
    click.echo(_count_table(result), out)
    if errors := _errors(result):
        click.echo(table("Failures", ("", "count"), errors), out)
    if saturated:
        click.secho(
            "generator saturated: it could not keep its schedule, so latencies and pauses do not describe the"
            " server and are not judged; use more --processes, a lower --rate, or another machine",
            out,
            fg="yellow",
        )
    if result.plan.operator is None:
        click.echo("the server's own count was not read; give --operator-key-file to compare it", out)
    if result.server_was_used:
        click.echo(
            "memory per connection is omitted: this server has had connections before, whose memory is reused",
            out,
        )
    click.secho(_sentence(result), out, fg=_COLOURS[result.verdict], bold=True)


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


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a table with its title and an empty line below. Columns but those in `left` are numbers."""
    cells = [[escape_text(cell) for cell in row] for row in rows]
    right = [column for column in range(len(head)) if column not in left]
    return f"{click.style(title, bold=True)}\n{aligned([head, *cells] if any(head) else cells, right)}\n"


def _latency_table(result: Result) -> str:
    rows = []
    measured = _latencies(result)
    for name, label in LATENCY_LABELS.items():
        if name not in measured:
            continue
        latencies = measured[name]
        values = percentiles_ms(latencies)
        cells = [f"{values[key]:.2f}" if values else "-" for key in (*PERCENTILES, "max")]
        rows.append([label, f"{latencies.total:,}", *cells])
    return table("Latency in ms, from when each was due", ("", "count", *PERCENTILES, "max"), rows)


def _rate_table(result: Result) -> str:
    plan = result.plan
    load, reached = _load_rate(result)
    rows = (
        ("connections", plan.arrival_rate, result.connect_rate, result.connect_s),
        (load, plan.rate, reached, result.load_s),
    )
    return table(
        "Rate per second",
        ("", "planned", "reached", "seconds"),
        [
            (what, f"{planned:,.0f}", f"{rate:,.0f}", f"{seconds:.1f}")
            for what, planned, rate, seconds in rows
        ],
    )


def _load_rate(result: Result) -> tuple[str, float]:
    """Return what the load consists of, and how many arrived per second."""
    return ("items", result.item_rate) if result.plan.stream else ("requests", result.request_rate)


def _figure_table(figures: list[Figure], saturated: bool) -> str:
    with_bars = any(each.bar is not None for each in figures)
    rows = []
    for each in figures:
        cells = [each.label, "-" if each.value is None else f"{each.value:,.2f}", each.unit]
        if with_bars:
            mark = "not judged" if saturated and not each.holds else _mark(each.holds)
            cells += ["", ""] if each.bar is None else [f"{each.bar:g}", mark]
        rows.append(cells)
    return table("Figures", ("", "figure", "unit", *(("below", "") if with_bars else ())), rows, (0, 2, 4))


def _count_table(result: Result) -> str:
    rows = [
        [row.what, f"{row.asked:,}", f"{row.client:,}", "-" if row.server is None else f"{row.server:,}",
         _mark(row.agree)]
        for row in result.counted()
    ]  # fmt: skip
    verified, planned = result.verified_connections, result.plan.connections
    rows.append(
        ["verified by a last request", f"{planned:,}", f"{verified:,}", "", _mark(verified == planned)]
    )
    return table("Counts of both sides", ("", "planned", "client", "server", ""), rows, (0, 4))


def _mark(holds: bool) -> str:
    return "ok" if holds else "no"


def _errors(result: Result) -> list[tuple[str, str]]:
    """Return failures and how often each happened."""
    counts: dict[str, int] = {}
    for kind, tally in result.record.tallies.items():
        counts |= {f"{kind.value}: error {name}": number for name, number in sorted(tally.errors.items())}
        counts |= {
            f"{kind.value}: not sent, {cause}": number for cause, number in sorted(tally.not_sent.items())
        }
        counts |= {f"{kind.value}: wrong answer": tally.unequal, f"{kind.value}: no answer": tally.lost}
    items = result.record.items
    counts |= {"items: wrong or out of order": items.unequal, "items: did not arrive": items.lost}
    counts |= {
        f"connection: {cause}": number for cause, number in sorted(result.record.lost_connections.items())
    }
    return [(what, f"{number:,}") for what, number in counts.items() if number]


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
