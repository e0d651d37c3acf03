"""Add up the reports of several processes: the status, `server.stats`, readiness and metrics of all workers.

    report of each process -> merge(reports) -> status, server.stats, /readyz and /metrics of the server

Decides: how each figure is added. Every figure has a rule below.

Rules:
- The result does not depend on the order of the reports, and a merge of merges is the merge of all.
- A report is data of msgpack types, never changed after it was made. It has a line per process in `workers`.
- Counters of processes that have ended stay in the sums: `lasting` is what remains of their reports.
- A report from another process is checked when it is unpacked, and its size is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, lru_cache, partial
from operator import add, itemgetter
from typing import Any, Final

from zcproto.certs.sources import Origin
from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import MAX_LABEL, METRICS, Reading, Series
from zcproto.sessions.health import HealthState

MAX_ROWS: Final = 1_000
"""Rows of a merged list, such as alerts."""

_MAX_NODES: Final = 50_000
"""Numbers, texts and containers in the figures of a report, without the series of its metrics."""
_MAX_NESTING: Final = 8

# Path of a figure, rule. `*` stands for all figures below. `total` and `buckets` are sums that only grow. Workers
# know sessions of one another, so that sessions are not added.
_STATUS: Final = """
api same
version same
pid same
time max
started_at min
uptime_s max
addresses same
draining min
log_level same
connections.limit same
connections.refused.* total
connections.* sum
sessions.opened total
sessions.revoked total
sessions.* max
requests.in_flight sum
requests.* total
streams.open sum
streams.waiting_bytes sum
streams.* total
runs.ended total
runs.lost total
runs.* sum
calls.ended.* total
calls.* sum
traffic.rate_window_s max
traffic.latency_window_s max
traffic.work columns
traffic.waits columns
traffic.* sum
handshakes.in_progress sum
handshakes.pending sum
handshakes.* total
certificates certificates
store.url same
store.state worst
store.refusing max
store.pending_revocations sum
store.* total
alerts.* rows
process.cpu_s total
process.loop_lag_s max
process.* sum
"""

_STATS: Final = """
connections sum
tcp_connections sum
http.connections sum
http.redirect.connections sum
http.* total
sessions max
running sum
tasks sum
idempotency.running sum
idempotency.* total
store.state worst
store.refusing max
store.pending_revocations sum
store.* total
handshakes_in_progress sum
handshakes_pending sum
rss_bytes sum
longest_pause_s max
longest_own_pause_s max
pauses buckets
certificates certificates
last_renewal latest
* total
"""

_READINESS: Final = """
ready max
has_store min
reasons texts
warnings texts
checks.draining min
checks.store worst
checks.certificates certificates
"""


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one process, or of several after a merge.

    `status`, `stats` and `readiness` are the reports of snapshot.py, with counts of durations in place of
    percentiles. `workers` has a line for each process.
    """

    status: Mapping[str, Any]
    stats: Mapping[str, Any]
    readiness: Mapping[str, Any]
    series: Series
    workers: list[dict[str, Any]] = field(default_factory=list)


class Depth(IntEnum):
    """What a report has. A deeper one serves for the others."""

    READINESS = 0
    """`readiness` alone, which is cheap."""

    FIGURES = 1
    STATS = 2
    """The same, and the interval of the longest pauses starts again."""


def merge(reports: Iterable[Report]) -> Report:
    """Return the report of all these processes together. Raises ValueError if they do not fit together."""
    parts = list(reports)
    try:
        readiness = _merge(_READINESS, [part.readiness for part in parts])
        if readiness.get("ready"):
            readiness["reasons"] = []  # those of a worker that is not ready
        return Report(
            status=_merge(_STATUS, [part.status for part in parts]),
            stats=_merge(_STATS, [part.stats for part in parts]),
            readiness=readiness,
            series=merge_series(part.series for part in parts),
            workers=sorted((line for part in parts for line in part.workers), key=_rank),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"these reports do not fit together: {error!r}") from error


def _rank(line: Mapping[str, Any]) -> tuple[int, int, int]:
    name = line["worker"]
    return int(name) if name.isdecimal() else 0, line["started_at"], line["pid"] or 0


def lasting(report: Report) -> Report:
    """Return what remains in the sums when the processes of a report have ended: counters that are not 0."""
    return Report(
        status=_totals(_STATUS, report.status),
        stats=_totals(_STATS, report.stats),
        readiness={},
        series=lasting_series(report.series),
    )


# --- rules ---------------------------------------------------------------------------------------------------


def _columns(values: Sequence[list[int]]) -> list[int]:
    """Add counts by bucket. A process without methods has no buckets."""
    total: list[int] = []
    for counts in filter(None, values):
        if total and len(total) != len(counts):
            raise ValueError("counts with different bounds cannot be added")
        total = list(map(add, total, counts)) if total else list(counts)
    return total


def _rows(values: Sequence[list[Any]]) -> list[Any]:
    """Join lists, newest rows first. A list that is too long loses the oldest."""
    return sorted((row for rows in values for row in rows), key=_age)[:MAX_ROWS]


def _age(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return -(row.get("ended_at") or row.get("began_at") or 0), repr(sorted(row.items(), key=itemgetter(0)))


def _certificates(values: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """List each certificate once, with the shortest time left. Workers may serve different ones for a moment."""
    found: dict[str, dict[str, Any]] = {}
    for one in (one for each in values for one in each):
        key = repr([value for name, value in sorted(one.items()) if name not in _LEFT])
        if key not in found or one["seconds_left"] < found[key]["seconds_left"]:
            found[key] = one
    return sorted(
        found.values(), key=lambda one: (_SOURCES.get(one.get("source", ""), 0), repr(sorted(one.items())))
    )


_LEFT: Final = frozenset({"days_left", "seconds_left"})
_SOURCES: Final = {origin.value: rank for rank, origin in enumerate(Origin)}
_HEALTH: Final = [HealthState.HEALTHY.value, HealthState.RECOVERING.value, HealthState.DEGRADED.value]

_RULES: Final[Mapping[str, Callable[[Sequence[Any]], Any]]] = {
    "same": lambda values: min(filter(None, values), key=repr, default=values[0]),
    "sum": sum,
    "total": sum,
    "max": max,
    "min": min,
    "columns": _columns,
    "buckets": _columns,
    "rows": _rows,
    "texts": lambda values: sorted({text for texts in values for text in texts}),
    "certificates": _certificates,
    "worst": partial(max, key=_HEALTH.index),
    "latest": partial(max, key=itemgetter("at")),
}
_LASTING: Final = frozenset({"total", "buckets"})


def _merge(table: str, parts: Sequence[Mapping[str, Any]], path: str = "") -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if part.get(key) is not None]
        rule = rule_of(table, path + key)
        if values and isinstance(values[0], Mapping) and rule != "latest":  # the rules of its figures apply
            merged[key] = _merge(table, values, f"{path}{key}.")
        else:
            merged[key] = _RULES[rule](values) if values else None
    return merged


def _totals(table: str, part: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    totals = {}
    for key, value in part.items():
        rule = rule_of(table, path + key)
        if isinstance(value, Mapping):
            if found := _totals(table, value, f"{path}{key}."):
                totals[key] = found
        elif value and rule in _LASTING:
            totals[key] = value
    return totals


@lru_cache(maxsize=1_024)
def rule_of(table: str, path: str) -> str:
    """Return the rule of a figure: its own, or that of the nearest `*` above it."""
    rules = _rules(table)
    rule = rules.get(path)
    while rule is None and path:
        path = path.rpartition(".")[0]
        rule = rules.get(path) or rules.get(f"{path}.*" if path else "*")
    return rule or "same"


@cache
def _rules(table: str) -> dict[str, str]:
    words = iter(table.split())
    return dict(zip(words, words, strict=True))


# --- between processes ---------------------------------------------------------------------------------------


def pack_report(report: Report) -> list[Any]:
    """Return the report as a value of msgpack types."""
    return [
        report.status,
        report.stats,
        report.readiness,
        pack_series(report.series),
        report.workers,
    ]


def unpack_report(packed: Any) -> Report:
    """Return the report of a packed value. Raises ValueError if it is not what `pack_report` returns."""
    try:
        status, stats, readiness, series, workers = packed
        figures = [status, stats, readiness]
        _check([figures, workers], _MAX_NESTING)
        if {*map(type, [*figures, *workers])} != {dict}:
            raise ValueError("it has other fields")
        return Report(status, stats, readiness, unpack_series(series), workers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is not a report: {error}") from error


def _check(value: Any, nesting: int, left: int = _MAX_NODES) -> int:
    """Return how many of `left` values are left after this one and those in it. Raises ValueError."""
    if left <= 0 or nesting < 0:
        raise ValueError("it has too many figures")
    left -= 1
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a name is not a text")
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            left = _check(each, nesting - 1, left)
    elif not (value is None or isinstance(value, int | float | str)):
        raise ValueError(f"it has a value of type {type(value).__name__}")
    return left


# --- series of metrics -----------------------------------------------------------------------------------------
# `Metric.across` decides: counters and histograms are added, a gauge as the table of observe/metrics.py says.

MAX_SERIES: Final = 100_000
"""Series in one packed value: a server with 10,000 methods and topics has fewer."""

MAX_BOUNDS: Final = 64
"""Bounds of one histogram."""

_JOIN: Final[Mapping[str, Callable[[Any, Any], Any]]] = {"sum": add, "max": max, "min": min}


def merge_series(parts: Iterable[Series]) -> Series:
    """Return the series of all parts together. The parts are not changed, nor shared with the result."""
    merged: Series = {}
    for part in parts:
        for name, series in part.items():
            join, into = _JOIN[METRICS[name].across], merged.setdefault(name, {})
            for labels, value in series.items():
                before = into.get(labels)
                if isinstance(value, Histogram):
                    if before is None:
                        before = into[labels] = Histogram(value.bounds)
                    assert isinstance(before, Histogram)
                    _add(before, value)
                elif before is None:
                    into[labels] = value
                else:
                    into[labels] = join(before, value)
    return merged


def _add(total: Histogram, part: Histogram) -> None:
    if part.bounds != total.bounds:
        raise ValueError("histograms with different bounds cannot be added")
    total.counts = list(map(add, total.counts, part.counts))
    total.total += part.total


def lasting_series(series: Series) -> Series:
    """Return the series that outlive their process: counters and histograms that have counted something."""
    kept = {
        name: {
            labels: value
            for labels, value in values.items()
            if (any(value.counts) if isinstance(value, Histogram) else value)
        }
        for name, values in series.items()
        if METRICS[name].kind != "gauge"
    }
    return {name: values for name, values in kept.items() if values}


def readings_of(series: Series) -> Iterator[Reading]:
    """Yield the series as readings, for `Metrics`."""
    for name, values in series.items():
        for labels, value in values.items():
            yield name, value, *labels


def pack_series(series: Series) -> list[Any]:
    """Return the series as a value of msgpack types, in which each label and each list of bounds appears once."""
    texts: dict[str, int] = {}
    bounds: dict[tuple[float, ...], int] = {}
    packed = {
        name: [
            [
                [texts.setdefault(label, len(texts)) for label in labels],
                [bounds.setdefault(value.bounds, len(bounds)), value.total, value.counts]
                if isinstance(value, Histogram)
                else value,
            ]
            for labels, value in values.items()
        ]
        for name, values in series.items()
    }
    return [list(texts), [list(each) for each in bounds], packed]


def unpack_series(packed: Any) -> Series:
    """Return the series of a packed value. Raises ValueError if it is not what `pack_series` returns."""
    try:
        texts, bounds, metrics = packed
        if sum(map(len, metrics.values())) > MAX_SERIES or len(bounds) > len(METRICS):
            raise ValueError("too many series")
        bounds = [tuple(map(float, each[:MAX_BOUNDS])) for each in bounds]
        if not all(isinstance(text, str) and len(text) <= MAX_LABEL for text in texts):
            raise ValueError("a label is not a text")
        return {name: _unpack_metric(name, rows, texts, bounds) for name, rows in metrics.items()}
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"these are not series of metrics: {error}") from error


def _unpack_metric(
    name: str, rows: Any, texts: list[str], bounds: list[tuple[float, ...]]
) -> dict[tuple[str, ...], float | Histogram]:
    metric = METRICS[name]
    found: dict[tuple[str, ...], float | Histogram] = {}
    for indexes, value in rows:
        if len(indexes) != len(metric.labels):
            raise ValueError(f"{name} has labels {metric.labels}")
        labels = tuple([texts[index] for index in indexes])
        if metric.kind != "histogram":
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is not a number")
            found[labels] = value
            continue
        number, total, counts = value
        histogram = Histogram(bounds[number])
        if type(counts) is not list or len(counts) != len(histogram.counts) or {*map(type, counts)} != {int}:
            raise ValueError(f"{name} has other counts than bounds")
        histogram.counts, histogram.total = counts, float(total)
        found[labels] = histogram
    return found
