"""One of two servers hangs (SIGSTOP) while clients call: does each idempotent call get its answer, and how soon?

Two servers share the sessions of a Valkey. Each client has both addresses, and sends one call after the other, each
with an idempotency key. Then one server is stopped for longer than the clients wait for it, and goes on again.

A client sends PING after 5 s without a byte and connects to the other server 2 s later, beside the connection that
is silent (specification, section 6.6). The gap of a client is that between two of its answers.

The outcome of a call that was being run when its server was stopped may be unknown. The other server answers so
once the stopped one has been away for some seconds; the gap of that client does not count.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.deployments import Deployment
from bench.report import Report, Row, counted
from bench.scenarios.harness import cause_of
from bench.stage import ECDSA_ONLY, HOST, Server, Stage, check_open_files, room_for
from zcproto.client.client import Client
from zcproto.client.options import ConnectOptions
from zcproto.common.process import new_event_loop
from zcproto.errors import UnknownError, ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential

CALL_S: Final = 60.0
"""Timeout of a call."""

MAX_GAP_S: Final = 8.0


@dataclass(frozen=True, slots=True)
class FrozenPlan:
    """One run."""

    clients: int = 100
    rate: float = 5.0
    """Calls of each client by the second."""
    warm_up_s: float = 3.0
    pause_s: float = 15.0
    """How long the server is stopped."""


@dataclass(slots=True)
class Seen:
    """What became of the calls."""

    sent: int = 0
    answered: int = 0
    at_stopped: int = 0
    """Clients of the server that was stopped, when it was."""
    moved: int = 0
    """Of these, clients that had moved when it went on."""
    unknown: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """The longest of each client."""
    failed: Counter[str] = field(default_factory=Counter)


class Calling:
    """A client that sends one call after the other until `stop` is set."""

    def __init__(self, addresses: str, ca_file: Path, user: Credential, number: int) -> None:
        name, key = user
        self.client = Client(addresses, ConnectOptions(user=name, key=key, ca_file=ca_file, timeout=CALL_S))
        self._number = number

    @property
    def port(self) -> int:
        """That of the server whose client this is; 0 without a connection."""
        endpoint = self.client.endpoint
        return 0 if endpoint is None else endpoint.port

    async def run(self, plan: FrozenPlan, seen: Seen, stop: asyncio.Event) -> None:
        jitter = random.Random(self._number)  # noqa: S311 - no secret
        longest, answered_at, is_known = 0.0, time.monotonic(), True
        for call in itertools.count():
            if stop.is_set():
                break
            seen.sent += 1
            key = f"{self._number}-{call}"
            try:
                answer = await self.client.call("echo", n=call, idempotency_key=key)
            except UnknownError:
                seen.unknown += 1
                is_known = False
            except ZcprotoError as error:
                seen.failed[cause_of(error)] += 1
            else:
                seen.answered += answer == {"n": call}
            now = time.monotonic()
            longest, answered_at = max(longest, now - answered_at), now
            await asyncio.sleep(2 * jitter.random() / plan.rate)
        if is_known:
            seen.gaps_s.append(longest)


async def freeze(servers: list[Server], plan: FrozenPlan, users: list[Credential], ca_file: Path) -> Seen:
    """Carry out a plan; return what became of the calls."""
    seen, stop = Seen(), asyncio.Event()
    addresses = ",".join(f"{HOST}:{server.port}" for server in servers)
    callers = [Calling(addresses, ca_file, user, number) for number, user in enumerate(users)]
    await asyncio.gather(*(each.client.open() for each in callers))
    calls = [asyncio.create_task(each.run(plan, seen, stop)) for each in callers]
    stopped = servers[0]
    try:
        await asyncio.sleep(plan.warm_up_s)
        hurt = [each for each in callers if each.port == stopped.port]
        seen.at_stopped = len(hurt)
        progress(f"one of two servers is stopped, with {len(hurt):,} of {len(callers):,} clients ...")
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(plan.pause_s)
            seen.moved = sum(each.port != stopped.port for each in hurt)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
    finally:
        stop.set()
        await asyncio.gather(*calls)
        await asyncio.gather(*(each.client.close() for each in callers))
    return seen


def report(plan: FrozenPlan, seen: Seen) -> Report:
    """Hold what was seen against the bars."""
    gaps = sorted(seen.gaps_s) or [0.0]
    rows = [
        Row("clients", "clients", plan.clients),
        Row("at_stopped", "of the server that was stopped", seen.at_stopped, at_least=1),
        Row("moved", "of these moved to the other one", seen.moved, equals=seen.at_stopped),
        Row("calls", "idempotent calls", seen.sent, at_least=1),
        Row("unknown", "run when their server was stopped: outcome unknown", seen.unknown),
        Row("not_answered", "calls without their answer", seen.sent - seen.answered - seen.unknown, equals=0),
        Row("gap_p50_s", "longest gap of a client, p50", gaps[len(gaps) // 2], "s"),
        Row("gap_s", "longest gap of a client, longest", gaps[-1], "s", below=MAX_GAP_S),
    ]
    return Report({"figure": rows}, notes=[*counted("not answered", seen.failed)])


def run(stage: Stage, plan: FrozenPlan, folder: Path) -> Report:
    """Carry out a plan with two servers. Raises ZcprotoError for a server that does not start."""
    users = stage.add_users("caller", plan.clients)
    stage.make_certificates()
    with ExitStack() as stack:
        valkey = stack.enter_context(Deployment(folder / "valkey"))
        servers = [
            stack.enter_context(Server(stage.copy(folder / name), valkey.url)) for name in ("first", "second")
        ]
        runner = stack.enter_context(asyncio.Runner(loop_factory=new_event_loop))
        return report(plan, runner.run(freeze(servers, plan, users, stage.ca_file)))


@measurement
@click.option("--clients", type=COUNT, default=100, show_default=True, help="How many.")
@click.option("--rate", type=RATE, default=5.0, show_default=True, help="Calls of each by the second.")
@click.option("--pause", type=SECONDS, default=15.0, show_default=True, help="Seconds that a server hangs.")
def command(clients: int, rate: float, pause: float) -> Report:
    check_open_files(clients)
    settings = {**room_for(clients), **ECDSA_ONLY}
    with temporary_home() as home:
        return run(
            Stage(home.path / "pattern", settings), FrozenPlan(clients, rate, pause_s=pause), home.path
        )
