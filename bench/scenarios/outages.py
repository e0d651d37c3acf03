"""Valkey killed, hung, slow, emptied, read-only and cut off under load: nothing is lost, and no call waits
long.

For each outage there are a Valkey (appendfsync always) and two servers that share it. 500 sessions, each on a
connection of its own, send `echo` at a steady rate, some on the second server as well. Meanwhile sessions are
opened, refreshed and revoked, on both servers.

The store is healthy for half of the seconds, then hurt for all of them, then healthy again. Every call is timed
from when it was due. What counts is how much longer the longest wait is since the outage began than before: all
of it shares the machine.

Afterwards every session is tried on both servers, on the first one again after it was killed and started, and
on a new one: revoked sessions must be refused, all others accepted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.proxy import Proxy
from bench.report import Report, Row
from bench.scenarios.harness import AT_ONCE, OpenLoop, for_each, until
from bench.scenarios.outage_churn import CALLS_PER_VICTIM, Churn, Phase, Victims, Waits, added
from bench.scenarios.sessions import Broken, ClientSession, check, open_session
from bench.stage import ECDSA_ONLY, Server, Stage, room_for
from bench.valkey import Valkey
from zcproto.common.process import new_event_loop
from zcproto.errors import Unavailable
from zcproto.load.caller import Caller, LoadTarget, Operator
from zcproto.load.demo import SERVER_SPARE, SPARE_CONNECTIONS, temporary_home
from zcproto.load.plan import SESSIONS_PER_USER, Credential, require_open_files

MAX_WAIT_MS: Final = 300.0
RECOVER_S: Final = 20.0
"""Within which servers have to be healthy after an outage."""

CHURN_S: Final = 5.0
"""How long recovery may take before there are no more sessions to open or to end."""

NEWS_S: Final = 1.0
"""Within which a server has received the revocations of others."""

REFRESHED: Final = 10
NAMED: Final = 3
SLOW_S: Final = 1.0
SLUGGISH_S: Final = 0.1
"""Each way: the store answers within its timeout, but barely."""


class Store(NamedTuple):
    """What an outage is done to."""

    valkey: Valkey
    link: Proxy


Act = Callable[[Store], None]


class Outage(NamedTuple):
    """One kind of outage."""

    title: str
    begin: Sequence[Act]
    end: Sequence[Act]
    by_link: bool = False
    """Whether the servers reach the store by a link that can be hurt."""
    refuses: bool = True
    """Whether openings have to be put off meanwhile."""


def _delay(seconds: float) -> Act:
    return lambda store: setattr(store.link, "delay_s", seconds)


def _on_valkey(act: Callable[[Valkey], None]) -> Act:
    return lambda store: act(store.valkey)


def _on_link(act: Callable[[Proxy], None]) -> Act:
    return lambda store: act(store.link)


_kill, _start, _delete_data = (
    _on_valkey(Valkey.kill),
    _on_valkey(Valkey.start),
    _on_valkey(Valkey.delete_data),
)
_hang, _resume = _on_valkey(Valkey.hang), _on_valkey(Valkey.resume)
_become_replica, _become_primary = _on_valkey(Valkey.become_replica), _on_valkey(Valkey.become_primary)
_cut, _restore = _on_link(Proxy.isolate), _on_link(Proxy.restore)

OUTAGES: Final = {
    "killed": Outage("killed", [_kill], [_start]),
    "hung": Outage("hung (SIGSTOP)", [_hang], [_resume]),
    "slow": Outage(f"slow ({SLOW_S:g} s each way)", [_delay(SLOW_S)], [_delay(0.0)], by_link=True),
    "sluggish": Outage(
        f"slow ({SLUGGISH_S:g} s each way)", [_delay(SLUGGISH_S)], [_delay(0.0)], by_link=True, refuses=False
    ),
    "emptied": Outage("restarted empty", [_kill, _delete_data, _start], [], refuses=False),
    "lost": Outage("killed, later restarted empty", [_kill, _delete_data], [_start]),
    "read_only": Outage("read-only", [_become_replica], [_become_primary]),
    "cut_off": Outage("cut off", [_cut], [_restore], by_link=True),
}


@dataclass(frozen=True, slots=True)
class OutagePlan:
    """One run. Rates are per second."""

    seconds: float = 10.0
    """Of each outage; before and after it the load runs for half as long, or until the servers are healthy."""
    sessions: int = 500
    """Sessions known before the outage, each on a connection of its own."""
    shared: int = 50
    """How many of them are used on the second server as well."""
    rate: float = 1_000.0
    """Requests over all connections."""
    openings: float = 10.0
    refreshes: float = 5.0
    revocations: float = 8.0

    @property
    def quiet_s(self) -> float:
        return self.seconds / 2

    @property
    def longest_s(self) -> float:
        return 2 * self.quiet_s + self.seconds + CHURN_S


class Users:
    """The users of a run, by their part in it; one for each session."""

    def __init__(self, plan: OutagePlan, stage: Stage) -> None:
        calls = int(plan.revocations * plan.longest_s)
        self.load = stage.add_users_for("load", plan.sessions)
        self.refreshed = stage.add_users_for("refreshed", REFRESHED)
        self.victims = stage.add_users("victim", calls // CALLS_PER_VICTIM + 1)
        self.new = stage.add_users_for("new", int(plan.openings * plan.longest_s) + SESSIONS_PER_USER)

    def connections(self, plan: OutagePlan) -> int:
        """Return how many connections there are at once, to both servers."""
        return plan.sessions + plan.shared + 2 * len(self.victims) + SPARE_CONNECTIONS


# --- what it proves ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class OutageOutcome:
    """What one outage has shown."""

    outage: Outage
    sent: int = 0
    lost: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests of the load with another result, by cause."""
    calls_failed: Counter[str] = field(default_factory=Counter)
    """Openings, refreshes and revocations with another result than promised, by cause."""
    load_waits: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    """The longest in seconds, by phase, as the next one."""
    lateness: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    call_waits: Waits = field(default_factory=Waits)
    pauses: dict[Phase, float] = field(default_factory=dict)
    """The longest of the server's loop, in seconds."""
    opened: int = 0
    """Since the outage began, as the next two."""
    refreshed: int = 0
    put_off: int = 0
    revoked: int = 0
    """Sessions whose revocation was acknowledged in the whole run."""
    revoked_during: int = 0
    live: int = 0
    """Sessions that must be accepted at the end."""
    degraded_after_s: float | None = None
    recovered_after_s: float | None = None
    checks: dict[str, Broken] = field(default_factory=dict)
    """By the server on which all sessions were tried."""

    def rows(self) -> list[Row]:
        broken = Broken()
        for each in self.checks.values():
            broken.add(each)
        waits = {
            "wait": ("longest request", self.load_waits),
            "call": ("longest other call", self.call_waits.longest),
            "late": ("lateness of the load", self.lateness),
            "pause": ("longest pause of the server", self.pauses),
        }
        return [
            Row("sent", "requests", self.sent),
            Row("lost", "without an answer", self.lost, equals=0),
            Row("failed", "refused, or answered wrongly", self.failed.total(), equals=0),
            *(
                Row(f"{key}_{phase.value}_ms", f"{label}, {phase.value}", _ms(longest.get(phase)), "ms")
                for key, (label, longest) in waits.items()
                for phase in Phase
            ),
            *(
                Row(f"{key}_added_ms", f"{label}, more than before", _ms(added(longest)), "ms", below=MAX_WAIT_MS)
                for key, (label, longest) in waits.items()
                if key in ("wait", "call")
            ),
            Row("opened", "opened since it began", self.opened),
            Row("refreshed", "refreshed since it began", self.refreshed),
            Row("put_off", "put off", self.put_off, at_least=1 if self.outage.refuses else None),
            Row("calls_failed", "other calls that failed", self.calls_failed.total(), equals=0),
            Row("degraded_s", "degraded after", self.degraded_after_s, "s"),
            Row("recovered_s", "healthy again after", self.recovered_after_s, "s"),
            Row("revoked_during", "sessions revoked meanwhile", self.revoked_during, at_least=1),
            Row("revoked", "sessions revoked in all", self.revoked),
            Row("revived", "of these accepted afterwards", len(broken.revived), equals=0),
            Row("live", "sessions that live", self.live),
            Row("live_refused", "of these refused afterwards", len(broken.lost), equals=0),
            Row("reused", "replaced tokens accepted afterwards", len(broken.reused), equals=0),
            Row("checks", "servers on which all were tried", len(self.checks), equals=4),
        ]  # fmt: skip

    def causes(self) -> list[str]:
        """Return details of what went wrong."""
        said = [f"{count:,} requests: {why}" for why, count in self.failed.items()]
        said += [f"{count:,} calls: {why}" for why, count in self.calls_failed.items()]
        for where, broken in self.checks.items():
            if broken:
                some = sorted(broken.lost | broken.revived | broken.reused)[:NAMED]
                said.append(f"{where}: {', '.join(some)}")
        if said or added(self.call_waits.longest) * 1e3 >= MAX_WAIT_MS:
            longest = [f"{what} {phase.value}" for phase, what in self.call_waits.what.items()]
            said.append(f"the longest other calls: {', '.join(longest)}")
        return said


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def report(outcomes: dict[str, OutageOutcome]) -> Report:
    notes = [f"{name}: {cause}" for name, outcome in outcomes.items() for cause in outcome.causes()]
    return Report({name: outcome.rows() for name, outcome in outcomes.items()}, notes=notes)


# --- the run -----------------------------------------------------------------------------------------------


class Node:
    """One of the servers that share a store, with connections to it."""

    def __init__(self, stage: Stage, store: str) -> None:
        self._server = Server(stage, store)
        self._stack: ExitStack | None = None
        self._target: LoadTarget | None = None
        self._operator: Operator | None = None
        self._longest_pause = 0.0

    async def start(self) -> None:
        self._stack = ExitStack()
        await asyncio.to_thread(self._stack.enter_context, self._server)  # its link to the store runs here
        self._target = self._server.target()
        self._operator = await self._server.operator()

    async def kill(self) -> None:
        stack, self._stack = self._stack, None
        if stack is None:
            return
        self._server.kill()
        if self._operator is not None:
            await self._operator.disconnect()
        if self._target is not None:
            self._target.close()
        await asyncio.to_thread(stack.close)

    def stop(self) -> None:
        """Stop its process, so that it hangs."""
        os.kill(self._server.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._server.pid, signal.SIGCONT)

    async def callers(self, count: int) -> list[Caller]:
        """Return new connections, without sessions."""
        assert self._target is not None
        target, made = self._target, list[Caller]()

        async def connect(number: int) -> None:
            made.append(await target.caller())

        await for_each(range(count), connect)
        return made

    async def is_healthy(self) -> bool:
        assert self._operator is not None
        try:
            stats = await self._operator.call("server.stats", {})
        except Unavailable:  # after a pause, or without a grace
            return False
        self._longest_pause = max(self._longest_pause, float(stats["longest_pause_s"]))
        return bool(stats["store"]["state"] == "healthy")

    async def is_degraded(self) -> bool:
        return not await self.is_healthy()

    async def take_pause(self) -> float:
        """Return the longest pause of its loop, in seconds, since the last time."""
        await self.is_healthy()
        longest, self._longest_pause = self._longest_pause, 0.0
        return longest


class Run:
    """One outage, on a store and servers of its own."""

    def __init__(self, plan: OutagePlan, outage: Outage, users: Users, pattern: Stage, folder: Path) -> None:
        self._plan = plan
        self._outage = outage
        self._users = users
        self._pattern = pattern
        self._folder = folder
        self._outcome = OutageOutcome(outage)
        self._sessions: list[ClientSession] = []
        self._callers: list[Caller] = []

    async def conduct(self) -> OutageOutcome:
        self._folder.mkdir()
        with Valkey(self._folder / "valkey") as valkey:
            async with Proxy(valkey.socket) as link:
                url = link.url if self._outage.by_link else valkey.url
                async with self._node("one", url) as one, self._node("other", url) as other:
                    progress(f"{self._outage.title}: opening {self._plan.sessions:,} sessions ...")
                    load, churn = await self._prepare(one, other)
                    if await self._hurt(Store(valkey, link), one, other, load, churn):
                        await self._check(one, other, url)
                    for caller in self._callers:
                        caller.close()
        return self._outcome

    @asynccontextmanager
    async def _node(self, name: str, store: str) -> AsyncIterator[Node]:
        node = Node(self._pattern.copy(self._folder / name), store)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(node.kill)
            await node.start()
            yield node

    async def _prepare(self, one: Node, other: Node) -> tuple[OpenLoop, Churn]:
        """Open all sessions, and use each on the connections where it is used later."""
        plan, users = self._plan, self._users
        callers, shared = await one.callers(plan.sessions), await other.callers(plan.shared)
        known = await self._open(callers, users.load)
        await self._use(shared, known[: plan.shared])
        opener, churner = await one.callers(2)
        refreshed = await self._open([opener] * REFRESHED, users.refreshed)
        here, there = await one.callers(len(users.victims)), await other.callers(len(users.victims) // 2)
        victims = []
        for number, user in enumerate(users.victims):
            sessions = await self._open([here[number]] * SESSIONS_PER_USER, [user] * SESSIONS_PER_USER)
            caller = here[number]
            if number % 2:  # used on the other server, too, which ends them every other time
                in_use = there[number // 2]
                await self._use([in_use] * SESSIONS_PER_USER, sessions)
                caller = in_use if number % 4 == 1 else caller
            victims.append(Victims(caller, sessions))
        self._sessions = [*known, *refreshed, *(session for each in victims for session in each.sessions)]
        self._callers = [*callers, *shared, opener, churner, *here, *there]
        load = OpenLoop([*callers, *shared], plan.rate)
        load.phase = Phase.BEFORE
        rates = (plan.openings, plan.refreshes, plan.revocations)
        return load, Churn(rates, caller=churner, newcomers=users.new, refreshed=refreshed, victims=victims)

    async def _open(self, callers: Sequence[Caller], users: Sequence[Credential]) -> list[ClientSession]:
        """Open a session on each connection, in this order."""
        opened: list[ClientSession] = []
        for first in range(0, len(callers), AT_ONCE):
            pairs = zip(callers[first : first + AT_ONCE], users[first : first + AT_ONCE], strict=True)
            opened += await asyncio.gather(*(open_session(*pair) for pair in pairs))
        for caller, session in zip(callers, opened, strict=True):
            caller.token = session.token
        return opened

    async def _use(self, callers: Sequence[Caller], sessions: Sequence[ClientSession]) -> None:
        async def use(pair: tuple[Caller, ClientSession]) -> None:
            caller, session = pair
            await caller.call("echo", {}, session.token)
            caller.token = session.token

        await for_each(zip(callers, sessions, strict=True), use)

    async def _hurt(self, store: Store, one: Node, other: Node, load: OpenLoop, churn: Churn) -> bool:
        """Run the load before, during and after the outage; return whether both servers are healthy again."""
        plan, outcome = self._plan, self._outcome
        running = [asyncio.create_task(load.run()), asyncio.create_task(churn.run())]
        try:
            await one.take_pause()
            await asyncio.sleep(plan.quiet_s)
            outcome.pauses[Phase.BEFORE] = await one.take_pause()
            load.phase = churn.phase = Phase.DURING
            began = time.monotonic()
            progress(f"{self._outage.title}: the outage begins, for {plan.seconds:g} s ...")
            hurting = asyncio.create_task(self._carry_out(self._outage.begin, store))
            if await until(one.is_degraded, plan.seconds):
                outcome.degraded_after_s = time.monotonic() - began
            await hurting
            await asyncio.sleep(began + plan.seconds - time.monotonic())
            await until(partial(self._is_felt, churn), RECOVER_S)
            outcome.pauses[Phase.DURING] = await one.take_pause()
            load.phase = churn.phase = Phase.AFTER
            ended = time.monotonic()
            await self._carry_out(self._outage.end, store)
            healthy = await asyncio.gather(*(until(node.is_healthy, RECOVER_S) for node in (one, other)))
            if all(healthy):
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
        self._count(load, churn)
        return all(healthy)

    async def _is_felt(self, churn: Churn) -> bool:
        """Return whether the churn has met the outage, which a slow machine may take long for."""
        is_put_off = churn.counts["put off", Phase.DURING] > 0 or not self._outage.refuses
        return is_put_off and churn.counts["ended", Phase.DURING] > 0

    async def _carry_out(self, acts: Sequence[Act], store: Store) -> None:
        for act in acts:
            if self._outage.by_link:
                act(store)
            else:
                await asyncio.to_thread(act, store)  # it waits for a process

    def _count(self, load: OpenLoop, churn: Churn) -> None:
        outcome = self._outcome
        outcome.sent, outcome.lost, outcome.failed = load.sent, load.unanswered, load.failed
        outcome.calls_failed = churn.failed
        outcome.call_waits = churn.waits
        outcome.load_waits = {phase: load.latency[phase].max_us / 1e6 for phase in Phase}
        outcome.lateness = {phase: load.lag[phase].max_us / 1e6 for phase in Phase}
        outcome.opened = churn.since_outage("opened")
        outcome.refreshed = churn.since_outage("refreshed")
        outcome.put_off = churn.since_outage("put off")
        outcome.revoked_during = churn.counts["ended", Phase.DURING]
        self._sessions += churn.opened
        outcome.revoked = sum(session.is_ended for session in self._sessions)
        outcome.live = sum(not (session.is_ended or session.is_unsure) for session in self._sessions)

    async def _check(self, one: Node, other: Node, store: str) -> None:
        progress(f"{self._outage.title}: checking {len(self._sessions):,} sessions on each server ...")
        for node, where in ((one, "the server"), (other, "the other server")):
            await until(partial(self._has_news, node, where), NEWS_S)
        await one.kill()
        await one.start()
        await self._check_on(one, "the server, started again")
        async with self._node("third", store) as third:
            await self._check_on(third, "a new server")

    async def _has_news(self, node: Node, where: str) -> bool:
        await self._check_on(node, where)
        return not self._outcome.checks[where].revived

    async def _check_on(self, node: Node, where: str) -> None:
        caller, *_ = await node.callers(1)
        try:
            self._outcome.checks[where] = await check(caller, self._sessions)
        finally:
            await caller.disconnect()


def run_outages(plan: OutagePlan, folder: Path, only: Sequence[str] = ()) -> dict[str, OutageOutcome]:
    """Carry out all outages, or those named, in this folder. Raises ConfigError for what cannot be measured."""
    progress("making users, keys and certificates ...")
    pattern = Stage(folder / "pattern")
    users = Users(plan, pattern)
    connections = users.connections(plan)
    pattern.configure({**room_for(connections), **ECDSA_ONLY})
    needed = connections + SERVER_SPARE
    require_open_files(needed, plan.sessions, lambda limit: plan.sessions - (needed - limit))
    pattern.make_certificates()
    outcomes = {}
    for name in only or OUTAGES:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            run = Run(plan, OUTAGES[name], users, pattern, folder / name)
            outcomes[name] = runner.run(run.conduct())
    return outcomes


@measurement
@click.option("--seconds", type=SECONDS, default=10.0, show_default=True, help="How long each outage lasts.")
@click.option("--sessions", type=COUNT, default=500, show_default=True, help="That are known before.")
@click.option("--rate", type=RATE, default=1_000.0, show_default=True, help="Requests a second, over all.")
@click.option("--only", type=click.Choice([*OUTAGES]), multiple=True, help="One outage; may be repeated.")
def command(seconds: float, sessions: int, rate: float, only: tuple[str, ...]) -> Report:
    plan = OutagePlan(seconds, sessions, min(OutagePlan().shared, sessions), rate)
    with temporary_home() as home:
        return report(run_outages(plan, home.path, only))
