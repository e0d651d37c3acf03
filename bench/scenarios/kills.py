"""A server killed again and again while sessions come and go: nothing that it had acknowledged is lost.

The server keeps its sessions in a file, as by default. Eight clients open, refresh, close and revoke sessions,
each those of a user of its own, one call after the other.

At a random moment the server is killed (SIGKILL) and started again. Then every live session
must be accepted, and its newest refresh token must give a new pair; every replaced token and every session
that was closed or revoked must be refused. A call that was not answered may have been done or not, but not in
part. A refresh that was not answered is repeated and must give a pair (specification, section 9.6).

The moments and the calls follow from the seed; how far the server has come by then does not.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import click

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row
from bench.scenarios.harness import for_each
from bench.scenarios.sessions import (
    ENDED_CODES,
    Broken,
    ClientSession,
    check,
    is_accepted,
    open_session,
    refresh,
    with_retries,
)
from bench.stage import ECDSA_ONLY, Server, Stage
from zcproto.common.process import new_event_loop
from zcproto.errors import CallError, Cancelled, ConnectionClosed, Unavailable, ZcprotoError
from zcproto.load.caller import Caller
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential

CLIENTS: Final = 8
MAX_SESSIONS: Final = 8
"""Sessions that a client has at once."""

LONGEST_S: Final = (0.02, 0.1, 0.5)
"""By when a server is killed, from the first call on: soon, or when much has been done."""

REMEMBERED: Final = 200
"""Sessions that ended before the last kill, of those tried once more."""

PROGRESS_LINES: Final = 20

GRACE: Final = {"sessions.refresh_grace": "1m"}
"""A busy machine may need longer than by default until a refresh is repeated."""

DAMAGE: Final = ("store.damaged", "sessions.left_out", "revocations.damaged", "store.task_failed")
"""Log events that must not occur."""


class Unanswered(NamedTuple):
    """A call that may or may not have been carried out, and the sessions it was for."""

    what: str
    sessions: Sequence[ClientSession]


@dataclass(slots=True)
class Seen:
    """Counts of all kills so far."""

    kills: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    """By whether they turned out to be done."""
    checked: Counter[str] = field(default_factory=Counter)
    broken: Broken = field(default_factory=Broken)
    pairs_refused: int = 0
    half_done: int = 0
    damage: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    starts_s: list[float] = field(default_factory=list)

    def report(self, kills: int) -> Report:
        done, checked, broken = self.acknowledged, self.checked, self.broken
        starts = sorted(self.starts_s) or [0.0]
        rows = [
            Row("kills", "kills", self.kills, at_least=kills),
            Row("opened", "openings acknowledged", done["open"], at_least=1),
            Row("refreshed", "refreshes acknowledged", done["refresh"], at_least=1),
            Row("ended", "sessions ended, acknowledged", done["close"] + done["revoke"], at_least=1),
            Row("revoked_all", "of these by revoking all of a user", done["revoke all"]),
            Row("done", "unanswered calls that were done", self.unanswered["done"]),
            Row("not_done", "unanswered calls that were not done", self.unanswered["not done"]),
            Row("repeated", "unanswered refreshes repeated", checked["repeated"]),
            Row("half_done", "unanswered calls done in part", self.half_done, equals=0),
            Row("failed", "calls that failed", self.failed.total(), equals=0),
            Row("live", "live sessions tried", checked["live"]),
            Row("lost", "of these lost", len(broken.lost), equals=0),
            Row("pairs_refused", "newest refresh tokens refused", self.pairs_refused, equals=0),
            Row("dead", "ended sessions tried", checked["ended"]),
            Row("revived", "of these accepted", len(broken.revived), equals=0),
            Row("replaced", "replaced tokens tried", checked["replaced"]),
            Row("reused", "of these accepted", len(broken.reused), equals=0),
            Row("damage", "damage in the server's log", self.damage, equals=0),
            Row("start_p50_s", "start of the server, p50", starts[len(starts) // 2], "s"),
            Row("start_longest_s", "start of the server, longest", starts[-1], "s"),
        ]
        faults = [f"{count:,} times: {what}" for what, count in self.failed.items()]
        return Report({"figure": rows}, faults)


class Client:
    """One user's sessions, and calls for them, each after the answer to the one before."""

    def __init__(self, credential: Credential, chance: random.Random, seen: Seen) -> None:
        self._credential = credential
        self._chance = chance
        self._seen = seen
        self._unanswered: list[Unanswered] = []
        self.live: list[ClientSession] = []
        self.ended: list[ClientSession] = []

    async def churn(self, caller: Caller) -> None:
        """Make calls until the connection is lost."""
        while True:
            what, sessions, call = self._choose(caller)
            try:
                await call
            except (ConnectionClosed, Unavailable, Cancelled) as error:
                if what == "revoke all":  # which may have ended those, too
                    self._take_unanswered_refreshes()
                self._unanswered.append(Unanswered(what, sessions))
                for session in sessions:
                    self.live.remove(session)
                # All may still be revoked, and with them those that would be opened now.
                if isinstance(error, ConnectionClosed) or caller.ended or what == "revoke all":
                    return
            except CallError as error:
                self._seen.failed[f"{what}: {error}"] += 1
                return

    def _choose(self, caller: Caller) -> tuple[str, Sequence[ClientSession], Coroutine[Any, Any, None]]:
        chance, live = self._chance, self.live
        choice = chance.random()
        if not live or (choice < 0.45 and len(live) < MAX_SESSIONS):
            return "open", (), self._open(caller)
        session = chance.choice(live)
        if choice < 0.75:
            return "refresh", (session,), self._refresh(caller, session)
        by, one, every = chance.choice(live), (session,), tuple(live)
        if choice < 0.85:
            return "close", one, self._end("close", caller, {}, session, one)
        if choice < 0.95:
            return "revoke", one, self._end("revoke", caller, {"id": session.id}, by, one)
        return "revoke all", every, self._end("revoke all", caller, {"all": True}, by, every)

    async def _open(self, caller: Caller) -> None:
        self.live.append(await open_session(caller, self._credential))
        self._seen.acknowledged["open"] += 1

    async def _refresh(self, caller: Caller, session: ClientSession) -> None:
        await refresh(caller, session)
        self._seen.acknowledged["refresh"] += 1

    async def _end(
        self,
        what: str,
        caller: Caller,
        params: dict[str, Any],
        by: ClientSession,
        sessions: Sequence[ClientSession],
    ) -> None:
        await caller.call(f"session.{what.split(maxsplit=1)[0]}", params, by.token)
        self._seen.acknowledged[what] += 1
        if what == "revoke all":
            self._seen.acknowledged["revoke"] += len(sessions)
            sessions = [*sessions, *self._take_unanswered_refreshes()]
        for session in sessions:
            self._mark_ended(session)

    def _take_unanswered_refreshes(self) -> list[ClientSession]:
        taken = [session for each in self._unanswered if each.what == "refresh" for session in each.sessions]
        self._unanswered = [each for each in self._unanswered if each.what != "refresh"]
        return taken

    def _mark_ended(self, session: ClientSession) -> None:
        session.is_ended = True
        self.ended.append(session)
        if session in self.live:
            self.live.remove(session)

    async def settle(self, caller: Caller) -> None:
        """Find out whether the unanswered calls were carried out."""
        for what, sessions in self._unanswered:
            if not sessions:  # an opening: its tokens are not known
                continue
            accepted = [await is_accepted(caller, session.token) for session in sessions]
            self._seen.unanswered["not done" if any(accepted) else "done"] += 1
            self._seen.checked["repeated"] += what == "refresh"
            if any(accepted) and not all(accepted):
                self._seen.half_done += 1
            for session, is_live in zip(sessions, accepted, strict=True):
                if is_live or what == "refresh":  # which the check repeats
                    self.live.append(session)
                else:
                    self._mark_ended(session)
        self._unanswered.clear()

    async def renew_all(self, caller: Caller) -> None:
        """Trade every pair for a new one."""

        async def renew(session: ClientSession) -> None:
            try:
                await with_retries(lambda: self._refresh(caller, session))
            except CallError as error:
                if error.code not in ENDED_CODES:
                    raise
                self._seen.pairs_refused += 1
                self.live.remove(session)

        await for_each(list(self.live), renew)


class Kills:
    """Servers on one stage, one after the other, and their clients."""

    def __init__(self, stage: Stage, users: Iterable[Credential], seed: int, seen: Seen) -> None:
        self.stage = stage
        self._chance = random.Random(seed)  # noqa: S311 - moments and choices, no secret
        self._seen = seen
        self._clients = [
            Client(user, random.Random(self._chance.getrandbits(64)), seen)  # noqa: S311 - choices, no secret
            for user in users
        ]

    async def one_server(self, *, last: bool = False) -> None:
        """Start a server, check what was acknowledged, and kill it while it works."""
        begin = time.monotonic()
        with self.stage.serve("sqlite", cpu=None) as server:
            self._seen.starts_s.append(time.monotonic() - begin)
            target = server.target()
            callers = [await target.caller() for _ in self._clients]
            try:
                await self._check(callers)
                if not last:
                    await self._churn(callers, server)
            finally:
                for caller in callers:
                    await caller.disconnect()
                target.close()

    async def _check(self, callers: Sequence[Caller]) -> None:
        seen = self._seen
        for client, caller in zip(self._clients, callers, strict=True):
            await client.settle(caller)
            sessions = [*client.live, *client.ended]
            seen.checked["live"] += len(client.live)
            seen.checked["ended"] += len(client.ended)
            seen.checked["replaced"] += sum(bool(session.replaced) for session in sessions)
            broken = await check(caller, sessions)
            seen.broken.add(broken)
            client.live = [session for session in client.live if session.name not in broken.lost]
            await client.renew_all(caller)
            some = min(len(client.ended), REMEMBERED // CLIENTS)
            client.ended = self._chance.sample(client.ended, some)

    async def _moment(self) -> None:
        """Wait for the moment at which the server is killed."""
        await asyncio.sleep(self._chance.choice(LONGEST_S) * self._chance.random())

    async def _churn(self, callers: Sequence[Caller], server: Server) -> None:
        async with asyncio.TaskGroup() as group:
            for client, caller in zip(self._clients, callers, strict=True):
                group.create_task(client.churn(caller))
            await self._moment()
            server.kill()
        self._seen.kills += 1


async def kill_often(stage: Stage, kills: int, seed: int, seen: Seen) -> None:
    """Carry out all kills, and one last check."""
    run = Kills(stage, stage.add_users("client", CLIENTS), seed, seen)
    for number in range(1, kills + 1):
        try:
            await run.one_server()
        except ZcprotoError as error:
            raise ZcprotoError(f"after {seen.kills:,} kills: {error}") from error
        if number % max(1, kills // PROGRESS_LINES) == 0:
            done = sum(seen.acknowledged[what] for what in ("open", "refresh", "close", "revoke"))
            progress(f"{number:,} of {kills:,} kills: {done:,} acknowledged, {len(seen.broken):,} broken")
    await run.one_server(last=True)


@measurement
@click.option("--kills", type=COUNT, default=200, show_default=True, help="How many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the calls.")
def command(kills: int, seed: int) -> Report:
    seen = Seen()
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        # An opening that was not answered leaves a session that its client cannot end.
        stage = Stage(home.path, {"sessions.per_user": 100_000, **GRACE, **ECDSA_ONLY})
        stage.make_certificates()
        runner.run(kill_often(stage, kills, seed, seen))
        log = stage.log_file.read_text(encoding="utf-8", errors="replace")
    seen.damage = sum(log.count(f'"{event}"') for event in DAMAGE)
    return seen.report(kills)
