"""`zcproto demo fleet`: durable runs and approvals of many clients, while the processes that serve them are killed.

The fleet is three servers on a Valkey or Redis, if one is installed, or else four workers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TextIO

import click

from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load import report
from zcproto.load.command import Outputs, check_outputs, write_outputs
from zcproto.load.demo import SERVER_SPARE, temporary_home
from zcproto.load.fleet import (
    Fault,
    Judgement,
    Seen,
    conduct,
    fleet_of,
    is_supported,
    judge,
    percentile,
    prepare_home,
    settings_for,
    store_program,
)
from zcproto.load.fleet_clients import ClientsPlan, Outcome
from zcproto.load.plan import require_open_files
from zcproto.load.plot import BLUE, EDGE, GREEN, ORANGE, Axis, Panel, Points, figure, from_zero
from zcproto.load.progress import LINE_PERIOD

CLIENTS: Final = 500
SECONDS: Final = 30.0
ITEMS: Final = 20
PAUSE_S: Final = 0.4
INTERVAL_S: Final = 5.0
"""Seconds between two kills, on average."""

PICTURED: Final = 16
WIDTH: Final = 84
LABEL: Final = 11
"""Characters of the picture on a console, and of the names beside it."""

SHARES: Final = {"p50": 0.5, "p99": 0.99, "max": 1.0}

GAP_S: Final = 2.5
"""Without an item for so long a client waits, in the plot."""

WORDS: Final = {
    "worker": ("W", "a worker was killed"),
    "coordinator": ("C", "the coordinator was killed"),
    "server": ("S", "a server was killed"),
    "upgrade": ("U", "an upgrade or a restart began"),
}
MARKS: Final = {
    "item": ("█", "#", "items"),
    "wait": ("·", ".", "no item"),
    "cut": ("x", "x", "connection cut"),
    "restart": ("r", "r", "client replaced"),
    "lost": ("L", "L", "its process was killed: the run ended with owner_lost"),
}
"""What the characters of the picture mean: on a console, on one without Unicode, and in words."""


@dataclass(frozen=True, slots=True)
class FleetDemo:
    """The parameters of a demonstration. `kind`: `workers`, `servers`, or empty for what can be started here."""

    clients: int = CLIENTS
    seconds: float = SECONDS
    kind: str = ""
    seed: int = 1
    json: Path | None = None
    plot: Path | None = None
    html: Path | None = None


def run_fleet_demo(demo: FleetDemo, out: TextIO) -> int:
    """Run a demonstration; return the exit code. Raises ConfigError if it cannot be run here."""
    if not is_supported():
        raise ConfigError(["zcproto demo fleet needs Linux: it finds the processes of a server in /proc"])
    require_open_files(demo.clients + SERVER_SPARE, demo.clients, lambda limit: limit - SERVER_SPARE)
    outputs = Outputs(json=demo.json, plot=demo.plot, html=demo.html)
    check_outputs(outputs)
    kind = demo.kind or ("servers" if store_program() else "workers")
    fleet = f"three servers on {store_program()}" if kind == "servers" else "a server of four workers"
    began = time.time()
    click.echo(
        f"zcproto demo fleet: starts {fleet} in a temporary folder. {demo.clients:,} clients read durable runs of"
        f" {ITEMS} items and answer a question in each, while connections are cut, clients are replaced, and"
        f" processes are killed or upgraded, for {demo.seconds:.0f} s.",
        out,
    )
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        seen = runner.run(_hurt(demo, kind, home.path, out))
    found = judge(seen, ITEMS)
    is_ascii = not (out.encoding or "").lower().startswith("utf")
    click.echo("\n".join(["", *picture(seen, is_ascii=is_ascii)]), out)
    show(seen, found, out)
    value = {"started": report.moment(began), "machine": report.machine(), **as_json(seen, found)}
    write_outputs(
        outputs,
        value,
        lambda page: show(seen, found, page),
        lambda: draw(seen, f"{fleet}, {demo.clients} clients"),
    )
    return int(has_loss(found))


async def _hurt(demo: FleetDemo, kind: str, folder: Path, out: TextIO) -> Seen:
    home, users = prepare_home(folder / "home", demo.clients, settings_for(kind, demo.clients))
    click.echo("generating keys and starting processes ...", out)
    async with fleet_of(kind, home) as fleet:
        plan = ClientsPlan(
            fleet.addresses,
            str(home.certs / "ca.crt"),
            users,
            str(folder),
            1_000_000,
            items=ITEMS,
            pause=PAUSE_S,
            seconds=demo.seconds,
            asks=1,
            pictured=PICTURED,
            seed=demo.seed,
        )
        click.echo(f"serving at {', '.join(fleet.addresses)}; clients connect ...", out)
        seen = await conduct(fleet, [plan], INTERVAL_S, demo.seed, _Progress(out), demo.seconds)
        click.echo("all runs have ended; stopping the processes ...", out)
    return seen


class _Progress:
    """Prints what is done to the fleet, and every LINE_PERIOD what the clients have received."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._printed = 0.0
        self._faults = 0

    def __call__(self, seen: Seen) -> None:
        tick = seen.ticks[-1]
        if tick["waiting"]:
            return
        at = tick["at"] - seen.began
        for fault in seen.faults[self._faults :]:
            click.secho(f"{fault.at - seen.began:5.1f} s  {WORDS[fault.victim][1]}", self._out, bold=True)
        self._faults = len(seen.faults)
        if at - self._printed >= LINE_PERIOD:
            self._printed = at
            ended = f"{tick['done']:,} of {tick['begun']:,} runs ended"
            click.echo(f"{at:5.1f} s  {tick['items']:,} items, {ended}", self._out)


# --- the report ---------------------------------------------------------------------------------------------


def has_loss(found: Judgement) -> bool:
    return bool(found.wrong or found.unexplained or found.twice)


def counts(seen: Seen, found: Judgement) -> dict[str, int]:
    """Return what was done and what came of it, by its words."""
    return {
        "runs": len(seen.outcomes),
        "complete, with their results": found.complete,
        "ended with owner_lost: their process was killed": found.owner_lost,
        "unknown: their process and the coordinator were killed": found.both_lost,
        "items received": sum(each.items for each in seen.outcomes),
        "questions offered to clients": seen.offers,
        "connections cut": sum(len(each.cuts) for each in seen.outcomes),
        "clients replaced by others, which resumed": sum(len(each.restarts) for each in seen.outcomes),
        **{f"{words}, times": count for words, count in _faults(seen.faults)},
    }


def losses(found: Judgement) -> dict[str, int]:
    """Return what must not happen, by its words."""
    return {
        "runs with an item or an answer lost, repeated or out of order": len(found.wrong),
        "runs with an end that nothing explains": len(found.unexplained),
        "methods that ran twice": len(found.twice),
    }


def _faults(faults: Iterable[Fault]) -> list[tuple[str, int]]:
    return [(WORDS[victim][1], count) for victim, count in Counter(each.victim for each in faults).items()]


def show(seen: Seen, found: Judgement, out: TextIO) -> None:
    """Print the tables and the verdict."""
    happened = [(words, f"{count:,}") for words, count in counts(seen, found).items()]
    gaps = ("of all runs", *(f"{percentile(seen.gaps, share) or 0:.2f}" for share in SHARES.values()))
    lost = [(words, f"{count:,}", "no" if count else "ok") for words, count in losses(found).items()]
    for part in (
        "",
        report.table("What happened", ("", ""), happened),
        report.table("Longest gap between two items of a run, in s", ("", *SHARES), [gaps]),
        report.table("What was lost", ("", "", ""), lost, (0, 2)),
        *(*found.wrong[:5], *found.unexplained[:5], *found.twice[:5]),
    ):
        click.echo(part, out)
    click.secho(conclusion(found), out, fg="red" if has_loss(found) else "green", bold=True)


def conclusion(found: Judgement) -> str:
    if has_loss(found):
        return "Lost: " + "; ".join(f"{words}: {count:,}" for words, count in losses(found).items() if count)
    ended = found.owner_lost + found.both_lost
    return (
        f"Lost: nothing. {found.complete:,} runs gave each item once and in order, and {ended:,} ended with the"
        " error that says that their process was killed, after the items that were stored."
    )


def as_json(seen: Seen, found: Judgement) -> dict[str, Any]:
    return {
        "counts": counts(seen, found),
        "lost": losses(found),
        "gaps_s": {
            name: percentile(seen.gaps, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        },
        "faults": [{**asdict(each), "at": each.at - seen.began} for each in seen.faults],
        "reasons": [*found.wrong, *found.unexplained, *found.twice],
    }


# --- the picture --------------------------------------------------------------------------------------------


def _by_reader(seen: Seen) -> list[list[Outcome]]:
    """Return the runs of each client that is pictured."""
    found: dict[str, list[Outcome]] = {}
    for each in seen.outcomes:
        if each.times:
            found.setdefault(each.reader, []).append(each)
    return [*found.values()]


def picture(seen: Seen, *, is_ascii: bool = False) -> list[str]:
    """Return lines of text: time from left to right, a line for each of some clients, and one for the faults."""
    length = max(seen.ended - seen.began, 1e-3)

    def column(at: float) -> int:
        return min(int((at - seen.began) / length * WIDTH), WIDTH - 1)

    marks = {name: given[is_ascii] for name, given in MARKS.items()}
    faults = [" "] * WIDTH
    for fault in seen.faults:
        faults[column(fault.at)] = WORDS[fault.victim][0]
    lines = [f"{len(_by_reader(seen))} of the clients, {length / WIDTH:.2f} s for each character", ""]
    lines.append(f"{'killed':<{LABEL}}" + "".join(faults).rstrip())
    for number, runs in enumerate(_by_reader(seen), 1):
        cells = [" "] * WIDTH
        last = column(runs[-1].ended) + 1
        cells[:last] = [marks["wait"]] * last
        for run in runs:
            for name, moments in (("item", run.times), ("cut", run.cuts), ("restart", run.restarts)):
                for moment in moments:
                    cells[column(moment)] = marks[name]
            if run.end != "result":
                cells[column(run.ended)] = marks["lost"]
        lines.append(f"{f'client {number}':<{LABEL}}" + "".join(cells).rstrip())
    scale = [" "] * (WIDTH + 6)
    for second in range(0, int(length) + 1, 10):
        place = int(second / length * WIDTH)
        scale[place : place + len(f"{second} s")] = f"{second} s"
    legend = [f"{marks[name]} {words}" for name, (_, _, words) in MARKS.items()]
    used = [f"{letter} {words}" for letter, words in WORDS.values() if letter in faults]
    return [*lines, " " * LABEL + "".join(scale).rstrip(), "", ", ".join(legend), ", ".join(used)]


def draw(seen: Seen, title: str) -> str:
    """Plot the items of all clients, the longest gap and the clients of the picture as SVG."""
    length = seen.ended - seen.began
    x = from_zero(length, length)
    ticks = [(tick["at"] - seen.began, tick) for tick in seen.ticks if not tick["waiting"]]
    rates: Points = [
        (at, max(tick["items"] - before["items"], 0) / max(at - since, 1e-3))
        for (since, before), (at, tick) in pairwise(ticks)
    ]
    rate_panel = Panel(
        "Items per second of all clients", 110, x, from_zero(max((y for _, y in rates), default=1))
    )
    rate_panel.line(rates, BLUE, fill=True)
    waits: Points = [(at, tick["longest"]) for at, tick in ticks]
    gap_panel = Panel(
        "Longest gap before an item in seconds", 110, x, from_zero(max((y for _, y in waits), default=1))
    )
    gap_panel.line(waits, GREEN, fill=True)
    readers = _by_reader(seen)
    rows = Axis(0, len(readers) + 1, {})
    clients = Panel(
        "Some clients: a line while items come, a dot where the connection was cut, a ring at owner_lost",
        16 * len(readers) + 16,
        x,
        rows,
        "seconds since the start",
    )
    for number, runs in enumerate(readers):
        height = float(len(readers) - number)
        for stretch in _stretches([moment - seen.began for run in runs for moment in run.times]):
            clients.line([(stretch[0], height), (stretch[-1], height)], BLUE)
        for run in runs:
            for moment in run.cuts:
                clients.dot(moment - seen.began, height, ORANGE)
            if run.end != "result":
                clients.dot(run.ended - seen.began, height, ORANGE, hollow=True)
    for panel, high in ((rate_panel, rates), (gap_panel, waits), (clients, [(0.0, rows.high)])):
        top = max((y for _, y in high), default=1.0)
        for fault in seen.faults:
            at = fault.at - seen.began
            panel.line([(at, 0.0), (at, top)], EDGE, dashes="1 3")
            panel.text(at, WORDS[fault.victim][0])
    return figure(title, [rate_panel, gap_panel, clients])


def _stretches(moments: Sequence[float]) -> list[list[float]]:
    """Return the moments in parts between which more than GAP_S have passed."""
    parts: list[list[float]] = []
    for moment in moments:
        if not parts or moment - parts[-1][-1] > GAP_S:
            parts.append([])
        parts[-1].append(moment)
    return parts
