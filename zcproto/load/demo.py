"""`zcproto demo`: a temporary server, many verified connections, and nothing left afterwards.

The server is a separate process, demo_child.py, which never outlives its parent.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

import click

from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.common.roles import OPERATORS
from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError
from zcproto.load.command import Outputs, check_outputs, measure, run_and_report
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, require_open_files
from zcproto.load.processes import module_command, module_environment, uninterrupted
from zcproto.load.record import RequestKind
from zcproto.load.result import Result, Verdict

READY: Final = "zcproto: listening on "
START_TIMEOUT: Final = 90.0
"""Seconds until it listens. The time to generate an RSA-4096 key is random and depends on the machine."""

IN_MEMORY: Final = {"ZCPROTO_STORE__URL": "memory"}
"""Measure the server and not a disk, unless the caller's environment sets a store."""

END_TIMEOUT: Final = 15.0
LINES_SHOWN: Final = 5


class DemoServer:
    """`zcproto serve` in a home folder, as a context manager. It listens on `port` of 127.0.0.1; 0 is any free one.

    `store` is the URL of its session store, by default that of the environment, or else memory. `app` is a
    MODULE:APP, by default the built-in one. It can be started again after it has ended.
    """

    def __init__(self, home: Path, store: str | None = None, app: str | None = None, port: int = 0) -> None:
        self._arguments = [str(home), "--port", str(port), *(() if app is None else (app,))]
        self._store = {} if store is None else {"ZCPROTO_STORE__URL": store}
        self._errors = home / "server.err"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        try:
            with uninterrupted(), self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    module_command("zcproto.load.demo_child", *self._arguments),
                    stdin=subprocess.PIPE,  # closed when this process ends, which ends the child
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**IN_MEMORY, **module_environment(), **self._store},
                    start_new_session=True,  # Ctrl-C must not stop the server before the report
                )
            self.port = self._wait_ready(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the process without a drain."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT
        output = b""
        while not output.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise ZcprotoError(
                    f"the server was not ready within {START_TIMEOUT:.0f} s; try again on a less busy machine"
                )
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                raise ZcprotoError(f"the server did not start: {self._last_lines()}")
            output += data
        first = output.decode(errors="replace").splitlines()[0]
        if not first.startswith(READY):
            raise ZcprotoError(f"the server printed {escape_text(first, 200)!r} instead of its address")
        return int(first.rpartition(":")[2])

    def _last_lines(self) -> str:
        lines = self._errors.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return " / ".join(escape_text(line, 500) for line in lines) or "it printed no error"

    def _end(self) -> None:
        """Drain the server, or kill it after END_TIMEOUT."""
        process = self._process
        if process is None:  # it could not be started
            return
        with uninterrupted():
            process.terminate()
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


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


def run_demo(demo: Demo, out: TextIO) -> Result:
    """Run a demonstration. Raises ConfigError if the system does not allow so many connections."""
    require_open_files(demo.connections + SERVER_SPARE, demo.connections, lambda limit: limit - SERVER_SPARE)
    outputs = Outputs(json=demo.json, plot=demo.plot, html=demo.html, bars=BARS)
    check_outputs(outputs)
    started = time.monotonic()
    click.echo(
        "zcproto demo: creates users and certificates in a temporary folder, starts a server there, opens"
        f" {demo.connections:,} TLS 1.3 connections to it from another process, each with its own session, and"
        " checks every answer.",
        out,
    )
    try:
        result = _measured(demo, outputs, out, started)
    except KeyboardInterrupt:
        click.echo(f"Interrupted, so nothing is proven. {_end(time.monotonic() - started)}", out)
        raise
    click.echo(conclusion(result, time.monotonic() - started), out)
    return result


def _measured(demo: Demo, outputs: Outputs, out: TextIO, started: float) -> Result:
    with temporary_home() as home:
        operator, credentials = _make_users(home, demo.connections)
        _configure(home, demo.connections)
        click.echo(
            f"{len(credentials):,} users created; generating keys (RSA-4096 takes several seconds) ...",
            out,
        )
        with DemoServer(home.path) as server:
            click.echo(
                f"server listening at 127.0.0.1:{server.port} after {time.monotonic() - started:.1f} s",
                out,
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
            return run_and_report(fit(plan, out), outputs, out, keeps_part=False)


def fit(plan: Plan, out: TextIO) -> Plan:
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
    result = measure(trial, io.StringIO(), keeps_part=False)
    if result.verdict is not Verdict.VERIFIED:
        return plan  # its report shows why
    fitting = replace(
        plan,
        arrival_rate=min(plan.arrival_rate, USED_SHARE * result.connect_rate),
        rate=min(plan.rate, USED_SHARE * result.request_rate),
    )
    click.echo(
        f"this machine opens {result.connect_rate:,.0f} connections or answers {result.request_rate:,.0f} requests"
        f" per second; the load is {fitting.arrival_rate:,.0f} and {fitting.rate:,.0f}",
        out,
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


def conclusion(result: Result, seconds: float) -> str:
    end = _end(seconds)
    if result.verdict is Verdict.VERIFIED:
        answers = (
            result.record.tallies[RequestKind.LOAD].equal + result.record.tallies[RequestKind.LAST].equal
        )
        return (
            f"Proven: {result.verified_connections:,} TLS 1.3 connections were open at once on one server process,"
            f" each with its own session; all {answers:,} answers were correct, and the counts of both sides agree."
            f" {end}"
        )
    return f"Not proven: {'; '.join(result.reasons())}. {end}"


def _end(seconds: float) -> str:
    return f"The server is stopped and its folder deleted; total time {seconds:.0f} s."
