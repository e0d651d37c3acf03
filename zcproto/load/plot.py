"""A plot of a run: latency by percentile, connections and rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from zcproto.load.find_max import Search
from zcproto.load.record import TICKS_PER_SECOND, Latencies
from zcproto.load.result import Moment, Result, Verdict

INK: Final = "#1f2933"
FAINT: Final = "#d9dee4"
BLUE: Final = "#2563eb"
GREEN: Final = "#059669"
FEW_DECADES: Final = 1_000
"""Below this range, an axis has room for several labels per decade."""

LINES: Final = {
    "request": ("request, from when it was due", BLUE, "-"),
    "from_send": ("request, from when it was sent", "#7aa5f8", "--"),
    "item": ("item, from when it was due", BLUE, "-"),
    "first_item": ("first item of a stream", "#7aa5f8", "--"),
    "session_open": ("session.open", GREEN, "-"),
    "handshake": ("TCP and TLS handshake", "#d97706", "-"),
}
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


def draw_run(result: Result) -> Figure:
    """Plot latencies, connections and rates of a run."""
    figure = Figure(figsize=(10, 9.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    latencies, connections, rate = figure.subplots(3, 1, height_ratios=(2.4, 1, 1))
    figure.suptitle(_title(result), x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    figure.get_layout_engine().set(hspace=0.03, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    lines = [(result.record.latencies[name], *style) for name, style in LINES.items()]
    draw_latencies(latencies, lines, "Latency by percentile in milliseconds; the dot is the peak")
    _draw_connections(connections, result)
    _draw_rate(rate, result)
    rate.sharex(connections)
    rate.set_xlabel("seconds since the start", color=INK, fontsize=9.5)
    return figure


def draw_search(search: Search) -> Figure:
    """Plot p50 and p99 by rate, and the limit."""
    figure = Figure(figsize=(10, 5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plain(axes)
    steps = sorted(search.steps, key=lambda step: step.rate)
    rates = [step.rate for step in steps]
    for label, color in (("p99", BLUE), ("p50", "#7aa5f8")):
        waits = [step.latency_ms.get(label, math.nan) for step in steps]
        axes.plot(rates, waits, "-o", color=color, linewidth=1.8, label=label)
    axes.axhline(search.limit_ms, color="#d97706", linewidth=1.2, linestyle="--", label="limit")
    if search.highest is not None:
        axes.axvline(search.highest, color=GREEN, linewidth=1.2, linestyle="--", label="highest rate")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, max(rates, default=1.0) * 1.05)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("requests per second", color=INK, fontsize=9.5)
    head(axes, "Latency by rate in milliseconds")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _title(result: Result) -> str:
    plan = result.plan
    unit = "items" if plan.stream else "requests"
    each = f"{plan.payload_bytes:,} bytes each" if plan.target is None else plan.target.method
    what = f"{plan.connections:,} connections, {plan.rate:,.0f} {unit}/s, {each}"
    if result.verdict is Verdict.VERIFIED:
        return f"{what}: all verified"
    return f"{what}: {result.verdict.value}"


def plain(axes: Axes) -> None:
    """Apply the common style of frame, ticks and grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    axes.tick_params(colors="#52606d", labelsize=9, length=3)
    axes.grid(True, which="major", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def curve(latencies: Latencies) -> tuple[list[float], list[float]]:
    """Return the points of the distribution: 1 / (1 - quantile), and milliseconds."""
    total = latencies.total
    xs, ys = [], []
    below = 0
    for micros, count in sorted(latencies.counts.items()):
        xs.append(total / (total - below))
        ys.append(micros / 1000)
        below += count
    if total:
        xs.append(float(total))
        ys.append(latencies.max_us / 1000)
    return xs, ys


Line = tuple[Latencies, str, str, str]
"""Latencies, and the label, colour and style of their line."""


def draw_latencies(axes: Axes, lines: Iterable[Line], text: str, columns: int = 4) -> None:
    """Plot latency by percentile on logarithmic scales, which show the tail."""
    plain(axes)
    longest = 1.0
    for latencies, label, color, style in lines:
        if not latencies.counts:
            continue
        xs, ys = curve(latencies)
        longest = max(longest, xs[-1])
        axes.plot(xs, ys, style, color=color, linewidth=1.8, label=label, drawstyle="steps-post")
        axes.plot(xs[-1:], ys[-1:], "o", color=color, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, longest * 1.2)
    axes.minorticks_off()
    ticks = [part for part in NINES if 1 / (1 - part) <= longest * 1.2]
    axes.set_xticks([1 / (1 - part) for part in ticks], [NINES[part] for part in ticks])
    low, high = axes.get_ylim()
    if high / low < FEW_DECADES:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    head(axes, text, pad=6 + 18 * -(-len(axes.lines) // 2 // columns))
    if axes.lines:
        axes.legend(
            frameon=False, fontsize=9, ncols=columns, loc="lower left", bbox_to_anchor=(-0.01, 0.99),
            labelcolor=INK, handlelength=1.6, columnspacing=1.6,
        )  # fmt: skip


def _draw_connections(axes: Axes, result: Result) -> None:
    plain(axes)
    series = result.record.connected_over_time
    ticks = _ticks(result)
    opened = [0, *accumulate(series.get(tick, 0) for tick in range(ticks))]
    at = [tick / TICKS_PER_SECOND for tick in range(ticks + 1)]
    axes.fill_between(at, opened, color=GREEN, alpha=0.14, linewidth=0)
    axes.plot(at, opened, color=GREEN, linewidth=1.8)
    _over_time(axes, max(opened), at[-1])
    head(axes, "Connections with a session")
    _name_phases(axes, result)


def _draw_rate(axes: Axes, result: Result) -> None:
    plain(axes)
    series = result.record.answered_over_time
    ticks = _ticks(result)
    rates = [series.get(tick, 0) * TICKS_PER_SECOND for tick in range(ticks)]
    at = [tick / TICKS_PER_SECOND for tick in range(ticks + 1)]
    axes.stairs(rates, at, color=BLUE, linewidth=1.8, fill=True, alpha=0.14)
    axes.stairs(rates, at, color=BLUE, linewidth=1.8)
    _over_time(axes, max(rates), at[-1])
    head(axes, "Items and answers per second" if result.plan.stream else "Answers per second")
    _name_phases(axes, result)


def _ticks(result: Result) -> int:
    return max((*result.record.connected_over_time, *result.record.answered_over_time), default=0) + 1


def _over_time(axes: Axes, highest: float, seconds: float) -> None:
    axes.set_xlim(0, seconds)
    axes.set_ylim(0, _top(highest))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def head(axes: Axes, text: str, pad: float = 6) -> None:
    """Set the title of a plot."""
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=pad)


def _name_phases(axes: Axes, result: Result) -> None:
    """Label the phases that are wide enough for their name."""
    style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8.5, "color": "#52606d"}
    room = axes.get_xlim()[1] / 9
    for first, second, name in PHASES:
        if first not in result.readings or second not in result.readings:
            continue
        start, end = result.readings[first].at, result.readings[second].at
        axes.axvline(end, color="#9aa5b1", linewidth=0.8, linestyle=":")
        if end - start > room:
            axes.text((start + end) / 2, 0.97, name, transform=axes.get_xaxis_transform(), **style)


def _top(highest: float) -> float:
    """Return a round number above the highest value."""
    if highest <= 0:
        return 1.0
    grain: float = 10 ** math.floor(math.log10(highest))
    return math.ceil(highest * 1.2 / (grain / 2)) * grain / 2
