"""The demonstration from its first sentence to its last."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.load.command import Outputs, check_outputs, run_and_report
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, require_open_files
from zcproto.load.processes import uninterrupted
from zcproto.load.result import Result, Verdict
from zcproto.load.tally import Kind

ARRIVAL_RATE: Final = 450.0
"""Connections a second: both ends together then use about half of two cores, and who else is there finds room."""

PAYLOAD_BYTES: Final = 64
SERVER_SPARE: Final = 320
"""Open files of the server beside the load's connections: what `zcproto serve` asks for, and the operator's."""

SPARE_CONNECTIONS: Final = 64
"""Connections that the server takes beyond those of the load."""

BARS: Final = {
    "handshake_p99_ms": 100.0,
    "pause_connecting_ms": 50.0,
    "memory_per_connection_kib": 38.0,
}
"""What is promised, by the keys of the figures. Missing one is told; the exit code is about correctness."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What is to be demonstrated."""

    connections: int
    rate: float
    seconds: float
    arrival_rate: float = ARRIVAL_RATE
    json: Path | None = None
    plot: Path | None = None


def run_demo(demo: Demo, console: Console) -> Result:
    """Show it all. Raises ConfigError if the system does not allow so many connections."""
    require_open_files(demo.connections + SERVER_SPARE, demo.connections, lambda limit: limit - SERVER_SPARE)
    outputs = Outputs(json=demo.json, plot=demo.plot, bars=BARS)
    check_outputs(outputs)
    started = time.monotonic()
    _say(
        console,
        "zcproto demo: makes users and certificates in a temporary folder, starts a server on them, opens "
        f"{demo.connections:,} TLS 1.3 connections to it from another process, each with a session, and checks "
        "every answer.",
    )
    with temporary_home() as home:
        operator, credentials = _make_users(home, demo.connections)
        _configure(home, demo.connections)
        _say(console, f"{len(credentials):,} users made; making keys (RSA-4096 takes some seconds) ...")
        with DemoServer(home.path) as server:
            _say(console, f"server is up at 127.0.0.1:{server.port} after {time.monotonic() - started:.1f} s")
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
            result = run_and_report(plan, outputs, console)
    _say(console, _conclusion(result, time.monotonic() - started))
    return result


@contextmanager
def temporary_home() -> Iterator[Home]:
    """A home folder of mode 0700, gone afterwards."""
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
    operator = Credential("operator", users.add("operator", operator=True))
    names = [f"load-{number}" for number in range(1, -(-connections // SESSIONS_PER_USER) + 1)]
    return operator, tuple(Credential(*each) for each in users.add_many(names))


def _configure(home: Home, connections: int) -> None:
    home.config.write_text(
        "[limits]\n"
        f"max_connections = {connections + SPARE_CONNECTIONS}\n"
        "connections_per_address = 0    # all come from one\n\n"
        "[log]\n"
        f'file = "{home.path / "server.log"}"\n',
        encoding="utf-8",
    )
    home.config.chmod(0o600)


def _conclusion(result: Result, seconds: float) -> str:
    end = f"Server and folder are gone; all took {seconds:.0f} s."
    if result.verdict is Verdict.VERIFIED:
        answers = result.record.tallies[Kind.LOAD].equal + result.record.tallies[Kind.LAST].equal
        return (
            f"Proven: {result.verified_connections:,} TLS 1.3 connections were open at once on one server process, "
            f"each with a session of its own; all {answers:,} answers were equal to what had been sent, and both "
            f"sides counted the same. {end}"
        )
    if result.verdict is Verdict.INTERRUPTED:
        return f"Broken off, so nothing is proven. {end}"
    return f"Not proven: {'; '.join(result.reasons())}. {end}"


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
