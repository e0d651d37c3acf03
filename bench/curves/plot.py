"""A curve as a plot: one panel for each unit, the measured points, and the better fit."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.curves.curve import CLEAR, Curve, Described, best
from bench.requirements.plots import by_bytes, head, label, new_figure, plain
from zcproto.load.plot import BLUE, GREEN, INK, ORANGE

COLORS: Final = (BLUE, ORANGE, GREEN)
STEPS: Final = 60
WORDS: Final = {"us": "microseconds", "ms": "milliseconds", "KiB": "KiB"}
ROOM: Final = 2.0
"""Factor of a scale around values that hardly differ, so that noise does not look like growth."""


def draw(curve: Curve) -> Figure:
    described = curve.described()
    parts = [list(group) for _, group in groupby(described, key=lambda each: each.series.unit)]
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = new_figure(0.6 + 3.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    cells = [axes for row in grid for axes in row]
    for axes, part in zip(cells, parts, strict=False):
        _draw(axes, curve, part)
    for axes in cells[len(parts) :]:
        axes.set_visible(False)
    return figure


def _draw(axes: Axes, curve: Curve, part: list[Described]) -> None:
    plain(axes)
    sizes = [float(size) for size in curve.sizes]
    xs = [1 / size if curve.inverse else size for size in sizes]
    for color, each in zip(COLORS, part, strict=False):
        axes.plot(sizes, each.series.values, "o", color=color, markersize=5, label=each.series.name)
        fit = each.line if curve.inverse else best(each, xs)
        if fit is not None and fit.r2 >= CLEAR:
            path = [sizes[0] * (sizes[-1] / sizes[0]) ** (step / STEPS) for step in range(STEPS + 1)]
            costs = [fit.at(1 / size if curve.inverse else size) for size in path]
            shown = [(size, cost) for size, cost in zip(path, costs, strict=True) if cost > 0]
            axes.plot(*zip(*shown, strict=True), "-", color=color, linewidth=1.2, alpha=0.6)
    axes.set_yscale("log")
    low, high = (
        edge(value for each in part for value in each.series.values if value > 0) for edge in (min, max)
    )
    room = max(1.25, (ROOM / (high / low)) ** 0.5 * 1.25)
    axes.set_ylim(low / room, high * room)
    axes.yaxis.set_major_locator(LogLocator(subs=_parts(high / low * room**2)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if curve.size == "byte":
        by_bytes(axes, list(curve.sizes)[:: 1 if len(curve.sizes) < 7 else 2])
    else:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, [_short(size) for size in curve.sizes])
    unit = part[0].series.unit
    if len(part) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
        head(axes, WORDS[unit])
    else:
        head(axes, f"{part[0].series.name}, {unit}")
    label(axes, "payload" if curve.size == "byte" else curve.axis, "")


def _parts(factor: float) -> tuple[float, ...]:
    """Return which numbers of a decade have a tick on a scale over such a factor."""
    if factor < 10:
        return (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    return (1.0, 2.0, 5.0) if factor < 300 else (1.0,)


def _short(size: int) -> str:
    for unit, factor in (("M", 1_000_000), ("k", 1_000)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return f"{size}"
