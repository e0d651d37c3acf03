"""Plots as SVG: the latency by percentile, connections and rate of a run; the latency by rate of a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from zcproto.load.find_max import Search
from zcproto.load.record import TICKS_PER_SECOND, Latencies
from zcproto.load.result import Moment, Result, Verdict

WIDTH: Final = 720
LEFT: Final = 58
RIGHT: Final = 20
LETTER: Final = 6.3
"""About the width of a letter of a legend."""

INK: Final = "#1f2933"
FAINT_INK: Final = "#52606d"
GRID: Final = "#d9dee4"
EDGE: Final = "#9aa5b1"
BLUE: Final = "#2563eb"
LIGHT_BLUE: Final = "#7aa5f8"
GREEN: Final = "#059669"
ORANGE: Final = "#d97706"
DASHES: Final = "6 4"

FEW_DECADES: Final = 1_000
"""Below this range, an axis has room for several labels per decade."""

LINES: Final = {
    "request": ("request, from when it was due", BLUE, ""),
    "from_send": ("request, from when it was sent", LIGHT_BLUE, DASHES),
    "item": ("item, from when it was due", BLUE, ""),
    "first_item": ("first item of a stream", LIGHT_BLUE, DASHES),
    "session_open": ("session.open", GREEN, ""),
    "handshake": ("TCP and TLS handshake", ORANGE, ""),
}
"""Label, colour and dashes of a line."""

NINES: Final = {
    0.0: "0 %",
    0.5: "50 %",
    0.9: "90 %",
    0.99: "99 %",
    0.999: "99.9 %",
    0.9999: "99.99 %",
    0.99999: "99.999 %",
}
PHASES: Final = ((Moment.IDLE, Moment.CONNECTED, "connecting"), (Moment.CONNECTED, Moment.LOADED, "load"),
                 (Moment.LOADED, Moment.VERIFIED, "last requests"))  # fmt: skip

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """A scale with its ticks: values and their labels."""

    low: float
    high: float
    ticks: Mapping[float, str]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value is, from 0 at the low end to 1."""
        low, high, value = (map(math.log, (self.low, self.high, value)) if self.is_log else
                            (self.low, self.high, value))  # fmt: skip
        return (value - low) / (high - low)


def from_zero(high: float, top: float | None = None) -> Axis:
    """Return an axis from 0 to `top`, or to a round number above `high`, with about four ticks."""
    high = max(high, 1e-9)
    grain = 10 ** math.floor(math.log10(high))
    end = math.ceil(high * 1.1 / (grain / 2)) * grain / 2 if top is None else top
    step = next(grain * part for part in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if end / (grain * part) <= 6)
    return Axis(0, end, {step * count: f"{step * count:,g}" for count in range(int(end / step + 1e-9) + 1)})


def logarithmic(values: Iterable[float]) -> Axis:
    """Return an axis around values above zero."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found) / 1.25, max(found) * 1.25
    parts = (1, 2, 5) if high / low < FEW_DECADES else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [part * 10.0**decade for decade in decades for part in parts]
    return Axis(low, high, {tick: f"{tick:,g}" for tick in ticks if low <= tick <= high}, is_log=True)


class Panel:
    """A plot with its title, legend and axes. Points are values, which its axes place."""

    def __init__(self, title: str, height: float, x: Axis, y: Axis, unit: str = "") -> None:
        self._title, self._height, self._x, self._y, self._unit = title, height, x, y, unit
        self._marks: list[str] = []
        self._legend: list[tuple[str, str, str]] = []

    def line(
        self, points: Points, color: str, label: str = "", dashes: str = "", *, fill: bool = False
    ) -> None:
        """Draw a line. With `fill` the area below it has its colour, too."""
        if not points:
            return
        path = " ".join(f"{self._left(x):.1f},{self._top(y):.1f}" for x, y in points)
        if fill:
            first, last = self._left(points[0][0]), self._left(points[-1][0])
            area = f"{first:.1f},{self._height} {path} {last:.1f},{self._height}"
            self._marks.append(f'<polygon points="{area}" fill="{color}" fill-opacity="0.14"/>')
        self._marks.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"{_dashed(dashes)}/>'
        )
        if label:
            self._legend.append((label, color, dashes))

    def dot(self, x: float, y: float, color: str, *, hollow: bool = False) -> None:
        """Draw a dot, or a ring."""
        fill = "#fff" if hollow else color
        self._marks.append(
            f'<circle cx="{self._left(x):.1f}" cy="{self._top(y):.1f}" r="3.2" fill="{fill}" stroke="{color}"'
            ' stroke-width="1.6"/>'
        )

    def text(self, x: float, words: str) -> None:
        """Write words at the top, around a value of the horizontal axis."""
        self._marks.append(
            f'<text x="{self._left(x):.1f}" y="12" text-anchor="middle" font-size="11" fill="{FAINT_INK}">'
            f"{escape(words)}</text>"
        )

    def _left(self, x: float) -> float:
        return LEFT + self._x.share(x) * (WIDTH - LEFT - RIGHT)

    def _top(self, y: float) -> float:
        return self._height * (1 - self._y.share(y))

    def svg(self, top: float) -> tuple[str, float]:
        """Return the elements of the panel below `top`, and where it ends."""
        top += 18
        parts = [f'<text x="12" y="{top:.0f}" font-size="13" fill="{INK}">{escape(self._title)}</text>']
        at = float(WIDTH)
        for label, color, dashes in self._legend:
            width = 42 + LETTER * len(label)
            if at + width > WIDTH:
                at, top = 12, top + 18
            parts.append(
                f'<path d="M{at:.0f} {top - 4:.0f}h20" stroke="{color}" stroke-width="1.8"{_dashed(dashes)}/>'
                f'<text x="{at + 26:.0f}" y="{top:.0f}" font-size="11" fill="{INK}">{escape(label)}</text>'
            )
            at += width
        top += 14
        parts.append(f'<g transform="translate(0 {top:.0f})">')
        for value, label in self._x.ticks.items():
            at = self._left(value)
            parts.append(f'<path d="M{at:.1f} 0V{self._height}" stroke="{GRID}" stroke-width="0.8"/>')
            parts.append(_label(at, self._height + 16, label, "middle"))
        for value, label in self._y.ticks.items():
            at = self._top(value)
            parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{GRID}" stroke-width="0.8"/>')
            parts.append(_label(LEFT - 7, at + 4, label, "end"))
        parts.append(f'<path d="M{LEFT} 0V{self._height}H{WIDTH - RIGHT}" fill="none" stroke="{EDGE}"/>')
        parts += [*self._marks, _label(WIDTH - RIGHT, self._height + 32, self._unit, "end"), "</g>"]
        return "\n".join(parts), top + self._height + (40 if self._unit else 24)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    style = f'text-anchor="{anchor}" font-size="11" fill="{FAINT_INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _dashed(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def figure(title: str, panels: Iterable[Panel]) -> str:
    """Return a picture of panels below each other."""
    parts, top = [], 40.0
    for panel in panels:
        part, top = panel.svg(top)
        parts.append(part)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" role="img"'
        f' font-family="system-ui, sans-serif"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{top:.0f}" fill="#fff"/>',
        f'<text x="12" y="28" font-size="16" font-weight="bold" fill="{INK}">{escape(title)}</text>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def draw_run(result: Result) -> str:
    """Plot latencies, connections and rates of a run."""
    return figure(_title(result), [_latencies(result), _connections(result), _rates(result)])


def draw_search(search: Search) -> str:
    """Plot p50 and p99 by rate, and the limit. A ring is a rate that missed it."""
    steps = {step.rate: step for step in sorted(search.steps, key=lambda step: step.rate)}.values()
    curves: dict[str, Points] = {
        label: [(step.rate, step.latency_ms[label]) for step in steps if step.latency_ms]
        for label in ("p99", "p50")
    }
    waits = [wait for points in curves.values() for _, wait in points]
    x = logarithmic(step.rate for step in steps)
    y = logarithmic([*waits, search.limit_ms])
    panel = Panel(
        "Latency by rate in milliseconds; a ring is a rate that missed the limit",
        300,
        x,
        y,
        "requests per second",
    )
    for (label, points), color in zip(curves.items(), (BLUE, LIGHT_BLUE), strict=True):
        panel.line(points, color, label)
        for (rate, wait), step in zip(points, (step for step in steps if step.latency_ms), strict=True):
            panel.dot(rate, wait, color, hollow=not step.holds)
    panel.line([(x.low, search.limit_ms), (x.high, search.limit_ms)], ORANGE, "limit", DASHES)
    if search.highest is not None:
        panel.line([(search.highest, y.low), (search.highest, y.high)], GREEN, "highest rate", DASHES)
    return figure(search.conclusion.partition(";")[0], [panel])


def _title(result: Result) -> str:
    plan = result.plan
    unit = "items" if plan.stream else "requests"
    each = f"{plan.payload_bytes:,} bytes each" if plan.target is None else plan.target.method
    what = f"{plan.connections:,} connections, {plan.rate:,.0f} {unit}/s, {each}"
    if result.verdict is Verdict.VERIFIED:
        return f"{what}: all verified"
    return f"{what}: {result.verdict.value}"


def curve(latencies: Latencies) -> Points:
    """Return the points of the distribution: 1 / (1 - quantile), and milliseconds."""
    total = latencies.total
    points = []
    below = 0
    for micros, count in sorted(latencies.counts.items()):
        points.append((total / (total - below), micros / 1000))
        below += count
    if total:
        points.append((float(total), latencies.max_us / 1000))
    return points


def _latencies(result: Result) -> Panel:
    """Plot latency by percentile on logarithmic scales, which show the tail."""
    curves = {name: curve(result.record.latencies[name]) for name in LINES}
    every = [point for points in curves.values() for point in points]
    longest = max((x for x, _ in every), default=1.0) * 1.2
    ticks = {1 / (1 - part): label for part, label in NINES.items() if 1 / (1 - part) <= longest}
    x = Axis(1, max(longest, 2), ticks, is_log=True)
    title = "Latency by percentile in milliseconds; the dot is the peak"
    panel = Panel(title, 300, x, logarithmic(y for _, y in every))
    for name, (label, color, dashes) in LINES.items():
        if points := curves[name]:
            steps = [corner for (x0, y0), (x1, y1) in pairwise(points) for corner in ((x0, y0), (x1, y0))]
            panel.line([*steps, points[-1]], color, label, dashes)
            panel.dot(*points[-1], color)
    return panel


def _connections(result: Result) -> Panel:
    series = result.record.connected_over_time
    opened = [0, *accumulate(series.get(tick, 0) for tick in range(_ticks(result)))]
    points = [(tick / TICKS_PER_SECOND, float(count)) for tick, count in enumerate(opened)]
    return _over_time(result, "Connections with a session", points, GREEN)


def _rates(result: Result) -> Panel:
    series = result.record.answered_over_time
    points: list[tuple[float, float]] = []
    for tick in range(_ticks(result)):
        rate = float(series.get(tick, 0) * TICKS_PER_SECOND)
        points += [(tick / TICKS_PER_SECOND, rate), ((tick + 1) / TICKS_PER_SECOND, rate)]
    title = "Items and answers per second" if result.plan.stream else "Answers per second"
    return _over_time(result, title, points, BLUE, "seconds since the start")


def _ticks(result: Result) -> int:
    return max((*result.record.connected_over_time, *result.record.answered_over_time), default=0) + 1


def _over_time(result: Result, title: str, points: Points, color: str, unit: str = "") -> Panel:
    end = points[-1][0]
    y = from_zero(max(y for _, y in points))
    panel = Panel(title, 110, from_zero(end, end), y, unit)
    for first, second, name in PHASES:
        if first in result.readings and second in result.readings:
            start, stop = (min(result.readings[each].at, end) for each in (first, second))
            panel.line([(stop, 0), (stop, y.high)], EDGE, dashes="1 3")
            if stop - start > end / 8:  # there is room for the name
                panel.text((start + stop) / 2, name)
    panel.line(points, color, fill=True)
    return panel
