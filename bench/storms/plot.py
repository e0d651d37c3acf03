"""Storms and mixes as one picture: who was served when, and what the others felt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.storms.outcome import HONEST_P99_MS, Felt, Mix, Storm
from zcproto.load.plot import BLUE, FAINT, INK, NINES, curve

COLORS: Final = (BLUE, "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")


def write_plot(path: Path, outcomes: Sequence[Storm | Mix]) -> None:
    """Draw into a file; its ending says how (png, svg, pdf)."""
    storms = [each for each in outcomes if isinstance(each, Storm)]
    mixes = [each for each in outcomes if isinstance(each, Mix)]
    panels = 2 * bool(storms) + bool(mixes)
    figure = Figure(figsize=(10, 3.4 * panels), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    if storms:
        _draw_served(axes.pop(0), storms)
        felt = [("before it", storms[0].at_rest), *((each.title, each.meanwhile) for each in storms)]
        _draw_felt(axes.pop(0), f"{storms[0].honest:,} who are in while a crowd comes back", felt)
    if mixes:
        title = f"{mixes[0].honest:,} honest connections among hostile ones"
        _draw_felt(axes.pop(0), title, [(each.title, each.felt) for each in mixes])
    figure.savefig(path)


def _plain(axes: Axes, title: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors="#52606d", labelsize=9, length=3)
    axes.grid(True, which="major", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)


def _draw_served(axes: Axes, storms: list[Storm]) -> None:
    _plain(axes, f"{storms[0].clients:,} clients come back at once: how many are served, by seconds")
    for storm, color in zip(storms, COLORS, strict=False):
        numbers = range(1, len(storm.served_s) + 1)
        axes.step([0.0, *storm.served_s], [0, *numbers], where="post", color=color, label=storm.title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")


def _draw_felt(axes: Axes, title: str, felt: Sequence[tuple[str, Felt]]) -> None:
    _plain(axes, f"{title}: latency by percentile, in milliseconds")
    longest = 1.0
    for (label, each), color in zip(felt, COLORS, strict=False):
        xs, ys = curve(each.latency)
        if xs:
            longest = max(longest, xs[-1])
            axes.plot(xs, ys, color=color, linewidth=1.6, label=label, drawstyle="steps-post")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, longest * 1.2)
    axes.minorticks_off()
    axes.plot([100], [HONEST_P99_MS], "v", color=INK, markersize=6, label="the bar")
    ticks = [part for part in NINES if 1 / (1 - part) <= longest * 1.2]
    axes.set_xticks([1 / (1 - part) for part in ticks], [NINES[part] for part in ticks])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2)
