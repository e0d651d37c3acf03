"""A whole run: a server of its own, the load, the rotations and the new connections at once, and the report."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.rotation.newcomers import Newcomers
from bench.rotation.outcome import SCHEMA, Outcome
from bench.rotation.pauses import Figures, Span
from bench.rotation.plan import RotationPlan
from bench.rotation.rotator import Rotated, Rotator, settings_of
from bench.row import Row
from zcproto.auth import UserFile
from zcproto.common.event_loop import new_event_loop
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.errors import ZcprotoError
from zcproto.load import report
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import ARRIVAL_RATE, PAYLOAD_BYTES, SERVER_SPARE, SPARE_CONNECTIONS, temporary_home
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, check_plan, require_open_files
from zcproto.load.progress import view_for
from zcproto.load.result import Moment, Result, Verdict
from zcproto.load.run import Stop, View, resolve, run
from zcproto.load.stats import Operator

HOST: Final = "127.0.0.1"
LINES: Final = 10
"""Lines of progress over all rotations."""


def run_rotations(plan: RotationPlan, console: Console, json_file: Path | None = None) -> Outcome:
    """Carry it all out, print the report, and write it down. Raises ConfigError for what cannot be measured."""
    check_outputs(Outputs(json=json_file))
    require_open_files(plan.connections + SERVER_SPARE, plan.connections, lambda limit: limit - SERVER_SPARE)
    started = time.time()
    with temporary_home() as home:
        console.print("making users, keys and certificates (RSA-4096 takes some seconds) ...")
        outcome = run_in(home, plan, console)
    show(outcome, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(outcome, started), indent=2) + "\n", encoding="utf-8")
    return outcome


def run_in(home: Home, plan: RotationPlan, console: Console) -> Outcome:
    """The run on a server in this home folder, which is made ready for it."""
    operator, credentials = prepare(home, plan)
    with DemoServer(home.path) as server:
        load = load_plan(plan, home, server.port, operator, credentials)
        check_plan(load)
        with (
            one_processor(),
            view_for(console) as view,
            asyncio.Runner(loop_factory=new_event_loop) as runner,
        ):
            return runner.run(Run(plan, load, home, view, console).conduct_interruptible())


@contextmanager
def one_processor() -> Iterator[None]:
    """Keep this process and what it starts to one processor, where there is another for the server."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    if len(allowed) < 2:
        yield
        return
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def prepare(home: Home, plan: RotationPlan) -> tuple[Credential, tuple[Credential, ...]]:
    """The configuration, and the users: an operator and those of the load."""
    users = UserFile(home.users)
    operator = Credential("operator", users.add("operator", operator=True))
    names = [f"load-{number}" for number in range(1, -(-plan.connections // SESSIONS_PER_USER) + 1)]
    credentials = tuple(Credential(*each) for each in users.add_many(names))
    home.config.write_text(
        "[limits]\n"
        f"max_connections = {plan.connections + SPARE_CONNECTIONS}\n"
        "connections_per_address = 0    # all come from one\n\n"
        "[certificates]\n"
        f"key_types = {json.dumps(plan.key_types)}\n"
        f'watch_interval = "{round(plan.watch_interval_s * 1000)}ms"\n\n'
        "[log]\n"
        f'file = "{home.path / "server.log"}"\n',
        encoding="utf-8",
    )
    home.config.chmod(0o600)
    return operator, credentials


def load_plan(
    plan: RotationPlan, home: Home, port: int, operator: Credential, credentials: tuple[Credential, ...]
) -> Plan:
    return Plan(
        host=HOST,
        port=port,
        connections=plan.connections,
        sessions=plan.connections,
        rate=plan.rate,
        duration_s=plan.load_s,
        payload_bytes=PAYLOAD_BYTES,
        credentials=credentials,
        operator=operator,
        arrival_rate=ARRIVAL_RATE,
        ca_file=home.certs / "ca.crt",
    )


class LoadingView:
    """Passes on what a view is shown, and tells when the load begins."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.loading = asyncio.Event()

    def phase(self, name: str, label: str, total: int) -> None:
        if name == "load":
            self.loading.set()
        self._view.phase(name, label, total)

    def update(self, counts: dict[str, int]) -> None:
        self._view.update(counts)


class Run:
    """Rotations and new connections beside a load, on one loop."""

    def __init__(self, plan: RotationPlan, load: Plan, home: Home, view: View, console: Console) -> None:
        config = load_config(None, home=home.path, environ=os.environ)
        assert load.ca_file is not None
        self._plan = plan
        self._load = load
        self._view = LoadingView(view)
        self._console = console
        self._stop = Stop()
        self._newcomers = Newcomers(load.host, load.host, load.port, load.ca_file)
        self._rotator = Rotator(
            plan, config.certificates.directory, settings_of(config.certificates), self._tell
        )
        self._operator: Operator | None = None
        self._at_rest: Span | None = None
        self._rotating: Span | None = None

    async def conduct_interruptible(self) -> Outcome:
        """The first Ctrl-C ends the run early, with what there is; the second ends the program."""
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._stop.request()

        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            return await self.conduct()
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def conduct(self) -> Outcome:
        self._rotator.note_first()
        before = await self._failures()
        result = await self._with_load()
        outcome = Outcome(self._plan, result, self._rotator.history, self._newcomers.met)
        outcome.at_rest, outcome.rotating = self._at_rest, self._rotating
        try:
            after = await self._failures()
        except ZcprotoError:  # the server is gone, which the load's record tells, too
            return outcome
        grown = {cause: count - before.get(cause, 0) for cause, count in after.items()}
        outcome.server_failures = {cause: count for cause, count in grown.items() if count}
        return outcome

    async def _with_load(self) -> Result:
        """The load; what happens beside it ends with it."""
        beside = asyncio.create_task(self._beside_load())
        beside.add_done_callback(self._beside_ended)
        try:
            result = await run(self._load, self._view, self._stop, lend=self._borrow)
        finally:
            beside.cancel()
            await asyncio.wait({beside})
        if not beside.cancelled():
            beside.result()  # a fault of its own is none to be silent about
        self._count_all_pauses(result)
        return result

    def _borrow(self, operator: Operator) -> None:
        self._operator = operator

    def _count_all_pauses(self, result: Result) -> None:
        """The last reading under load has the longest pause since ours before; let it have that of all the load."""
        reading = result.readings.get(Moment.LOADED)
        if reading is not None:
            spans = [span.after.longest_s for span in (self._at_rest, self._rotating) if span is not None]
            stats = reading.stats._replace(longest_pause_s=max([reading.stats.longest_pause_s, *spans]))
            result.readings[Moment.LOADED] = reading._replace(stats=stats)

    def _beside_ended(self, beside: asyncio.Task[None]) -> None:
        if not beside.cancelled() and beside.exception() is not None:
            self._stop.request()  # what is measured from here on would be worth nothing

    async def _beside_load(self) -> None:
        plan = self._plan
        await self._view.loading.wait()
        start = time.monotonic()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._rest_and_rotate(start))
            both.create_task(self._newcomers.run(start, plan.newcomers, plan.newcomers_s))

    async def _rest_and_rotate(self, start: float) -> None:
        plan = self._plan
        connected = await self._figures()
        await asyncio.sleep(start + plan.rest_s - time.monotonic())
        rested = await self._figures()
        self._at_rest = _span(connected, rested)
        await self._rotator.run(start + plan.rest_s)
        await asyncio.sleep(start + plan.newcomers_s - time.monotonic())  # the last one is taken up by then
        self._rotating = _span(rested, await self._figures())

    async def _figures(self) -> Figures | None:
        assert self._operator is not None
        try:
            stats = await self._operator.call("server.stats", {})
        except ZcprotoError:  # the server is gone, which the load's record tells, too
            return None
        return Figures.of(stats, time.monotonic())

    async def _failures(self) -> dict[str, int]:
        """Handshakes that have failed at the server since its start, by cause."""
        load = self._load
        address = await resolve(load.host, load.port)
        operator = await Operator.connect(load.host, address, load.port, load.ca_file, load.operator)
        try:
            failures: dict[str, int] = (await operator.call("server.stats", {}))["tls_failures"]
        finally:
            await operator.leave()
        return failures

    def _tell(self, rotated: Rotated) -> None:
        if rotated.number % max(1, self._plan.rotations // LINES) == 0:
            met = self._newcomers
            self._console.print(
                f"rotation {rotated.number:,} of {self._plan.rotations:,}: "
                f"{len(met.met):,} new connections so far, {met.failed:,} failed",
                highlight=False,
            )


def _span(before: Figures | None, after: Figures | None) -> Span | None:
    return None if before is None or after is None else Span(before, after)


# --- the report ----------------------------------------------------------------------------------------------


def show(outcome: Outcome, console: Console) -> None:
    """Print the load's tables, those of the rotations, and the verdict."""
    report.show(outcome.load, console, {})
    table = _table("Certificates rotated under load", ("", "figure", "unit", "target", ""))
    for row in outcome.count_rows():
        table.add_row(row.label, *_cells(row))
    console.print(table)
    table = _table("The server's loop", ("", "at rest", "rotating", "unit", "target", ""))
    for row in outcome.pause_rows():
        table.add_row(row.label, _figure(row.at_rest, row.unit), *_cells(row))
    console.print(table)
    if outcome.machine_was_busy:
        console.print(
            Text(
                "the loop waited for a processor that other programs had, the load among them: this machine is too "
                "small or too busy to show how long the server alone would have stood still",
                "yellow",
            ),
            soft_wrap=True,
        )
    style = {Verdict.VERIFIED: "bold green", Verdict.FAILED: "bold red"}.get(outcome.verdict, "bold yellow")
    console.print(Text(sentence(outcome), style), soft_wrap=True)


def sentence(outcome: Outcome) -> str:
    if outcome.verdict is Verdict.INTERRUPTED:
        return "interrupted: the figures are those of a part of the run, and nothing is proven"
    if outcome.verdict is Verdict.FAILED:
        return "failed: " + "; ".join(outcome.reasons())
    return (
        f"passed: {outcome.plan.rotations:,} rotations under load, no request lost, no handshake failed, "
        f"{outcome.plan.connections:,} connections undisturbed"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    """Labels, figures, then a unit, a target and whether it is met."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = column in ("figure", "at rest", "rotating", "target")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    return table


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and not unit else f"{value:,.2f}"


def _cells(row: Row) -> list[str | Text]:
    """A row's figure, and what follows it."""
    value = _figure(row.value, row.unit)
    if row.bar is None:
        return [value, row.unit, "", ""]
    verdict = Text("pass", "green") if row.holds else Text("FAIL", "bold red")
    return [value, row.unit, row.target, verdict]


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "value": None if row.value is None else round(row.value, 6),
        "unit": row.unit,
        "bar": row.bar,
        "exact": row.exact,
        "holds": row.holds,
        "at_rest": None if row.at_rest is None else round(row.at_rest, 6),
    }


def as_json(outcome: Outcome, started: float) -> dict[str, Any]:
    """All of it. `started` is in Unix seconds. No keys are in it."""
    origin = outcome.history[0].done if outcome.history else 0.0
    seen = outcome.seen_after()
    plan = outcome.plan
    return {
        "schema": SCHEMA,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "verdict": outcome.verdict.value,
        "reasons": outcome.reasons(),
        "plan": {name: getattr(plan, name) for name in plan.__slots__},
        "figures": {row.key: _as_json(row) for row in outcome.rows()},
        "server_failures": outcome.server_failures,
        "rotations": [
            {
                "number": each.number,
                "new_key": each.new_key,
                "at_s": round(each.done - origin, 3),
                "took_s": round(each.done - each.began, 4),
                "seen_after_s": round(seen[each.number], 3) if each.number in seen else None,
                "leaves": each.leaves,
                "problem": each.problem,
            }
            for each in outcome.history
        ],
        "newcomers": [
            {
                "at_s": round(each.begun - origin, 3),
                "handshake_s": round(each.shaken - each.begun, 4) if each.shaken else None,
                "leaf": each.leaf,
                "failure": each.failure,
            }
            for each in outcome.newcomers
        ],
        "load": report.as_json(outcome.load, {}, started),
    }
