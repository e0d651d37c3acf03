"""A server killed again and again while sessions come and go: what it had acknowledged is there after each restart.

    python -m bench.kills [--kills 200] [--seed 1] [--json FILE]

- The server is `zcproto serve` with its sessions in a file, as by default, in a temporary folder. Some clients
  open, refresh, close and revoke sessions, each those of a user of its own, one call after the other.
- At a random moment the server is killed (SIGKILL) and started again. Then every session that its client was told
  of must be good, and the newest pair of tokens must give another; every token that was replaced and every session
  that was closed or revoked must be refused.
- What was asked for and not answered may have been done or not, but not by halves.
- The moments follow from the seed, as do the calls; how far a server had come by then does not.

Exit code: 0 if all targets are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.micro.token_check import Figure, conclude
from bench.rotation.__main__ import whole
from bench.told import Broken, Told, check, each_of, is_good, open_session, refresh
from zcproto.auth import UserFile
from zcproto.common.event_loop import new_event_loop
from zcproto.common.home import Home
from zcproto.errors import CallError, ConfigError, ConnectionClosed, Unavailable, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import temporary_home
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import Credential

HOST: Final = "127.0.0.1"
CLIENTS: Final = 8
MOST: Final = 8
"""Sessions that a client has at once."""

LONGEST_S: Final = (0.02, 0.1, 0.5)
"""By when a server is killed, from the first call on: soon, or when much has been done."""

REMEMBERED: Final = 200
"""Sessions that ended before the last kill, of those tried once more."""

LINES: Final = 20
CANNOT: Final = 2
INTERRUPTED: Final = 130

_BAD_NEWS: Final = ("store.damaged", "sessions.left_out", "revocations.damaged", "store.task_failed")
"""Events in the server's log that must not be there."""

Say = Callable[[str], None]


class Asked(NamedTuple):
    """A call of which nobody knows whether it was done, and the sessions it was for."""

    what: str
    sessions: Sequence[Told]


@dataclass(slots=True)
class Report:
    """What has been seen so far."""

    kills: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    """Of these, by what became of them."""
    checked: Counter[str] = field(default_factory=Counter)
    broken: Broken = field(default_factory=Broken)
    pairs_refused: int = 0
    halves: int = 0
    bad_news: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    starts_s: list[float] = field(default_factory=list)

    def figures(self, wanted: int) -> list[Figure]:
        done, seen, broken = self.acknowledged, self.checked, self.broken
        starts = sorted(self.starts_s) or [0.0]
        return [
            Figure("kills", self.kills, "", wanted, at_least=True),
            Figure("openings acknowledged", done["open"], "", 1, at_least=True),
            Figure("refreshes acknowledged", done["refresh"], "", 1, at_least=True),
            Figure("sessions ended, acknowledged", done["close"] + done["revoke"], "", 1, at_least=True),
            Figure("of these by revoking all of a user", done["revoke all"], ""),
            Figure("calls that were not answered, and done", self.unanswered["done"], ""),
            Figure("calls that were not answered, nor done", self.unanswered["not done"], ""),
            Figure("calls done by halves", self.halves, "", 1),
            Figure("calls that failed", self.failed.total(), "", 1),
            Figure("live sessions tried", seen["live"], ""),
            Figure("of these lost", len(broken.lost), "", 1),
            Figure("newest pairs that were refused", self.pairs_refused, "", 1),
            Figure("ended sessions tried", seen["ended"], ""),
            Figure("of these alive again", len(broken.risen), "", 1),
            Figure("replaced tokens tried", seen["replaced"], ""),
            Figure("of these taken", len(broken.spent), "", 1),
            Figure("damage told by the server", self.bad_news, "", 1),
            Figure("start of the server, p50", starts[len(starts) // 2], "s"),
            Figure("start of the server, longest", starts[-1], "s"),
        ]


class Client:
    """One user's sessions, and the calls that are made for them, each when the one before was answered."""

    def __init__(self, credential: Credential, chance: random.Random, report: Report) -> None:
        self._credential = credential
        self._chance = chance
        self._report = report
        self.live: list[Told] = []
        self.ended: list[Told] = []
        self.asked: list[Asked] = []

    async def churn(self, caller: Caller) -> None:
        """Until the connection is gone."""
        while True:
            what, sessions, call = self._choose(caller)
            try:
                await call
            except (ConnectionClosed, Unavailable) as error:
                self.asked.append(Asked(what, sessions))
                for told in sessions:
                    self.live.remove(told)
                if isinstance(error, ConnectionClosed) or caller.ended:
                    return
            except CallError as error:
                self._report.failed[f"{what}: {error}"] += 1
                return

    def _choose(self, caller: Caller) -> tuple[str, Sequence[Told], Coroutine[Any, Any, None]]:
        chance, live = self._chance, self.live
        choice = chance.random()
        if not live or (choice < 0.45 and len(live) < MOST):
            return "open", (), self._open(caller)
        told = chance.choice(live)
        if choice < 0.75:
            return "refresh", (told,), self._refresh(caller, told)
        if choice < 0.85:
            return "close", (told,), self._end("close", caller, "session.close", {}, told, (told,))
        by = chance.choice(live)
        if choice < 0.95:
            params: dict[str, object] = {"id": told.id}
            return "revoke", (told,), self._end("revoke", caller, "session.revoke", params, by, (told,))
        every = tuple(live)
        return (
            "revoke all",
            every,
            self._end("revoke all", caller, "session.revoke", {"all": True}, by, every),
        )

    async def _open(self, caller: Caller) -> None:
        self.live.append(await open_session(caller, self._credential))
        self._report.acknowledged["open"] += 1

    async def _refresh(self, caller: Caller, told: Told) -> None:
        await refresh(caller, told)
        self._report.acknowledged["refresh"] += 1

    async def _end(
        self,
        what: str,
        caller: Caller,
        method: str,
        params: dict[str, object],
        by: Told,
        sessions: Sequence[Told],
    ) -> None:
        await caller.call(method, params, by.token)
        self._report.acknowledged[what] += 1
        if what == "revoke all":
            self._report.acknowledged["revoke"] += len(sessions)
        for told in sessions:
            self._take_end(told)

    def _take_end(self, told: Told) -> None:
        told.is_ended = True
        self.ended.append(told)
        if told in self.live:
            self.live.remove(told)

    async def settle(self, caller: Caller) -> None:
        """Find out what became of the calls that were not answered."""
        for what, sessions in self.asked:
            if not sessions:  # an opening: nobody has its tokens
                continue
            good = [await is_good(caller, told.token) for told in sessions]
            self._report.unanswered["not done" if any(good) else "done"] += 1
            if any(good) and not all(good):
                self._report.halves += 1
            for told, is_live in zip(sessions, good, strict=True):
                if is_live:
                    told.is_asked = False  # it is renewed with all others
                    self.live.append(told)
                elif what != "refresh":  # of a refresh nobody has the new pair
                    self._take_end(told)
        self.asked.clear()

    async def renew(self, caller: Caller) -> None:
        """Trade every pair for another."""

        async def renew(told: Told) -> None:
            try:
                await self._refresh(caller, told)
            except CallError:  # whatever it is: the pair is the newest
                self._report.pairs_refused += 1
                self.live.remove(told)

        await each_of(list(self.live), renew)


class Kills:
    """Servers of one home folder, one after the other, and their clients."""

    def __init__(self, home: Home, credentials: Iterable[Credential], seed: int, report: Report) -> None:
        self._home = home
        self._chance = random.Random(seed)  # noqa: S311 - moments and choices, no secret
        self._report = report
        self._clients = [
            Client(each, random.Random(self._chance.getrandbits(64)), report)  # noqa: S311 - likewise
            for each in credentials
        ]

    async def one_server(self, *, last: bool = False) -> None:
        """Start a server, see whether it knows what was acknowledged, and kill it while it works."""
        begin = time.monotonic()
        with DemoServer(self._home.path, "sqlite") as server:
            self._report.starts_s.append(time.monotonic() - begin)
            place = Place(HOST, HOST, server.port, self._home.certs / "ca.crt")
            callers = [await place.caller() for _ in self._clients]
            try:
                await self._check(callers)
                if not last:
                    await self._churn(callers, server)
            finally:
                for caller in callers:
                    await caller.leave()
                place.close()
        news = (self._home.path / "server.err").read_text(encoding="utf-8")
        self._report.bad_news += sum(news.count(f'"{each}"') for each in _BAD_NEWS)

    async def _check(self, callers: Sequence[Caller]) -> None:
        """What each client was told, by the calls that it would make itself."""
        report = self._report
        for client, caller in zip(self._clients, callers, strict=True):
            await client.settle(caller)
            report.checked["live"] += len(client.live)
            report.checked["ended"] += len(client.ended)
            sessions = [*client.live, *client.ended]
            report.checked["replaced"] += sum(bool(told.replaced) for told in sessions)
            broken = await check(caller, sessions)
            report.broken.add(broken)
            client.live = [told for told in client.live if told.name not in broken.lost]
            await client.renew(caller)
            some = min(len(client.ended), REMEMBERED // CLIENTS)
            client.ended = self._chance.sample(client.ended, some)

    async def _churn(self, callers: Sequence[Caller], server: DemoServer) -> None:
        after_s = self._chance.choice(LONGEST_S) * self._chance.random()
        async with asyncio.TaskGroup() as group:
            for client, caller in zip(self._clients, callers, strict=True):
                group.create_task(client.churn(caller))
            await asyncio.sleep(after_s)
            server.kill()
        self._report.kills += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=whole, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the calls")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    report = Report()
    try:
        check_outputs(Outputs(json=options.json))
        with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(kill_often(home, options.kills, options.seed, report, tell))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(f"after {report.kills:,} kills: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    for failure, count in report.failed.items():
        print(f"{count:,} times: {failure}", file=sys.stderr)
    return conclude(report.figures(options.kills), options.json)


async def kill_often(home: Home, kills: int, seed: int, report: Report, say: Say) -> None:
    """All of it, in this home folder."""
    users = UserFile(home.users)
    names = [f"client-{number}" for number in range(CLIENTS)]
    credentials = [Credential(*each) for each in users.add_many(names)]
    home.config.write_text(
        "[sessions]\n"
        "per_user = 100000    # an opening that was not answered leaves a session that nobody can end\n\n"
        '[certificates]\nkey_types = ["ecdsa-p256"]\n',
        encoding="utf-8",
    )
    home.config.chmod(0o600)
    with DemoServer(home.path):
        pass  # it makes its certificates
    run = Kills(home, credentials, seed, report)
    for number in range(1, kills + 1):
        await run.one_server()
        if number % max(1, kills // LINES) == 0:
            acknowledged = sum(report.acknowledged[what] for what in ("open", "refresh", "close", "revoke"))
            say(
                f"{number:,} of {kills:,} kills: {acknowledged:,} acknowledged, {len(report.broken):,} broken"
            )
    await run.one_server(last=True)


def tell(line: str) -> None:
    """How it goes on."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
