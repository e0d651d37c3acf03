"""Each outage from its beginning to its end, on a store and servers of its own."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.outages.churn import CALLS_PER_VICTIM, Churn, Victims
from bench.outages.harm import HARMS, Harm
from bench.outages.load import Load, Phase
from bench.outages.outcome import SCHEMA, Check, Outcome
from bench.outages.plan import OutagePlan
from bench.outages.valkey import Valkey, Way
from bench.row import Row
from bench.told import AT_ONCE, Told, check, each_of, open_session
from zcproto.auth import UserFile
from zcproto.common.event_loop import new_event_loop
from zcproto.common.home import Home
from zcproto.errors import ConfigError
from zcproto.load.caller import Caller, Place
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import SERVER_SPARE, SPARE_CONNECTIONS, temporary_home
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, require_open_files
from zcproto.load.stats import Operator

HOST: Final = "127.0.0.1"
RECOVER_S: Final = 20.0
"""After this a server is not waited for any longer."""

CHURN_S: Final = 5.0
"""How long the store may take to recover before there is nobody left to be opened, or to be ended."""

NEWS_S: Final = 1.0
"""Within which a server has heard of what others revoked."""

LOOK_S: Final = 0.02
COLUMNS: Final = 4
"""Outages in one table: no wider than a page."""

REFRESHED: Final = 10

Say = Callable[[str], None]


class Users:
    """Who there is, by what for."""

    def __init__(self, plan: OutagePlan, file: UserFile) -> None:
        longest_s = 2 * plan.quiet_s + plan.seconds + CHURN_S
        self.operator = Credential("operator", file.add("operator", operator=True))
        self.load = _add(file, "load", -(-plan.sessions // SESSIONS_PER_USER))
        self.refreshed = _add(file, "refreshed", REFRESHED // SESSIONS_PER_USER)
        self.victims = _add(file, "victim", int(plan.revocations * longest_s) // CALLS_PER_VICTIM + 1)
        self.new = _add(file, "new", int(plan.openings * longest_s) // SESSIONS_PER_USER + 1)

    def connections(self, plan: OutagePlan) -> int:
        """How many there are at once, to both servers."""
        return plan.sessions + plan.shared + 2 * len(self.victims) + SPARE_CONNECTIONS


def _add(file: UserFile, name: str, count: int) -> list[Credential]:
    names = [f"{name}-{number}" for number in range(count)]
    return [Credential(*each) for each in file.add_many(names)]


def run_outages(plan: OutagePlan, console: Console, progress: Say, json_file: Path | None) -> list[Outcome]:
    """Carry them all out, print the report, and write it down. Raises ConfigError for what cannot be measured."""
    check_outputs(Outputs(json=json_file))
    unknown = {*plan.only} - {harm.name for harm in HARMS}
    if unknown:
        known = ", ".join(harm.name for harm in HARMS)
        raise ConfigError(
            [f"--only {', '.join(sorted(unknown))}: there is no such outage; there are {known}"]
        )
    started = time.time()
    outcomes = []
    with temporary_home() as home:
        progress("making users, keys and certificates ...")
        pattern, users = prepare(home, plan)
        needed = users.connections(plan) + SERVER_SPARE
        require_open_files(needed, plan.sessions, lambda limit: plan.sessions - (needed - limit))
        for harm in HARMS:
            if plan.only and harm.name not in plan.only:
                continue
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                outcome = runner.run(
                    Run(plan, harm, users, pattern, home.path / harm.name, progress).conduct()
                )
            outcomes.append(outcome)
            progress(f"{harm.title}: {'; '.join(outcome.reasons()) or 'passed'}")
    show(outcomes, console)
    if json_file is not None:
        told = {
            "schema": SCHEMA,
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "plan": {name: getattr(plan, name) for name in plan.__slots__},
            "outages": [outcome.as_json() for outcome in outcomes],
        }
        json_file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return outcomes


def prepare(home: Home, plan: OutagePlan) -> tuple[Home, Users]:
    """A home folder with users and certificates, for others to be copied from."""
    pattern = Home(home.path / "pattern")
    pattern.path.mkdir(mode=0o700)
    users = Users(plan, UserFile(pattern.users))
    pattern.config.write_text(
        "[limits]\n"
        f"max_connections = {users.connections(plan)}\n"
        "connections_per_address = 0    # all come from one\n\n"
        "[certificates]\n"
        'key_types = ["ecdsa-p256"]\n',
        encoding="utf-8",
    )
    pattern.config.chmod(0o600)
    with DemoServer(pattern.path):
        pass  # it makes its certificates
    return pattern, users


class Served:
    """One server: its process, and connections to it."""

    def __init__(self, name: str, pattern: Home, folder: Path, store: str, operator: Credential) -> None:
        self.name = name
        self.home = Home(folder / name)
        shutil.copytree(pattern.path, self.home.path)
        self._process = DemoServer(self.home.path, store)
        self._stack: ExitStack | None = None
        self._operator = operator
        self.place: Place | None = None
        self.watcher: Operator | None = None
        self._longest_pause = 0.0

    async def start(self) -> None:
        self._stack = ExitStack()
        await asyncio.to_thread(self._stack.enter_context, self._process)  # the way to its store goes on
        port, ca_file = self._process.port, self.home.certs / "ca.crt"
        self.place = Place(HOST, HOST, port, ca_file)
        self.watcher = await Operator.connect(HOST, HOST, port, ca_file, self._operator)

    async def end(self) -> None:
        """Kill it."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        self._process.kill()
        if self.watcher is not None:
            await self.watcher.leave()
        if self.place is not None:
            self.place.close()
        await asyncio.to_thread(stack.close)

    async def callers(self, count: int) -> list[Caller]:
        """New connections, without sessions."""
        assert self.place is not None
        place, made = self.place, []
        numbers = iter(range(count))

        async def some() -> None:
            for _ in numbers:
                made.append(await place.caller())

        await asyncio.gather(*(some() for _ in range(min(count, AT_ONCE))))
        return made

    async def is_healthy(self) -> bool:
        assert self.watcher is not None
        told = await self.watcher.call("server.stats", {})
        self._longest_pause = max(self._longest_pause, float(told["longest_pause_s"]))
        return bool(told["store"]["state"] == "healthy")

    async def take_pause(self) -> float:
        """The longest pause of its loop, in seconds, since this was asked the last time."""
        await self.is_healthy()
        longest, self._longest_pause = self._longest_pause, 0.0
        return longest

    async def until(self, healthy: bool, within: float) -> bool:
        """Wait until its store is in use again, or is not any more; whether that came in time."""
        end = time.monotonic() + within
        while await self.is_healthy() != healthy:
            if time.monotonic() > end:
                return False
            await asyncio.sleep(LOOK_S)
        return True


class Run:
    """One outage."""

    def __init__(
        self, plan: OutagePlan, harm: Harm, users: Users, pattern: Home, folder: Path, progress: Say
    ) -> None:
        self._plan = plan
        self._harm = harm
        self._users = users
        self._pattern = pattern
        self._folder = folder
        self._progress = progress
        self._random = random.Random(1)  # noqa: S311 - an order, no secret
        self._outcome = Outcome(harm.name, harm.title, harm.refuses)
        self._sessions: list[Told] = []
        self._callers: list[Caller] = []

    async def conduct(self) -> Outcome:
        self._folder.mkdir()
        with Valkey(self._folder / "valkey") as valkey:
            async with (
                Way(valkey.socket) as way,
                self._servers(way if self._harm.through_way else valkey) as both,
            ):
                one, other = both
                self._progress(f"{self._harm.title}: opening {self._plan.sessions:,} sessions ...")
                load, churn = await self._begin(one, other)
                is_well = await self._hurt(valkey, way, one, other, load, churn)
                self._count(load, churn)
                if is_well:
                    await self._check(one, other, way.url if self._harm.through_way else valkey.url)
                for caller in self._callers:
                    caller.close()
        return self._outcome

    @asynccontextmanager
    async def _servers(self, store: Valkey | Way) -> AsyncIterator[tuple[Served, Served]]:
        async with AsyncExitStack() as stack:
            both = []
            for name in ("one", "other"):
                served = Served(name, self._pattern, self._folder, store.url, self._users.operator)
                stack.push_async_callback(served.end)
                await served.start()
                both.append(served)
            yield both[0], both[1]

    async def _begin(self, one: Served, other: Served) -> tuple[Load, Churn]:
        """Open all sessions, and use each on the connections where it is used."""
        plan, users = self._plan, self._users
        places = [each for each in users.load for _ in range(SESSIONS_PER_USER)][: plan.sessions]
        callers = await one.callers(plan.sessions)
        known = await self._open(callers, places)
        shared = await other.callers(plan.shared)
        await self._use(shared, known[: plan.shared])
        helpers = await one.callers(2)
        refreshed = await self._open(
            [helpers[0]] * REFRESHED, [each for each in users.refreshed for _ in range(SESSIONS_PER_USER)]
        )
        here, there = await one.callers(len(users.victims)), await other.callers(len(users.victims) // 2)
        victims = []
        for number, credential in enumerate(users.victims):
            sessions = await self._open([here[number]] * SESSIONS_PER_USER, [credential] * SESSIONS_PER_USER)
            asks = here[number]
            if number % 2:  # the other server knows them too, and every other time it is asked to end them
                in_use = there[number // 2]
                await self._use([in_use] * SESSIONS_PER_USER, sessions)
                asks = in_use if number % 4 == 1 else asks
            victims.append(Victims(asks, sessions))
        self._sessions = [*known, *refreshed, *(told for each in victims for told in each.sessions)]
        self._callers = [*callers, *shared, *helpers, *here, *there]
        load = Load([*callers, *shared], plan.rate, self._random)
        churn = Churn(plan, caller=helpers[1], newcomers=users.new, refreshed=refreshed, victims=victims)
        return load, churn

    async def _open(self, callers: Sequence[Caller], credentials: Sequence[Credential]) -> list[Told]:
        """A session on each connection, in this order."""
        opened: list[Told] = []
        for first in range(0, len(callers), AT_ONCE):
            pairs = zip(callers[first : first + AT_ONCE], credentials[first : first + AT_ONCE], strict=True)
            opened += await asyncio.gather(*(open_session(*pair) for pair in pairs))
        for caller, told in zip(callers, opened, strict=True):
            caller.token = told.token
        return opened

    async def _use(self, callers: Sequence[Caller], sessions: Sequence[Told]) -> None:
        places = {told.id: caller for caller, told in zip(callers, sessions, strict=True)}

        async def use(told: Told) -> None:
            await places[told.id].call("echo", {}, told.token)
            places[told.id].token = told.token

        await each_of(sessions, use)

    async def _hurt(
        self, valkey: Valkey, way: Way, one: Served, other: Served, load: Load, churn: Churn
    ) -> bool:
        """The load, the outage and what comes after it; whether both servers are well again."""
        plan, harm, outcome = self._plan, self._harm, self._outcome
        running = [asyncio.create_task(load.run()), asyncio.create_task(churn.run())]
        try:
            await one.take_pause()
            await asyncio.sleep(plan.quiet_s)
            outcome.pauses[Phase.BEFORE] = await one.take_pause()
            load.phase = churn.phase = Phase.MEANWHILE
            began = time.monotonic()
            self._progress(f"{harm.title}: the store is hurt, for {plan.seconds:g} s ...")
            hurting = asyncio.create_task(harm.begin(valkey, way))
            if await one.until(healthy=False, within=plan.seconds):
                outcome.degraded_after_s = time.monotonic() - began
            await hurting
            await asyncio.sleep(began + plan.seconds - time.monotonic())
            outcome.pauses[Phase.MEANWHILE] = await one.take_pause()
            load.phase = churn.phase = Phase.AFTER
            ended = time.monotonic()
            await harm.end(valkey, way)
            well = await asyncio.gather(
                *(each.until(healthy=True, within=RECOVER_S) for each in (one, other))
            )
            if all(well):
                outcome.recovered_after_s = time.monotonic() - ended
            await asyncio.sleep(plan.quiet_s)
            outcome.pauses[Phase.AFTER] = await one.take_pause()
            load.stop()
            churn.stop()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)
        return all(well)

    def _count(self, load: Load, churn: Churn) -> None:
        outcome, since = self._outcome, (Phase.MEANWHILE, Phase.AFTER)
        outcome.sent, outcome.answered, outcome.lost = load.sent, load.answered, load.lost
        outcome.failed, outcome.calls_failed = load.failed, churn.failed
        outcome.load_waits, outcome.call_waits, outcome.lateness = load.waits, churn.waits, load.lateness
        outcome.opened = sum(churn.let_in[phase] for phase in since)
        outcome.refreshed = sum(churn.refreshes[phase] for phase in since)
        outcome.refused = sum(churn.refused[phase] for phase in since)
        outcome.revoked_meanwhile = churn.ended[Phase.MEANWHILE]
        self._sessions += churn.opened
        outcome.revoked = sum(told.is_ended for told in self._sessions)
        outcome.live = sum(not (told.is_ended or told.is_unsure) for told in self._sessions)

    async def _check(self, one: Served, other: Served, store: str) -> None:
        """Ask both servers, the first one again after it was killed and started, and one that never knew any."""
        self._progress(f"{self._harm.title}: checking {len(self._sessions):,} sessions on each server ...")
        await asyncio.sleep(NEWS_S)
        await self._check_on(one, "the server")
        await self._check_on(other, "the other server")
        await one.end()
        await one.start()
        await self._check_on(one, "the server, started again")
        third = Served("third", self._pattern, self._folder, store, self._users.operator)
        try:
            await third.start()
            await self._check_on(third, "a new server")
        finally:
            await third.end()

    async def _check_on(self, served: Served, where: str) -> None:
        caller, *_ = await served.callers(1)
        try:
            self._outcome.checks.append(Check(where, await check(caller, self._sessions)))
        finally:
            await caller.leave()


# --- the report ----------------------------------------------------------------------------------------------


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print tables with a column for each outage, and the verdict of each."""
    for first in range(0, len(outcomes), COLUMNS):
        _show_some(outcomes[first : first + COLUMNS], console)
    for outcome in outcomes:
        reasons = outcome.reasons()
        style = "bold red" if reasons else "bold green"
        line = f"{outcome.title}: {'FAILED: ' + '; '.join(reasons) if reasons else 'passed'}"
        console.print(Text(line, style), soft_wrap=True)


def _show_some(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table(
        title="Outages of the store under load",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        table.add_column(outcome.name, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    for rows in zip(*(outcome.rows() for outcome in outcomes), strict=True):
        table.add_row(rows[0].label, *map(_cell, rows), rows[0].unit, _target(rows[0]))
    console.print(table)


def _cell(row: Row) -> Text:
    if row.value is None:
        text = "-"
    elif row.unit:
        text = f"{row.value:,.1f}" if row.unit == "ms" else f"{row.value:,.2f}"
    else:
        text = f"{row.value:,.0f}"
    return Text(text, "" if row.holds else "bold red")


def _target(row: Row) -> str:
    return "all" if row.bar is not None and row.key in ("held", "kept") else row.target
