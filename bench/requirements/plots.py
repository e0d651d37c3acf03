"""The plots of a run, each a figure of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.curves.fit import line
from bench.requirements.run import Drawn
from bench.samples import Span
from zcproto.load.plot import BLUE, EDGE, FEW_DECADES, GREEN, GRID, INK, LINES, NINES, ORANGE, curve
from zcproto.load.record import Latencies
from zcproto.observe.loop_lag import BOUNDS_MS

FAINT_INK: Final = "#52606d"
COLORS: Final = (BLUE, ORANGE, GREEN, EDGE)
SIZE: Final = (9.0, 3.9)
MIB: Final = 1024 * 1024

Plots = dict[str, Figure]
"""By their captions."""


def plots(drawn: Drawn) -> Plots:
    """Return the plots for which something was measured."""
    made: Plots = {}
    if drawn.many is not None and drawn.many.result.record.latencies["request"].counts:
        made["Latency by percentile"] = _figure(lambda axes: _latency(axes, drawn), 4.4)
    if drawn.handshakes:
        made["Handshakes by key type"] = _handshakes(drawn)
    if drawn.many is not None and len(_memory_points(drawn)[0]) > 2:
        made["Memory by connections"] = _figure(lambda axes: _memory(axes, drawn))
    if drawn.payloads:
        made["CPU per request by payload"] = _figure(lambda axes: _payloads(axes, drawn))
    spans = pause_spans(drawn)
    if spans:
        made["Pauses of the server's loop"] = _figure(lambda axes: _pauses(axes, spans))
    return made


def new_figure(height: float = SIZE[1]) -> Figure:
    figure = Figure(figsize=(SIZE[0], height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(draw: Callable[[Axes], None], height: float = SIZE[1]) -> Figure:
    figure = new_figure(height)
    draw(figure.subplots())
    return figure


def plain(axes: Axes) -> None:
    """Apply the common style of frame, ticks and grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(EDGE)
    axes.tick_params(colors=FAINT_INK, labelsize=9, length=3)
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def head(axes: Axes, text: str, pad: float = 6) -> None:
    """Set the title of a plot."""
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=pad)


Line = tuple[Latencies, str, str, str]
"""Latencies, and the label, colour and dashes of their line."""


def draw_latencies(axes: Axes, lines: Iterable[Line], text: str, columns: int = 4) -> None:
    """Plot latency by percentile on logarithmic scales, which show the tail."""
    plain(axes)
    longest = 1.0
    for latencies, label, color, dashes in lines:
        if not latencies.counts:
            continue
        xs, ys = zip(*curve(latencies), strict=True)
        longest = max(longest, xs[-1])
        axes.plot(
            xs, ys, "--" if dashes else "-", color=color, linewidth=1.8, label=label, drawstyle="steps-post"
        )
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


def label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=9.5)
    axes.set_ylabel(y, color=INK, fontsize=9.5)


def _latency(axes: Axes, drawn: Drawn) -> None:
    assert drawn.many is not None
    plan, record = drawn.many.result.plan, drawn.many.result.record
    lines = [(record.latencies[name], *style) for name, style in LINES.items()]
    text = (
        f"{plan.connections:,} connections, {plan.rate:,.0f} requests a second; a dot is the slowest of all"
    )
    draw_latencies(axes, lines, text)
    label(axes, "share of all that took at most this long", "milliseconds")


def _handshakes(drawn: Drawn) -> Figure:
    figure = new_figure()
    latency, cpu = figure.subplots(1, 2, width_ratios=(2.2, 1))
    lines = [
        (each.latencies, f"{name}, {each.latencies.total:,} handshakes", COLORS[number], "")
        for number, (name, each) in enumerate(drawn.handshakes.items())
    ]
    draw_latencies(latency, lines, "From TCP connect to the end of the handshake, at rest", columns=2)
    label(latency, "share of all that took at most this long", "milliseconds")
    plain(cpu)
    names = list(drawn.handshakes)
    values = [drawn.handshakes[name].cpu_ms for name in names]
    bars = cpu.bar(names, values, color=COLORS[: len(names)], width=0.5)
    cpu.bar_label(bars, [f"{value:.2f} ms" for value in values], fontsize=9, color=INK, padding=3)
    cpu.set_ylim(0, max(values) * 1.2)
    cpu.grid(False, axis="x")
    head(cpu, "Server CPU for one")
    return figure


def _memory_points(drawn: Drawn) -> tuple[list[float], list[float]]:
    """Return connections, and MiB above the first sample."""
    assert drawn.many is not None
    samples = drawn.many.samples.get("connect")
    if not samples:
        return [], []
    first = samples[0]
    xs = [float(each.connections - first.connections) for each in samples[1:]]
    return xs, [(each.rss_bytes - first.rss_bytes) / MIB for each in samples[1:]]


def _memory(axes: Axes, drawn: Drawn) -> None:
    plain(axes)
    xs, ys = _memory_points(drawn)
    axes.plot(xs, ys, "o", color=BLUE, markersize=4, label="sampled while they arrived")
    fit = line(xs, ys) if min(ys) > 0 else None
    if fit is not None:
        ends = [0.0, max(xs)]
        text = f"{fit.slope * 1024:.1f} KiB a connection, R² {fit.r2:.3f}"
        axes.plot(ends, [fit.at(x) for x in ends], "-", color=ORANGE, linewidth=1.4, label=text)
    axes.set_xlim(0, max(xs) * 1.03)
    axes.set_ylim(0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=INK)
    head(axes, "Resident memory of the server above its start, each connection with a session")
    label(axes, "connections", "MiB")


def _payloads(axes: Axes, drawn: Drawn) -> None:
    plain(axes)
    xs = list(drawn.payloads)
    for color, name, ys in (
        (BLUE, "server CPU", [each.cpu_us for each in drawn.payloads.values()]),
        (EDGE, "its client waits", [each.wait_us for each in drawn.payloads.values()]),
    ):
        axes.plot(xs, ys, "o-", color=color, linewidth=1.8, markersize=4, label=name)
    for x, cost in drawn.payloads.items():
        axes.annotate(
            micros(cost.cpu_us),
            (x, cost.cpu_us),
            (7, -9),
            textcoords="offset points",
            fontsize=8.5,
            color=BLUE,
        )
    axes.margins(x=0.08, y=0.14)
    by_bytes(axes, xs)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: micros(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=INK)
    head(
        axes,
        "One request and its answer of the same size: CPU of a busy server, and the wait at an idle one",
    )
    label(axes, "payload", "")


def by_bytes(axes: Axes, sizes: list[int]) -> None:
    """Make a scale of sizes, with these as its ticks."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [in_bytes(size) for size in sizes])


def in_bytes(size: float) -> str:
    for unit, factor in (("MiB", MIB), ("KiB", 1024)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size:g} B"


def micros(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g} ms"
    return f"{value:.3g} us"


def pause_spans(drawn: Drawn) -> dict[str, Span]:
    """Return the watched times, by what happened in them."""
    spans: dict[str, Span | None] = {}
    if drawn.many is not None:
        spans |= {"connections arrive": drawn.many.span("connect"), "under load": drawn.many.span("load")}
    if drawn.rotation is not None:
        spans |= {"before rotations": drawn.rotation.at_rest, "while rotating": drawn.rotation.rotating}
    return {name: each for name, each in spans.items() if each is not None and each.seconds > 0}


def _pauses(axes: Axes, spans: dict[str, Span]) -> None:
    plain(axes)
    longest = 100
    for color, (name, span) in zip((BLUE, "#7aa5f8", EDGE, ORANGE), spans.items(), strict=False):
        longer = {bound: span.longer_per_minute(bound) for bound in BOUNDS_MS}
        shown = [(bound, count) for bound, count in longer.items() if count > 0]
        if shown:
            xs, ys = zip(*shown, strict=True)
            longest = max(longest, *xs)
            axes.plot(xs, ys, "o-", color=color, linewidth=1.8, markersize=4, label=name)
        else:
            axes.plot([], [], "o-", color=color, label=f"{name}: none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [bound for bound in BOUNDS_MS if bound <= longest]
    axes.set_xlim(0.9, ticks[-1] * 1.1)
    axes.set_xticks(ticks, [f"{bound} ms" for bound in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.axvline(10, color=FAINT_INK, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    head(axes, "How often the loop paused for longer, including time of other programs")
    label(axes, "longer than", "a minute")
