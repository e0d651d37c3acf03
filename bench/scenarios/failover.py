"""Failovers of Valkey and paused servers under churn: does a dead token become good again?

Three Valkey servers, of which two are replicas, three sentinels and three zcproto servers that share them.
Replication is asynchronous, so a failover loses acknowledged writes. Users open, refresh, close and revoke
sessions on all servers, and exceed the limit of sessions, which ends the oldest.

\b
planned    SENTINEL FAILOVER
unplanned  the primary is killed or stopped (SIGKILL, SIGSTOP); every other time its replicas lack its last second.
           It comes back later, and takes itself for the primary.
paused     a zcproto server is stopped (SIGSTOP) for longer than it would take to notice an outage. When it goes on,
           it must refuse every token that died until then. One of them has `store.grace = "0s"`.

A token is dead when the end of its session, or the refresh that replaced it, was acknowledged. Dead tokens are
tried on all servers all the time. After each failover the churn pauses, and all servers must agree about every
token.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from bench.command import RATE, measurement, progress
from bench.deployments import WithSentinel
from bench.report import Report, Row
from bench.scenarios.harness import cause_of, for_each, until
from bench.scenarios.outages import Node
from bench.scenarios.sessions import (
    ENDED_CODES,
    ClientSession,
    is_accepted,
    open_session,
    refresh,
    with_retries,
)
from bench.server_process import ServerProcess
from bench.stage import ECDSA_ONLY, Stage, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import (
    CallError,
    Code,
    SessionReplaced,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
    ZcprotoError,
)
from zcproto.load.caller import Caller
from zcproto.load.demo import temporary_home
from zcproto.load.plan import SESSIONS_PER_USER, Credential
from zcproto.wire.frame import NO_TOKEN

NODES: Final = 3
USERS: Final = 24
MAX_LATE_S: Final = 5.0
"""How long after the acknowledgement another server may accept a dead token."""

BEFORE_S: Final = 2.0
LAG_S: Final = 1.0
AFTER_S: Final = 6.0
"""Churn before a failover, between the last write of the replicas and the failover, and after a failover."""

FAILED_OVER_S: Final = 30.0
IN_ORDER_S: Final = 90.0
"""Within which sentinels have made all servers replicas of the new primary."""

NEWS_S: Final = 1.5
FRESH_S: Final = 20.0
"""Dead tokens are tried most often for this time."""

OLDER: Final = 60
"""Older dead tokens tried in each round."""

PAUSE_S: Final = 0.2
"""Between rounds of tries, and between looks at the sentinels."""

PAUSED_S: Final = 2.0
BURST: Final = 100
"""Tries that a paused server finds on a connection when it goes on."""

TRIERS: Final = 2
"""Connections to each server on which dead tokens are tried."""

TIMES: Final = click.IntRange(0, 1_000)
ENDED: Final = (SessionReplaced, TokenExpired, TokenRevoked, Unauthenticated)
OTHER_CLIENT: Final = "zcproto-bench-other/1"
NAMED: Final = 5


class FailoverPlan(NamedTuple):
    """How many of each kind, and the calls a second of all users."""

    planned: int = 10
    unplanned: int = 10
    paused: int = 10
    rate: float = 60.0


@dataclass(slots=True)
class Outcome:
    """What some failovers have shown."""

    wanted: int
    faults: int = 0
    """Failovers, or pauses."""
    longest_s: float = 0.0
    """Until all servers were healthy, and used the new primary."""
    counts: Counter[str] = field(default_factory=Counter)
    """Calls that were acknowledged, by kind, and "put off"."""
    failed: Counter[str] = field(default_factory=Counter)
    """Calls with any other result."""
    dead: int = 0
    tried: int = 0
    accepted: int = 0
    """How often a dead token was accepted, within MAX_LATE_S or later."""
    last_accepted_s: float = 0.0
    """How long after the acknowledgement at the latest."""
    stale: list[str] = field(default_factory=list)
    """Accepted by a server after a pause, although they died before its end."""
    late: list[str] = field(default_factory=list)
    above_limit: list[str] = field(default_factory=list)
    disagreed: list[str] = field(default_factory=list)
    lost: int = 0

    def rows(self) -> list[Row]:
        done = self.counts
        return [
            Row("faults", "failovers, or pauses", self.faults, equals=self.wanted),
            Row("longest_s", "longest, until all servers were healthy", self.longest_s, "s"),
            *(Row(kind, f"sessions {kind}", done[kind], at_least=1) for kind in ("opened", "refreshed", "ended")),
            Row("put_off", "calls put off", done["put off"]),
            Row("calls_failed", "calls that failed otherwise", self.failed.total(), equals=0),
            Row("dead", "tokens that died", self.dead, at_least=1),
            Row("tried", "tries of dead tokens", self.tried, at_least=1),
            Row("accepted", "of these accepted", self.accepted),
            Row("last_accepted_s", "the last one after", self.last_accepted_s, "s"),
            Row("accepted_late", f"accepted later than {MAX_LATE_S:g} s", len(self.late), equals=0),
            Row("accepted_stale", "accepted after a pause", len(self.stale), equals=0),
            Row("above_limit", "users above the limit afterwards", len(self.above_limit), equals=0),
            Row("disagreed", "tokens about which servers disagree", len(self.disagreed), equals=0),
            Row("lost", "live sessions lost", self.lost),
        ]  # fmt: skip

    def summary(self) -> str:
        """Describe it in a line, for the progress."""
        return (
            f"{self.dead:,} tokens died, {self.accepted:,} accepted until {self.last_accepted_s:.2f} s after that, "
            f"{len(self.late) + len(self.stale)} too late"
        )

    def notes(self) -> list[str]:
        lists = {
            "accepted late": self.late,
            "accepted after a pause": self.stale,
            "above the limit": self.above_limit,
            "disagreed": self.disagreed,
        }
        notes = [f"{count:,} calls failed: {why}" for why, count in self.failed.items()]
        return notes + [f"{name}: {', '.join(each[:NAMED])}" for name, each in lists.items() if each]


@dataclass(slots=True)
class Dead:
    """A dead token: whose, why, and when that was acknowledged (monotonic)."""

    name: str
    why: str
    at: float


class Graveyard:
    """All dead tokens, which must be refused everywhere."""

    def __init__(self) -> None:
        self.tokens: OrderedDict[bytes, Dead] = OrderedDict()
        self.outcome = Outcome(0)
        self.resumed: dict[str, float] = {}
        """When a server went on after a pause (monotonic)."""

    def add(self, token: bytes, name: str, why: str) -> None:
        if token not in self.tokens:
            self.outcome.dead += 1
            self.tokens[token] = Dead(name, why, time.monotonic())

    async def haunt(self, callers: Sequence[Caller], where: str) -> None:
        """Try dead tokens on one server until cancelled: the latest all the time, the others in turns."""
        older = 0
        while True:
            now = time.monotonic()
            tokens = list(self.tokens)
            fresh = len(tokens)
            while fresh and now - self.tokens[tokens[fresh - 1]].at < FRESH_S:
                fresh -= 1
            older = older if older < fresh else 0
            some = [*tokens[fresh:], *tokens[older : min(older + OLDER, fresh)]]
            older += OLDER
            tries = zip(itertools.cycle(callers), some, strict=False)
            await for_each(tries, lambda each: self._try(*each, where))
            await asyncio.sleep(PAUSE_S)

    async def _try(self, caller: Caller, token: bytes, where: str) -> None:
        dead, sent = self.tokens[token], time.monotonic()
        try:
            await caller.call("echo", {}, token)
        except CallError as error:
            self.outcome.tried += error.code in ENDED_CODES
            return
        self.outcome.tried += 1
        self.outcome.accepted += 1
        after_s = sent - dead.at
        self.outcome.last_accepted_s = max(self.outcome.last_accepted_s, after_s)
        what = f"{dead.name} on {where} {after_s:.1f} s after it was {dead.why}"
        if after_s > MAX_LATE_S:
            self.outcome.late.append(what)
        if dead.at < self.resumed.get(where, 0.0) < time.monotonic():
            self.outcome.stale.append(what)

    async def try_latest(self, callers: Sequence[Caller], where: str, since: float) -> None:
        """Try all tokens that died since then, at once."""
        tokens = [token for token, dead in self.tokens.items() if dead.at >= since][-BURST * len(callers) :]
        tries = zip(itertools.cycle(callers), tokens, strict=False)
        await asyncio.gather(*(self._try(caller, token, where) for caller, token in tries))


class UserChurn:
    """One user, who does one thing after the other on servers chosen at random.

    `is_quiet` returns whether no failover runs. During one, a list of sessions may be that of the old primary.
    """

    def __init__(
        self,
        credential: Credential,
        callers: Sequence[Caller],
        graveyard: Graveyard,
        is_quiet: Callable[[], bool],
        seed: int,
    ) -> None:
        self._credential = credential
        self._callers = callers
        self._graveyard = graveyard
        self._is_quiet = is_quiet
        self._random = random.Random(seed)  # noqa: S311 - an order, no secret
        self._sessions: list[ClientSession] = []
        self._unsure: list[ClientSession] = []

    async def step(self) -> None:
        """Do one thing."""
        known, outcome = len(self._sessions), self._graveyard.outcome
        works = [self._open, self._refresh, self._refresh]
        if known > 2:
            works += [self._close, self._revoke, self._reuse]
        if known >= SESSIONS_PER_USER:
            works += [self._open] * 3 + [self._revoke_all]
        work = self._random.choice(works if known else [self._open])
        try:
            await work()
        except CallError as error:
            if error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED):
                outcome.counts["put off"] += 1
            elif error.code not in (*ENDED_CODES, Code.NOT_FOUND):
                outcome.failed[f"{work.__name__.strip('_')}: {cause_of(error)}"] += 1
        except ZcprotoError as error:
            outcome.failed[f"{work.__name__.strip('_')}: {cause_of(error)}"] += 1

    async def _open(self) -> None:
        caller, known = self._caller(), list(self._sessions)
        session = await open_session(caller, self._credential)
        self._sessions.append(session)
        self._count("opened")
        if len(known) >= SESSIONS_PER_USER:
            was_quiet = self._is_quiet()
            listed = {each["id"] for each in await caller.call("session.list", {}, session.token)}
            for other in known:
                if other.id not in listed:
                    self._doubt(other)
                    if was_quiet and self._is_quiet():
                        self._bury(other, "replaced")
        for each in self._callers:  # so that all servers have it in memory
            await each.call("echo", {}, session.token)

    async def _refresh(self) -> None:
        session = self._random.choice(self._sessions)
        try:
            await refresh(self._caller(), session)
        except CallError as error:
            if error.code in ENDED_CODES:
                self._graveyard.outcome.lost += 1
                self._doubt(session)
            raise
        self._graveyard.add(session.replaced, session.name, "refreshed")
        self._count("refreshed")

    async def _close(self) -> None:
        _, session = self._some(2)
        await self._end([session], "closed", "session.close", {}, session.token)

    async def _revoke(self) -> None:
        by, session = self._some(2)
        await self._end([session], "revoked", "session.revoke", {"id": session.id}, by.token)

    async def _revoke_all(self) -> None:
        by, *_ = self._some(1)
        await self._end(list(self._sessions), "revoked with all", "session.revoke", {"all": True}, by.token)

    async def _reuse(self) -> None:
        """Show a spent refresh token, which ends the session."""
        session, *_ = self._some(1)
        spent = session.refresh_token
        await refresh(self._caller(), session)
        self._graveyard.add(session.replaced, session.name, "refreshed")
        self._doubt(session)
        params = {"refresh_token": spent, "client": OTHER_CLIENT}
        try:
            opened = await self._caller().call("session.refresh", params, NO_TOKEN)
        except CallError as error:
            if error.code is not Code.TOKEN_REVOKED:
                raise
            self._bury(session, "ended by a spent refresh token")
            self._count("ended")
        else:  # that server has not left the old primary; only one of both pairs stays good
            other = replace(session)
            other.update(opened)
            self._unsure.append(other)

    async def _end(
        self, sessions: Sequence[ClientSession], why: str, method: str, params: dict[str, Any], token: bytes
    ) -> None:
        for session in sessions:
            self._doubt(session)
        await self._caller().call(method, params, token)
        for session in sessions:
            self._bury(session, why)
        self._count("ended", len(sessions))

    async def settle(self, callers: Mapping[str, Caller]) -> None:
        """Find out on all servers which tokens are good. Raises CallError or ConnectionClosed."""
        outcome, here = self._graveyard.outcome, callers[next(iter(callers))]
        for session in self._sessions:
            if session.is_refreshing:
                with suppress(*ENDED):
                    await with_retries(partial(refresh, here, session))
                    self._graveyard.add(session.replaced, session.name, "refreshed")
        good: dict[str, list[ClientSession]] = {}
        tried = [*self._sessions, *self._unsure]
        for where, caller in callers.items():
            good[where] = [each for each in tried if await is_accepted(caller, each.token)]
            if len(good[where]) > SESSIONS_PER_USER:
                outcome.above_limit.append(f"{self._credential.user} on {where}")
            if len({each.id for each in good[where]}) < len(good[where]):
                outcome.disagreed.append(f"two tokens of a session of {self._credential.user} on {where}")
        for session in tried:
            refused = [where for where, sessions in good.items() if session not in sessions]
            if not refused:
                continue
            if len(refused) < len(callers):
                outcome.disagreed.append(f"{session.name}, refused by {' and '.join(refused)} only")
            outcome.lost += session in self._sessions
            self._bury(session, "refused")
        self._sessions, self._unsure = good[where], []

    def _caller(self) -> Caller:
        return self._random.choice(self._callers)

    def _some(self, count: int) -> list[ClientSession]:
        return self._random.sample(self._sessions, count)

    def _count(self, what: str, number: int = 1) -> None:
        self._graveyard.outcome.counts[what] += number

    def _doubt(self, session: ClientSession) -> None:
        """Its end was asked for, or it is missing; whether it has ended is found out later."""
        self._sessions.remove(session)
        self._unsure.append(session)

    def _bury(self, session: ClientSession, why: str) -> None:
        """Its end was acknowledged."""
        for sessions in (self._sessions, self._unsure):
            if session in sessions:
                sessions.remove(session)
        self._graveyard.add(session.token, session.name, why)


class Way(NamedTuple):
    """One way to replace the primary: what happens to it, and what ends that."""

    begin: Callable[[ServerProcess], None] | None
    """None: nothing; the sentinels are asked for a failover."""
    end: Callable[[ServerProcess], None] | None = None
    lags: bool = False
    """Whether the replicas lack the last writes."""


UNPLANNED: Final = [
    Way(ServerProcess.kill, ServerProcess.start),
    Way(ServerProcess.stop, ServerProcess.go_on, lags=True),
    Way(ServerProcess.kill, ServerProcess.start, lags=True),
    Way(ServerProcess.stop, ServerProcess.go_on),
]


class Run:
    """All failovers, on servers of their own."""

    def __init__(self, plan: FailoverPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._graveyard = Graveyard()
        self._valkeys = WithSentinel(folder / "store", replicas=2)
        self._nodes: dict[str, Node] = {}
        self._callers: dict[str, Caller] = {}
        self._triers: dict[str, list[Caller]] = {}
        self._users: list[UserChurn] = []
        self._is_quiet = True
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._steps = 0
        """Steps of users in progress."""

    async def conduct(self) -> dict[str, Outcome]:
        outcomes = {}
        settings = {**ECDSA_ONLY, **room_for(256), "sessions.when_full": "evict_oldest"}
        pattern = Stage(self._folder / "pattern", settings)
        credentials = pattern.add_users("user", USERS)
        helpers = pattern.add_users_for("helper", NODES * (1 + TRIERS))
        pattern.make_certificates()
        async with AsyncExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, self._valkeys)
            progress("waiting until the sentinels have found each other and the replicas ...")
            await self._in_order()
            for number in range(NODES):
                name = f"node-{number}"
                stage = pattern.copy(self._folder / name)
                if number == NODES - 1:
                    stage.configure({**settings, "store.grace": "0s"})
                node = self._nodes[name] = Node(stage, self._valkeys.url)
                stack.push_async_callback(node.kill)
                await node.start()
            running = await self._start(credentials, iter(helpers))
            try:
                for kind, work, count in (
                    ("planned", lambda _: self._fail_over(Way(None)), self._plan.planned),
                    (
                        "unplanned",
                        lambda n: self._fail_over(UNPLANNED[n % len(UNPLANNED)]),
                        self._plan.unplanned,
                    ),
                    ("paused", self._pause, self._plan.paused),
                ):
                    if not count:
                        continue
                    outcome = outcomes[kind] = self._graveyard.outcome = Outcome(count)
                    while outcome.faults < count:
                        await asyncio.sleep(BEFORE_S)
                        await work(outcome.faults)
                        await self._settle()
                        outcome.faults += 1
                        progress(f"{kind}: {outcome.faults} of {count}, {outcome.summary()}")
            except ZcprotoError as error:  # the rest of the run would prove nothing
                self._graveyard.outcome.failed[str(error)] += 1
            finally:
                for task in running:
                    task.cancel()
                await asyncio.wait(running)
            for task in running:
                if not task.cancelled():
                    task.result()
        return outcomes

    async def _start(
        self, users: Sequence[Credential], helpers: Iterator[Credential]
    ) -> list[asyncio.Task[None]]:
        """Connect, and start the churn and the tries of dead tokens."""

        async def connect(node: Node) -> Caller:
            caller, *_ = await node.callers(1)  # without a session it may have few requests in flight
            caller.token = (await open_session(caller, next(helpers))).token
            return caller

        self._callers = {name: await connect(node) for name, node in self._nodes.items()}
        works = []
        for seed, user in enumerate(users):
            churn = UserChurn(user, [*self._callers.values()], self._graveyard, lambda: self._is_quiet, seed)
            self._users.append(churn)
            works.append(self._churn(churn, seed))
        for name, node in self._nodes.items():
            self._triers[name] = [await connect(node) for _ in range(TRIERS)]
            works.append(self._graveyard.haunt(self._triers[name], name))
        return [asyncio.create_task(work) for work in works]

    async def _churn(self, user: UserChurn, seed: int) -> None:
        times = random.Random(seed)  # noqa: S311 - an order, no secret
        while True:
            await asyncio.sleep(times.expovariate(self._plan.rate / USERS))
            await self._may_run.wait()
            self._steps += 1
            try:
                await user.step()
            finally:
                self._steps -= 1

    async def _fail_over(self, way: Way) -> None:
        outcome = self._graveyard.outcome
        old = await asyncio.to_thread(self._valkeys.primary)
        assert old is not None
        if way.lags:
            await asyncio.to_thread(self._valkeys.hold_back)
            await asyncio.sleep(LAG_S)
        self._is_quiet = False
        began = time.monotonic()
        await asyncio.to_thread(self._valkeys.fail_over if way.begin is None else partial(way.begin, old))
        self._valkeys.let_go()
        if not await until(partial(self._is_over, old), FAILED_OVER_S):
            raise ZcprotoError(f"no failover within {FAILED_OVER_S:g} s; see the logs in {self._folder}")
        outcome.longest_s = max(outcome.longest_s, time.monotonic() - began)
        await asyncio.sleep(AFTER_S)
        self._is_quiet = True
        if way.end is not None:
            await asyncio.to_thread(way.end, old)
        await self._in_order()

    async def _pause(self, number: int) -> None:
        """Stop the first or the last server while sessions end on the others."""
        where = [*self._nodes][-(number % 2)]
        node, graveyard, began = self._nodes[where], self._graveyard, time.monotonic()
        node.stop()
        try:
            await asyncio.sleep(PAUSED_S)
            tries = asyncio.create_task(graveyard.try_latest(self._triers[where], where, began))
            await asyncio.sleep(0)
            graveyard.resumed[where] = time.monotonic()
        finally:
            node.go_on()
        await tries
        if not await until(node.is_healthy, FAILED_OVER_S):
            raise ZcprotoError(
                f"{where} is not healthy {FAILED_OVER_S:g} s after a pause; see {self._folder}"
            )
        graveyard.outcome.longest_s = max(graveyard.outcome.longest_s, time.monotonic() - began)

    async def _is_over(self, old: ServerProcess) -> bool:
        primary = await asyncio.to_thread(self._valkeys.primary)
        return primary not in (None, old) and await self._are_healthy()

    async def _are_healthy(self) -> bool:
        return all(await asyncio.gather(*(node.is_healthy() for node in self._nodes.values())))

    async def _in_order(self) -> None:
        async def in_order() -> bool:
            await asyncio.sleep(PAUSE_S)
            return await asyncio.to_thread(self._valkeys.is_settled)

        if not await until(in_order, IN_ORDER_S):
            raise ZcprotoError(f"the servers are not in order after {IN_ORDER_S:g} s; see {self._folder}")

    async def _settle(self) -> None:
        """Stop the churn, wait until all servers have the news, and compare what they accept."""
        self._may_run.clear()
        try:
            while self._steps:  # noqa: ASYNC110 - a few steps of milliseconds
                await asyncio.sleep(PAUSE_S)
            if not await until(self._are_healthy, IN_ORDER_S):
                raise ZcprotoError(f"not all servers are healthy {IN_ORDER_S:g} s after a fault")
            await asyncio.sleep(NEWS_S)
            await for_each(self._users, lambda user: user.settle(self._callers))
        except* CallError as errors:
            raise ZcprotoError(f"after a fault a server answers {errors.exceptions[0]}") from errors
        finally:
            self._may_run.set()


def run_failovers(plan: FailoverPlan, folder: Path) -> dict[str, Outcome]:
    """Carry out all failovers in this folder. Raises ConfigError for what cannot be measured."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(Run(plan, folder).conduct())


@measurement
@click.option("--planned", type=TIMES, default=10, show_default=True, help="How many planned failovers.")
@click.option("--unplanned", type=TIMES, default=10, show_default=True, help="How many unplanned ones.")
@click.option("--paused", type=TIMES, default=10, show_default=True, help="How often a server is paused.")
@click.option("--rate", type=RATE, default=60.0, show_default=True, help="Calls of users a second.")
def command(planned: int, unplanned: int, paused: int, rate: float) -> Report:
    with temporary_home() as home:
        outcomes = run_failovers(FailoverPlan(planned, unplanned, paused, rate), home.path)
    notes = [f"{name}: {note}" for name, outcome in outcomes.items() for note in outcome.notes()]
    return Report({name: outcome.rows() for name, outcome in outcomes.items()}, notes=notes)
