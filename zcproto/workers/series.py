"""Add up the series of several processes, and carry them from one process to another.

    series_of(readings) -> pack_series -> (another process) -> unpack_series -> merge_series -> Metrics

Decides: how two values of a series become one, and the form in which series are sent.

Rules:
- `Metric.across` decides: counters and histograms are added, a gauge as the table of metrics.py says.
- The order of the parts does not matter, and a sum of sums is the sum of all.
- A packed value consists of msgpack types. What comes from another process is checked; its size is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import add
from typing import Any, Final

from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import MAX_LABEL, METRICS, Reading, Series

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
