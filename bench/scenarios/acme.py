"""Certificates of a CA that rejects half of the nonces and checks every name: the first, then renewals under load.

A server orders from pebble, Let's Encrypt's test server, by tls-alpn-01 on the port that it
serves. Clients that stay send requests all the time; new connections come, a few a second, and trust the CA alone
from the first certificate on. No connection may be lost, no request fail, and no pin change.

With --sleep pebble waits up to 15 seconds before each check, as it does by default: --interval 30 leaves time.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import click

from bench import pebble
from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.pebble import AT_ONCE, CHAOS, Pebble
from bench.report import Report, Row
from bench.scenarios.harness import ask_control, load_faults, load_rows, run_load_beside, until
from bench.server_process import free_port
from bench.stage import ECDSA_ONLY, HOST, Server, Stage, check_open_files, room_for
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.caller import Operator
from zcproto.load.demo import temporary_home
from zcproto.load.result import Result
from zcproto.tls.context import client_context
from zcproto.wire.frame import HEADER_SIZE

NAMES: Final = ["zcp.example.com", HOST]
FIRST_S: Final = 60.0
"""Seconds in which the first certificate must be served."""

CONNECTION_S: Final = 10.0
TAIL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class AcmePlan:
    """One run."""

    renewals: int = 20
    interval_s: float = 6.0
    """Between the beginnings of two renewals."""
    connections: int = 200
    """Connections that stay, each with a session."""
    rate: float = 500.0
    """Requests a second, over all."""
    newcomers: float = 5.0
    """New connections a second."""
    workers: int = 1
    sleeps: bool = False
    """Whether pebble waits before it checks."""

    @property
    def seconds(self) -> float:
        """For how long the load runs."""
        return (self.renewals + 1) * self.interval_s + 2 * TAIL_S


@dataclass(slots=True)
class AcmeOutcome:
    """What was seen."""

    plan: AcmePlan
    load: Result | None = None
    first_s: float | None = None
    renewal_s: list[float] = field(default_factory=list)
    leaves: set[str] = field(default_factory=set)
    newcomers: int = 0
    failures: list[str] = field(default_factory=list)
    pins: set[str] = field(default_factory=set)

    def report(self) -> Report:
        assert self.load is not None
        longest = max(self.renewal_s, default=None)
        rows = [
            *load_rows(self.load),
            Row("first_s", "the first certificate is served after", self.first_s, "s", below=FIRST_S),
            Row("renewals", "renewals", len(self.renewal_s), equals=self.plan.renewals),
            Row("renewal_longest_s", "the longest renewal", longest, "s"),
            Row("certificates", "certificates that new connections saw", len(self.leaves)),
            Row("newcomers", "new connections", self.newcomers),
            Row("newcomers_failed", "of them failed", len(self.failures), equals=0),
            Row("pins", "pins that were served", len(self.pins), equals=1),
        ]
        # The figures of several workers are not of one moment, so that the counts of both sides differ.
        faults = load_faults(self.load) if self.plan.workers == 1 else []
        problems = [f"a new connection failed: {each}" for each in dict.fromkeys(self.failures)]
        return Report({"figure": rows}, [*faults, *problems], interrupted=self.load.interrupted)


async def arrive(port: int, context: ssl.SSLContext) -> str:
    """Connect like a client, and return the SHA-256 of the certificate in hex."""
    async with asyncio.timeout(CONNECTION_S):
        reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=NAMES[0])
        try:
            await reader.readexactly(HEADER_SIZE)  # of WELCOME: the server has taken the connection
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return hashlib.sha256(der).hexdigest()
        finally:
            writer.transport.abort()


class Orders:
    """Renewals and new connections beside a load."""

    def __init__(self, outcome: AcmeOutcome, server: Server, trusted: Path) -> None:
        self._outcome = outcome
        self._server = server
        self._context = client_context(ca_file=trusted)
        self._is_over = asyncio.Event()

    async def run(self, operator: Operator) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(self._renew())
            both.create_task(self._let_newcomers_come())

    async def _renew(self) -> None:
        outcome, start = self._outcome, time.monotonic()
        try:
            for number in range(1, outcome.plan.renewals + 1):
                await asyncio.sleep(start + (number - 1) * outcome.plan.interval_s - time.monotonic())
                began = time.monotonic()
                status, answer = await asyncio.to_thread(
                    ask_control, self._server.stage.home, "POST", "certificates/renew"
                )
                if status != HTTPStatus.OK:
                    outcome.failures.append(f"renewal {number}: {answer}")
                    continue
                outcome.renewal_s.append(time.monotonic() - began)
                outcome.pins.update(each["pin"] for each in answer["certificates"])
                progress(f"renewal {number:,} of {outcome.plan.renewals:,}: {outcome.renewal_s[-1]:.1f} s")
        finally:
            await asyncio.sleep(TAIL_S)
            self._is_over.set()

    async def _let_newcomers_come(self) -> None:
        async with asyncio.TaskGroup() as coming:
            while not self._is_over.is_set():
                coming.create_task(self._come())
                with suppress(TimeoutError):
                    async with asyncio.timeout(1 / self._outcome.plan.newcomers):
                        await self._is_over.wait()

    async def _come(self) -> None:
        self._outcome.newcomers += 1
        try:
            self._outcome.leaves.add(await arrive(self._server.port, self._context))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._outcome.failures.append(str(error) or type(error).__name__)


def order_under_load(folder: Path, plan: AcmePlan) -> AcmeOutcome:
    """Carry out a plan in this folder. Raises ConfigError for what cannot be measured."""
    if not pebble.is_installed():
        raise ConfigError(["pebble is not installed; on Debian: apt install pebble"])
    port = free_port()
    chaos = CHAOS if plan.sleeps else CHAOS | AT_ONCE
    outcome = AcmeOutcome(plan)
    with Pebble(folder / "pebble", tls_port=port, http_port=free_port(), chaos=chaos) as ca:
        settings: dict[str, Any] = {
            **room_for(plan.connections),
            **ECDSA_ONLY,
            **ca.settings(),
            "certificates.names": NAMES,
            "server.workers": plan.workers,
        }
        stage = Stage(folder / "home", settings)
        users = stage.add_users_for("load", plan.connections)
        trusted = folder / "root.pem"
        trusted.write_bytes(ca.root())
        began = time.monotonic()
        with stage.serve(store="sqlite", port=port) as server:
            if asyncio.run(until(lambda: is_served(port, trusted), FIRST_S)):
                outcome.first_s = time.monotonic() - began
                progress(f"the first certificate is served after {outcome.first_s:.1f} s")
            _, listed = ask_control(stage.home, "GET", "certificates")
            outcome.pins.update(listed["pins"])
            # The other workers may still serve the certificate before it, for a moment.
            stage.ca_file = folder / "both.pem"
            stage.ca_file.write_bytes(ca.root() + (stage.home.certs / "ca.crt").read_bytes())
            load = server.load(users, plan.connections, plan.rate, plan.seconds)
            orders = Orders(outcome, server, trusted)
            outcome.load = run_load_beside(load, orders.run)
    return outcome


async def is_served(port: int, trusted: Path) -> bool:
    """Return whether a client that trusts the CA alone can connect."""
    try:
        await arrive(port, client_context(ca_file=trusted))
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ZcprotoError):
        return False
    return True


@measurement
@click.option("--renewals", type=COUNT, default=20, show_default=True, help="How many.")
@click.option("--interval", type=SECONDS, default=6.0, show_default=True, help="Seconds between two.")
@click.option("--connections", type=COUNT, default=200, show_default=True, help="That stay.")
@click.option("--rate", type=RATE, default=500.0, show_default=True, help="Requests a second, over all.")
@click.option("--newcomers", type=RATE, default=5.0, show_default=True, help="New connections a second.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Processes of the server.")
@click.option("--sleep", "sleeps", is_flag=True, help="Let the CA wait before it checks.")
def command(
    renewals: int,
    interval: float,
    connections: int,
    rate: float,
    newcomers: float,
    workers: int,
    sleeps: bool,
) -> Report:
    check_open_files(connections)
    with temporary_home() as home:
        return order_under_load(
            home.path, AcmePlan(renewals, interval, connections, rate, newcomers, workers, sleeps)
        ).report()
