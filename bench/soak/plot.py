"""A soak as one picture: memory, descriptors and tasks, sessions and answers, over its minutes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.soak.outcome import SoakOutcome
from bench.soak.watch import judged
from zcproto.load.plot import BLUE, FAINT, GREEN, INK

ORANGE: Final = "#d97706"
GREY: Final = "#9aa5b1"


def write_plot(path: Path, outcome: SoakOutcome) -> None:
    """Draw into a file; its ending says how (png, svg, pdf)."""
    figure = Figure(figsize=(10, 8.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    memory, counts, work = figure.subplots(3, 1, sharex=True)
    said = "passed" if not outcome.reasons() else "failed: " + outcome.reasons()[0]
    title = f"{outcome.seconds / 60:,.1f} minutes under churn and harm: {said}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    minutes = [sample.at_s / 60 for sample in outcome.samples]
    some = outcome.samples
    _draw(memory, "Resident memory at rest, MiB", minutes, {"": ([each.memory_mib for each in some], BLUE)})
    _draw(
        counts,
        "At rest",
        minutes,
        {
            "descriptors": ([float(each.descriptors) for each in some], BLUE),
            "tasks": ([float(each.tasks) for each in some], GREEN),
            "threads": ([float(each.threads) for each in some], ORANGE),
        },
    )
    rates = [0.0]
    for sooner, later in itertools.pairwise(some):
        rates.append((later.answers - sooner.answers) / (later.at_s - sooner.at_s))
    if len(rates) > 1:
        rates[0] = some[0].answers / some[0].at_s
    _draw(
        work,
        "Sessions, and answers judged in a second",
        minutes,
        {
            "sessions": ([float(each.sessions) for each in some], BLUE),
            "answers a second": (rates[: len(some)], ORANGE),
        },
    )
    after = judged(some)
    for axes in (memory, counts, work):
        for begin, end in outcome.outage_spans:
            axes.axvspan(begin / 60, end / 60, color="#dc2626", alpha=0.13, linewidth=0)
        if after:
            axes.axvline(after[0].at_s / 60, color=GREY, linestyle=":", linewidth=0.9)
    work.set_xlabel(
        "minutes; growth is judged right of the dotted line, red is a full disk", color=INK, fontsize=9.5
    )
    figure.savefig(path)


def _draw(axes: Axes, title: str, minutes: list[float], lines: dict[str, tuple[list[float], str]]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors="#52606d", labelsize=9, length=3)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    for label, (values, color) in lines.items():
        axes.plot(minutes, values, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    axes.set_ylim(0, max([1.0, *(max(values, default=0.0) for values, _ in lines.values())]) * 1.2)
    if len(lines) > 1:
        axes.legend(
            frameon=False,
            fontsize=9,
            ncols=len(lines),
            labelcolor=INK,
            loc="lower right",
            bbox_to_anchor=(1.0, 0.98),  # above the axes: no line runs there
            borderaxespad=0.0,
        )
