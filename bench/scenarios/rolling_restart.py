"""Replace a server by a new one again and again, while clients call it and others come and go.

Clients that stay send 5,000 requests a second, every tenth with an idempotency key. 100 more connect each second,
open a session, call once, close it and leave. Meanwhile the server, of two workers with a store in a file, is
replaced by `zcproto upgrade`, every fourth time by SIGUSR2. No request may be lost that its client may not repeat
(specification, section 11.1), and no connection refused.

A request is lost if its client does not know its outcome and may not send it again, or has no answer within its
timeout. A connection is refused if it ends before the server's WELCOME.

A restart has ended when the last worker of the old server has. The longest gap is that between two answers, of
whatever clients.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from math import ceil
from typing import Final

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.harness import ask_control, until
from bench.scenarios.helper import Helper
from bench.scenarios.rolling_clients import VISIT_S, RollingClients, Seen
from bench.scenarios.worker_kills import is_running
from bench.stage import ECDSA_ONLY, SERVER_CPU, Server, Stage, bench_environment, check_open_files, room_for
from zcproto.client.endpoints import STABLE_AFTER
from zcproto.common.home import Home
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.processes import module_command, on_processor

WORKERS: Final = 2
VISITORS: Final = 50
"""Users of the clients that come and go, in turn: each opens its sessions one after the other."""

BY_SIGNAL_EVERY: Final = 4
WARM_UP_S: Final = 2.0
RESTART_S: Final = 90.0
"""Seconds within which a server must be replaced and the old one have ended."""

REACHED: Final = 0.98
"""Of the rates that were asked for: the rest is the share of chance and of a moment without server."""

FAULTS: Final = ("upgrade.failed", "upgrade.slow", "worker.ended", "worker.killed", "server.fault")
"""Events of the log that a restart must not cause."""


INTERVAL_S: Final = STABLE_AFTER + 1.0
"""Seconds between two restarts. A client whose connections last less than STABLE_AFTER waits longer before each
reconnect (specification, section 11), up to 30 s: its requests would miss their deadlines."""


@dataclass(frozen=True, slots=True)
class RollingPlan:
    """One run. Rates are by the second."""

    restarts: int = 20
    rate: float = 5_000.0
    visit_rate: float = 100.0
    clients: int = 50
    interval_s: float = INTERVAL_S
    """From the end of one restart to the next."""


@dataclass(slots=True)
class Restarts:
    """What became of the restarts."""

    serving_s: list[float] = field(default_factory=list)
    """From the order until the new server owns the home folder."""
    restart_s: list[float] = field(default_factory=list)
    """From the order until the old server has ended."""
    events: Counter[str] = field(default_factory=Counter)
    """Warnings and errors of the log."""
    faults: list[str] = field(default_factory=list)


class RollingServer:
    """The server that runs on a stage; `pid` is that of the newest one's supervisor."""

    def __init__(self, stage: Stage, server: Server) -> None:
        self._home = stage.home
        self.pid = server.pid

    async def replace(self, by_signal: bool, seen: Restarts) -> None:
        """Replace the server and wait until the old one has ended. Raises ZcprotoError if either fails."""
        old, begin = self.pid, time.monotonic()
        if by_signal:
            os.kill(old, signal.SIGUSR2)
        else:
            await upgrade(self._home)

        async def is_replaced() -> bool:
            found: int | None = await asyncio.to_thread(supervisor_of, self._home)
            self.pid = found or old
            return self.pid != old

        async def has_ended() -> bool:
            return not is_running(old)

        for condition, times in ((is_replaced, seen.serving_s), (has_ended, seen.restart_s)):
            if not await until(condition, RESTART_S):
                raise ZcprotoError(f"the server was not replaced within {RESTART_S:.0f} s")
            times.append(time.monotonic() - begin)

    async def end(self) -> None:
        """End the newest server, which this process has not started."""
        os.kill(self.pid, signal.SIGTERM)

        async def has_ended() -> bool:
            return not is_running(self.pid)

        await until(has_ended, RESTART_S)


async def upgrade(home: Home) -> None:
    """Run `zcproto upgrade`. Raises ZcprotoError if it fails."""
    command = module_command("zcproto", "--home", str(home.path), "upgrade")
    with on_processor(SERVER_CPU):
        process = await asyncio.create_subprocess_exec(
            *command,
            env=bench_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    output, _ = await process.communicate()
    if process.returncode:
        raise ZcprotoError(f"zcproto upgrade failed: {output.decode(errors='replace').strip()[-200:]}")


def supervisor_of(home: Home) -> int | None:
    """Return the process id of the server that owns a home folder; None while it is handed over."""
    try:
        status, found = ask_control(home, "GET", "upgrade")
    except (OSError, HTTPException, ValueError):
        return None
    return int(found["supervisor"]) if status == HTTPStatus.OK else None


async def restart_often(
    stage: Stage, server: Server, clients: Helper, plan: RollingPlan, seen: Restarts
) -> Seen:
    """Carry out all restarts while the clients work; return what became of their requests."""
    rolling = RollingServer(stage, server)
    try:
        async with clients:
            await clients.call("open")
            loading = asyncio.create_task(clients.call("load"))
            await asyncio.sleep(WARM_UP_S)
            try:
                for number in range(1, plan.restarts + 1):
                    await rolling.replace(number % BY_SIGNAL_EVERY == 0, seen)
                    progress(f"restart {number:,} of {plan.restarts:,}: {seen.restart_s[-1]:.1f} s")
                    await asyncio.sleep(plan.interval_s)
            except ZcprotoError as error:
                seen.faults.append(str(error))
            await clients.call("stop")
            found: Seen = await loading
            await clients.call("disconnect")
            return found
    finally:
        await rolling.end()


def report(plan: RollingPlan, seen: Seen, restarts: Restarts) -> Report:
    """Hold what was seen against the bars."""
    seconds = seen.seconds or 1.0
    waits, visits = percentiles_ms(seen.waits), percentiles_ms(seen.visit_waits)
    serving, took = sorted(restarts.serving_s) or [0.0], sorted(restarts.restart_s) or [0.0]
    rows = [
        Row("restarts", "restarts", len(restarts.restart_s), equals=plan.restarts),
        Row("serving_p50_s", "until the new server serves, p50", serving[len(serving) // 2], "s"),
        Row("serving_s", "until the new server serves, longest", serving[-1], "s"),
        Row("restart_p50_s", "until the old server has ended, p50", took[len(took) // 2], "s"),
        Row("restart_s", "until the old server has ended, longest", took[-1], "s"),
        Row("rate", "requests answered", seen.answered / seconds, "/s", at_least=REACHED * plan.rate),
        Row("visit_rate", "connections made and used", seen.visits / seconds, "/s",
            at_least=REACHED * plan.visit_rate),
        Row("requests", "requests", seen.sent),
        Row("visits", "connections", seen.visits + seen.refused.total()),
        Row("lost", "requests lost", seen.lost.total(), equals=0),
        Row("refused", "connections refused", seen.refused.total(), equals=0),
        Row("retried", "requests sent again", seen.retried.total()),
        Row("skipped", "requests not sent, as too many had no answer", seen.skipped, equals=0),
        Row("gap_ms", "longest gap between two answers", seen.longest_gap_s * 1e3, "ms"),
        Row("wait_p50_ms", "request, p50", waits.get("p50"), "ms"),
        Row("wait_p99_ms", "request, p99", waits.get("p99"), "ms"),
        Row("wait_ms", "request, longest", waits.get("max"), "ms"),
        Row("visit_p50_ms", "connection from connect to close, p50", visits.get("p50"), "ms"),
        Row("visit_ms", "connection from connect to close, longest", visits.get("max"), "ms"),
    ]  # fmt: skip
    notes = [
        *counted("lost", seen.lost),
        *counted("refused", seen.refused),
        *counted("sent again", seen.retried),
        *counted("in the log", restarts.events),
    ]
    return Report({"figure": rows}, restarts.faults, notes)


def roll(stage: Stage, plan: RollingPlan) -> Report:
    """Carry out a plan on a stage. Raises ZcprotoError for a server that does not start."""
    users, visitors = stage.add_users("staying", plan.clients), stage.add_users("visitor", VISITORS)
    seen = Restarts()
    with (
        stage.serve("sqlite") as server,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        arguments = (server.port, stage.ca_file, users, visitors, plan.rate, plan.visit_rate)
        found = runner.run(restart_often(stage, server, Helper(RollingClients, *arguments), plan, seen))
    seen.events = stage.log_events()
    seen.faults += [f"in the log: {each}" for each in seen.events if each.partition(": ")[2] in FAULTS]
    return report(plan, found, seen)


@measurement
@click.option("--restarts", type=COUNT, default=20, show_default=True, help="How many.")
@click.option("--rate", type=RATE, default=5_000.0, show_default=True, help="Requests a second.")
@click.option("--visit-rate", type=RATE, default=100.0, show_default=True, help="New connections a second.")
@click.option("--clients", type=COUNT, default=50, show_default=True, help="Those that stay.")
@click.option(
    "--interval", type=SECONDS, default=INTERVAL_S, show_default=True, help="Seconds between two restarts."
)
def command(restarts: int, rate: float, visit_rate: float, clients: int, interval: float) -> Report:
    connections = clients + ceil(visit_rate * VISIT_S)
    check_open_files(connections)
    settings = {"server.workers": WORKERS, "sessions.per_user": 1_000, **room_for(connections), **ECDSA_ONLY}
    with temporary_home() as home:
        return roll(Stage(home.path, settings), RollingPlan(restarts, rate, visit_rate, clients, interval))
