"""Conducting a soak: cycles of churn with harm in between, and a rest after each in which a sample is taken."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from bench.soak.clients import Client, Seen
from bench.soak.harm import MOST_STREAMS, Harm, write_config
from bench.soak.outcome import SoakOutcome
from bench.soak.plan import SoakPlan
from bench.soak.watch import take
from bench.storms.stage import HOST
from bench.told import open_session
from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor

REST_S: Final = 0.3
"""Between the end of the last connection and a sample: what the server does after it is done by then."""

GONE_S: Final = 20.0
"""Within which the server has to see that connections are closed."""

LOOK_S: Final = 0.05
OUTAGE_CHANCE: Final = 0.5
"""That the disk is full in a cycle; a certificate is rotated and the configuration reloaded in each."""

Say = Callable[[str], None]


def run_soak(plan: SoakPlan, home: Home, say: Say) -> SoakOutcome:
    """All of it, in this home folder. Raises ConfigError for what cannot be measured here."""
    if sys.platform != "linux":
        raise ConfigError(["a soak reads /proc and sets limits of another process, as only Linux has them"])
    users = UserFile(home.users)
    operator = Credential("operator", users.add("operator", operator=True))
    names = [f"client-{number}" for number in range(plan.churning + plan.steady)]
    credentials = [Credential(*each) for each in users.add_many(names)]
    write_config(plan, home, MOST_STREAMS[1])
    server = DemoServer(home.path, "sqlite")
    with on_processor(0):
        server.__enter__()
    try:
        with on_processor(1), asyncio.Runner() as runner:
            outcome = runner.run(Soak(plan, home, server, operator, credentials, say).conduct())
    finally:
        server.__exit__(None, None, None)
    outcome.log_events = log_events(home.path / "server.log")
    return outcome


class Soak:
    """One run, on one server."""

    def __init__(
        self,
        plan: SoakPlan,
        home: Home,
        server: DemoServer,
        operator: Credential,
        credentials: list[Credential],
        say: Say,
    ) -> None:
        self._plan = plan
        self._home = home
        self._server = server
        self._operator = operator
        self._credentials = credentials
        self._say = say
        self._chance = random.Random(plan.seed)  # noqa: S311  an order, no secret
        self._seen = Seen()
        self._outcome = SoakOutcome(plan, self._seen)
        self._began = 0.0
        self._stopping = asyncio.Event()

    async def conduct(self) -> SoakOutcome:
        """The first Ctrl-C ends it early, with what there is; the second ends the program."""
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._outcome.interrupted = True
            self._stopping.set()

        loop.add_signal_handler(signal.SIGINT, interrupted)
        place = Place(HOST, HOST, self._server.port, self._home.certs / "ca.crt")
        try:
            watcher = await place.caller()
            watcher.token = (await open_session(watcher, self._operator)).token
            await self._go_on(place, watcher)
            await watcher.leave()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            place.close()
        return self._outcome

    async def _go_on(self, place: Place, watcher: Caller) -> None:
        plan, outcome = self._plan, self._outcome
        harm = Harm(plan, self._home, self._server.pid, place, watcher)
        clients = [self._client(number) for number in range(len(self._credentials))]
        churning, steady = clients[: plan.churning], clients[plan.churning :]
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as running:
            tasks = [running.create_task(client.run(place)) for client in steady]
            while time.monotonic() - self._began < plan.seconds and not self._stopping.is_set():
                await self._cycle(churning, place, harm)
                await self._renew(watcher)
                await self._sample(harm)
            for client in steady:
                client.stop()
            await asyncio.gather(*tasks)
        outcome.seconds = time.monotonic() - self._began
        self._say("judging once more what every client remembers ...")
        for client in clients:
            await client.settle(place)
        outcome.errors = (await harm.stats())["errors"]

    def _client(self, number: int) -> Client:
        plan = self._plan
        is_steady = number >= plan.churning
        chance = random.Random(self._chance.getrandbits(64))  # noqa: S311 - likewise
        pause_s = plan.pause_s * (2 if is_steady else 1)
        return Client(self._credentials[number], chance, self._seen, pause_s, is_steady)

    async def _cycle(self, churning: list[Client], place: Place, harm: Harm) -> None:
        """Churn, with harm at random moments of it."""
        plan, chance = self._plan, self._chance
        begin = time.monotonic()
        # What goes wrong does so at one moment, and never while the cycle ends.
        moments = sorted(chance.uniform(0.1, 0.8) for _ in range(3))
        harms = ["rotation", "reload", "outage" if chance.random() < OUTAGE_CHANCE else ""]
        chance.shuffle(harms)
        async with asyncio.TaskGroup() as running:
            for client in churning:
                running.create_task(client.run(place))
            for moment, name in zip(moments, harms, strict=True):
                await self._sleep(begin + moment * plan.cycle - time.monotonic())
                if name and not self._stopping.is_set():
                    await self._do(name, harm)
            await self._sleep(begin + plan.cycle - time.monotonic())
            for client in churning:
                client.stop()

    async def _do(self, name: str, harm: Harm) -> None:
        plan, outcome, chance = self._plan, self._outcome, self._chance
        begin = time.monotonic() - self._began
        length_s = min(plan.outage_s, plan.cycle / 4) * chance.uniform(0.3, 1.0)
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "rotation": harm.rotate,
            "reload": lambda: harm.reload(chance),
            "outage": lambda: harm.fill_disk(length_s),
        }
        try:
            await acts[name]()
        except ZcprotoError as error:
            outcome.failed[name] = str(error)
        else:
            outcome.done[name] += 1
        if name == "outage":
            outcome.outage_spans.append((begin, time.monotonic() - self._began))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _renew(self, watcher: Caller) -> None:
        """The operator's session lives no longer than others; it is opened anew, and the old one ended."""
        old = watcher.token
        watcher.token = (await open_session(watcher, self._operator)).token
        await watcher.call("session.close", {}, old)

    async def _sample(self, harm: Harm) -> None:
        """Wait until those who came and went are gone, and take down what the server has then."""
        outcome, at_rest = self._outcome, self._plan.steady + 1
        end = time.monotonic() + GONE_S
        while (await harm.stats())["tcp_connections"] > at_rest and time.monotonic() < end:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(REST_S)
        at_s = time.monotonic() - self._began
        sample = take(self._server.pid, await harm.stats(), at_s, self._seen.judged, outcome.done["outage"])
        outcome.samples.append(sample)
        self._say(
            f"{at_s / 60:.1f} of {self._plan.minutes:g} min: {sample.answers:,} answers judged, "
            f"{self._seen.wrong.total()} wrong; {sample.memory_mib:.1f} MiB, {sample.descriptors} descriptors, "
            f"{sample.tasks} tasks, {sample.sessions:,} sessions"
        )


def log_events(path: Path) -> Counter[str]:
    """Warnings and errors of a server's log, by event."""
    found: Counter[str] = Counter()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:  # the disk was full in the middle of it
                found["(a broken line)"] += 1
                continue
            if told.get("level") in ("warning", "error", "critical"):
                found[f"{told['level']}: {told.get('event')}"] += 1
    return found
