"""The comparison as one picture: a panel for each figure, a bar for each server."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.peers.measure import ZCPROTO, Plan
from bench.peers.outcome import CONNECT, MEMORY, REQUEST, Row
from zcproto.load.plot import BLUE, FAINT, INK

GREY: Final = "#9aa5b1"
TITLES: Final = {
    REQUEST: "Server CPU of a request, microseconds",
    CONNECT: "Server CPU of a connection with its handshake, microseconds",
    MEMORY: "Server memory of a connection, KiB",
}


def write_plot(path: Path, rows: list[Row], plan: Plan) -> None:
    """Draw into a file; its ending says how (png, svg, pdf)."""
    shown = [figure for figure in TITLES if any(row.figure == figure for row in rows)]
    figure = Figure(figsize=(10, 2.3 * len(shown) + 0.9), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    title = f"Echo of {plan.payload_bytes} bytes over TLS 1.3, one request in flight on a connection"
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        _draw(axes, name, [row for row in rows if row.figure == name], plan)
    figure.savefig(path)


def _draw(axes: Axes, name: str, rows: list[Row], plan: Plan) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors="#52606d", labelsize=9, length=0)
    axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    labels = [row.name for row in rows]
    colors = [BLUE if row.name == ZCPROTO else GREY for row in rows]
    bars = axes.barh(labels, [row.value for row in rows], color=colors, height=0.62)
    told = [_told(row) for row in rows]
    axes.bar_label(bars, told, padding=4, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row.value for row in rows) * 1.34)
    held = f", {plan.held:,} held" if name == MEMORY else ""
    axes.set_title(TITLES[name] + held, loc="left", fontsize=10.5, color=INK)


def _told(row: Row) -> str:
    if row.ratio is None:
        return f"{row.value:,.1f}"
    return f"{row.value:,.1f}   (zcproto is {row.ratio:.2f} of it)"
