"""The demonstration: temporary home and users, server, load, conclusion."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console

from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.common.roles import OPERATORS
from zcproto.load.command import Outputs, check_outputs, measure, run_and_report
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, require_open_files
from zcproto.load.processes import uninterrupted
from zcproto.load.record import RequestKind
from zcproto.load.result import Result, Verdict

ARRIVAL_RATE: Final = 450.0
"""Connections per second, at which both ends together use about half of two cores."""

CALIBRATING_SHARE: Final = 100
"""One of so many connections is opened first, as fast as the machine can."""

CALIBRATING_LEAST: Final = 20
CALIBRATING_RATE: Final = 20_000.0
CALIBRATING_SECONDS: Final = 0.25
USED_SHARE: Final = 0.5
"""How much of what the machine can do is asked of it, so that its other programs have room."""

PAYLOAD_BYTES: Final = 64
SERVER_SPARE: Final = 320
"""Open files of the server besides the load's connections, as `zcproto serve` requires, and the operator's."""

SPARE_CONNECTIONS: Final = 64
"""Connections that the server accepts besides those of the load."""

BARS: Final = {
    "handshake_p99_ms": 100.0,
    "pause_connecting_ms": 50.0,
    "memory_per_connection_kib": 38.0,
}
"""Promised maximums by the keys of figures. The report shows a miss; the exit code depends on correctness alone."""


@dataclass(frozen=True, slots=True)
class Demo:
    """The parameters of a demonstration."""

    connections: int
    rate: float
    seconds: float
    arrival_rate: float = ARRIVAL_RATE
    json: Path | None = None
    plot: Path | None = None
    html: Path | None = None


def run_demo(demo: Demo, console: Console) -> Result:
    """Run a demonstration. Raises ConfigError if the system does not allow so many connections."""
    require_open_files(demo.connections + SERVER_SPARE, demo.connections, lambda limit: limit - SERVER_SPARE)
    outputs = Outputs(json=demo.json, plot=demo.plot, html=demo.html, bars=BARS)
    check_outputs(outputs)
    started = time.monotonic()
    _print(
        console,
        "zcproto demo: creates users and certificates in a temporary folder, starts a server there, opens"
        f" {demo.connections:,} TLS 1.3 connections to it from another process, each with its own session, and"
        " checks every answer.",
    )
    with temporary_home() as home:
        operator, credentials = _make_users(home, demo.connections)
        _configure(home, demo.connections)
        _print(
            console,
            f"{len(credentials):,} users created; generating keys (RSA-4096 takes several seconds) ...",
        )
        with DemoServer(home.path) as server:
            _print(
                console,
                f"server listening at 127.0.0.1:{server.port} after {time.monotonic() - started:.1f} s",
            )
            plan = Plan(
                host="127.0.0.1",
                port=server.port,
                connections=demo.connections,
                sessions=demo.connections,
                rate=demo.rate,
                duration_s=demo.seconds,
                payload_bytes=PAYLOAD_BYTES,
                credentials=credentials,
                operator=operator,
                arrival_rate=demo.arrival_rate,
                ca_file=home.certs / "ca.crt",
            )
            result = run_and_report(fit(plan, console), outputs, console)
    _print(console, _conclusion(result, time.monotonic() - started))
    return result


def fit(plan: Plan, console: Console) -> Plan:
    """Return the plan with rates that the machine can hold, found with its first connections."""
    connections = plan.connections // CALIBRATING_SHARE
    if connections < CALIBRATING_LEAST:
        return plan
    trial = replace(
        plan,
        connections=connections,
        sessions=connections,
        arrival_rate=CALIBRATING_RATE,
        rate=CALIBRATING_RATE,
        duration_s=CALIBRATING_SECONDS,
    )
    result = measure(trial, Console(quiet=True))
    if result.verdict is not Verdict.VERIFIED:
        return plan  # its report shows why
    fitting = replace(
        plan,
        arrival_rate=min(plan.arrival_rate, USED_SHARE * result.connect_rate),
        rate=min(plan.rate, USED_SHARE * result.request_rate),
    )
    _print(
        console,
        f"this machine opens {result.connect_rate:,.0f} connections or answers {result.request_rate:,.0f} requests"
        f" per second; the load is {fitting.arrival_rate:,.0f} and {fitting.rate:,.0f}",
    )
    return fitting


@contextmanager
def temporary_home() -> Iterator[Home]:
    """Create a home folder of mode 0700 and delete it afterwards."""
    path: Path | None = None
    try:
        with uninterrupted():
            path = Path(tempfile.mkdtemp(prefix="zcproto-demo-"))
        yield Home(path)
    finally:
        if path is not None:
            with uninterrupted():
                shutil.rmtree(path)


def _make_users(home: Home, connections: int) -> tuple[Credential, tuple[Credential, ...]]:
    users = UserFile(home.users)
    operator = Credential("operator", users.add("operator", OPERATORS))
    names = [f"load-{number}" for number in range(1, -(-connections // SESSIONS_PER_USER) + 1)]
    return operator, tuple(Credential(*each) for each in users.add_many(names))


def _configure(home: Home, connections: int) -> None:
    home.config.write_text(
        "[limits]\n"
        f"max_connections = {connections + SPARE_CONNECTIONS}\n"
        "connections_per_address = 0    # all connections come from one address\n\n"
        "[log]\n"
        f'file = "{home.path / "server.log"}"\n',
        encoding="utf-8",
    )
    home.config.chmod(0o600)


def _conclusion(result: Result, seconds: float) -> str:
    end = f"The server is stopped and its folder deleted; total time {seconds:.0f} s."
    if result.verdict is Verdict.VERIFIED:
        answers = (
            result.record.tallies[RequestKind.LOAD].equal + result.record.tallies[RequestKind.LAST].equal
        )
        return (
            f"Proven: {result.verified_connections:,} TLS 1.3 connections were open at once on one server process,"
            f" each with its own session; all {answers:,} answers were correct, and the counts of both sides agree."
            f" {end}"
        )
    if result.verdict is Verdict.INTERRUPTED:
        return f"Interrupted, so nothing is proven. {end}"
    return f"Not proven: {'; '.join(result.reasons())}. {end}"


def _print(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
