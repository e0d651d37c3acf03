"""What a request costs the server, beside the bare yardstick: CPU time in one run, in turn on the same core.

    python -m bench.compare [--rounds 7] [--json FILE] [--floor]

The bare server (bare_server.py) does the least that a Python server of these frames can do, and checks
almost nothing. The ratio says what the checks, sessions, limits, dispatch and metrics of zcproto cost. Both
servers serve the same ECDSA P-256 certificate on uvloop. CPU time is the kernel's, of the server process alone.
Both have their turns in slices of some tens of milliseconds. A ratio is that of a slice to the one right after it;
told are the median of all pairs, and between what the middle half of them lies: what disturbs the machine for a
moment is in few pairs, and what disturbs it for longer is in both sides of each.
With `--floor` a server in C (floor.c), which checks nothing at all, stands beside it, too: that is TLS and system
calls. It takes a C compiler and OpenSSL's headers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack

from bench.compare.client import Connection, context_for
from zcproto.errors import ZcprotoError

CONNECTIONS: Final = 50
SESSIONS_PER_USER: Final = 5
USERS: Final = 10_000
PARAMS: Final = {"data": b"x" * 64}
ANSWER: Final = msgpack.packb(PARAMS)
SERVER_CPU: Final = 0
CLIENT_CPU: Final = 1


SLICE: Final = 2_000
"""Requests to one server before the other has its turn: some tens of milliseconds."""

CONNECTED: Final = 50
"""Connections in a slice."""

FIRST_PORT: Final = 20_000
PORTS: Final = 5_000
"""Each yardstick takes one of so many, by the id of this process. The system gives away higher ones."""


class Bar(NamedTuple):
    """One comparison: its figure must not exceed `limit`."""

    name: str
    limit: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each comparison is made")
    parser.add_argument("--requests", type=int, default=20_000, help="requests to each server in a round")
    parser.add_argument(
        "--connects", type=int, default=2_000, help="connections to each server in a round of connecting"
    )
    parser.add_argument("--floor", action="store_true", help="set a server in C beside it, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) > CLIENT_CPU:
        os.sched_setaffinity(0, {CLIENT_CPU})
    try:
        with tempfile.TemporaryDirectory(prefix="zcproto-compare-") as folder:
            rows = compare(
                Path(folder), arguments.rounds, arguments.requests, arguments.connects, arguments.floor
            )
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["ratio"] <= row["bar"] for row in rows) else 1


def compare(
    folder: Path, rounds: int, requests: int, connects: int, with_floor: bool = False
) -> list[dict[str, Any]]:
    """The rows of the table. Raises ZcprotoError if a server does not do as it must, or cannot be made."""
    keys = make_home(folder)
    rows = []
    with (
        run_zcproto(folder) as (ours_pid, ours_port),
        run_bare(folder) as (bare_pid, bare_port),
        run_floor(folder) if with_floor else contextlib.nullcontext((0, 0)) as (floor_pid, floor_port),
    ):
        context = context_for(str(folder / "certs" / "ca.crt"))

        users = iter(enumerate(keys, 1))

        def connect_ours(count: int) -> list[Connection]:
            connections = []
            for number in range(count):
                if number % SESSIONS_PER_USER == 0:
                    user, key = next(users)
                connection = Connection(ours_port, context)
                connection.open_session(f"user-{user}", key)
                connections.append(connection)
            return connections

        def connect_bare(count: int, port: int = bare_port) -> list[Connection]:
            connections = [Connection(port, context) for _ in range(count)]
            for connection in connections:
                connection.token = b"k" * 32
            return connections

        ours, bare = connect_ours(CONNECTIONS), connect_bare(CONNECTIONS)
        floor = connect_bare(CONNECTIONS, floor_port) if with_floor else []

        def cost(pid: int, connections: list[Connection], method: str, depth: int) -> float:
            """Make a slice of requests; its server's CPU time for each, in microseconds."""
            turns = max(1, SLICE // (len(connections) * depth))
            before = cpu_seconds(pid)
            for _ in range(turns):
                for connection in connections:
                    connection.echo(method, PARAMS, depth)
                for connection in connections:
                    connection.check_echoes(ANSWER, depth)
            return (cpu_seconds(pid) - before) * 1e6 / (turns * len(connections) * depth)

        cases: list[tuple[Bar, Callable[[], float], Callable[[], float]]] = [
            (
                Bar("CPU per request, depth 1, sync / bare", 1.3),
                lambda: cost(ours_pid, ours, "echo", 1),
                lambda: cost(bare_pid, bare, "echo", 1),
            ),
            (
                Bar("CPU per request, depth 16, sync / bare", 1.6),
                lambda: cost(ours_pid, ours, "echo", 16),
                lambda: cost(bare_pid, bare, "echo", 16),
            ),
            (
                Bar("CPU per request, depth 1, async / sync", 1.15),
                lambda: cost(ours_pid, ours, "echo_async", 1),
                lambda: cost(ours_pid, ours, "echo", 1),
            ),
        ]
        if with_floor:
            cases.append(
                (
                    Bar("CPU per request, depth 1, sync / floor in C", 4.0),
                    lambda: cost(ours_pid, ours, "echo", 1),
                    lambda: cost(floor_pid, floor, "echo", 1),
                )
            )
        for bar, measured, reference in cases:
            for warmed_up in (measured, reference):
                warmed_up()
            rows.append(row(bar, "us", in_turn(measured, reference, rounds * max(1, requests // SLICE))))
        for connection in ours + bare + floor:
            connection.close()

        def connect_cost(pid: int, connect: Callable[[int], list[Connection]]) -> float:
            """Make a slice of connections; its server's CPU time for 10,000 of them, in seconds."""
            before = cpu_seconds(pid)
            opened.extend(connect(CONNECTED))
            return (cpu_seconds(pid) - before) * 10_000 / CONNECTED

        opened: list[Connection] = []
        found: list[tuple[float, float]] = []
        for _ in range(max(3, rounds // 2)):
            found += in_turn(
                lambda: connect_cost(ours_pid, connect_ours),
                lambda: connect_cost(bare_pid, connect_bare),
                max(1, connects // CONNECTED),
            )
            for connection in opened:
                connection.close()
            opened.clear()
            time.sleep(0.5)  # the servers' ends of them must be gone before the next count
        rows.append(row(Bar("CPU to connect 10,000, with sessions / bare", 1.6), "s", found))
    return rows


def in_turn(
    first: Callable[[], float], second: Callable[[], float], slices: int
) -> list[tuple[float, float]]:
    """What slices of both cost, in pairs of neighbours: what disturbs the machine disturbs both."""
    return [(first(), second()) for _ in range(slices)]


def row(bar: Bar, unit: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = sorted(ours / reference for ours, reference in pairs)
    return {
        "name": bar.name,
        "unit": unit,
        "measured": statistics.median(ours for ours, _ in pairs),
        "reference": statistics.median(reference for _, reference in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "pairs": len(pairs),
        "bar": bar.limit,
    }


def show(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  {'measured':>10} {'reference':>10}  {'ratio':>5}  {'middle half':>11}  {'bar':>5}")
    for row in rows:
        verdict = "pass" if row["ratio"] <= row["bar"] else "FAIL"
        figures = f"{row['measured']:>7.2f} {row['unit']:>2} {row['reference']:>7.2f} {row['unit']:>2}"
        ratios = f"{row['ratio']:>5.2f}  {row['ratio_low']:.2f}..{row['ratio_high']:.2f}"
        print(f"{row['name']:{width}}  {figures}  {ratios}    {row['bar']:>5.2f}  {verdict}")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads, in seconds, from the scheduler's own account."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def make_home(folder: Path) -> list[str]:
    """Users, and the keys of them in order."""
    keys = folder / "keys.tsv"
    zcproto(folder, "user", "add", "user", "--count", str(USERS), "--keys-out", str(keys))
    (folder / "config.toml").write_text(
        "[limits]\nconnections_per_address = 0\n[certificates]\nkey_types = ['ecdsa-p256']\n"
        "[store]\nurl = 'memory'\n"
    )
    return [line.split("\t")[1] for line in keys.read_text().splitlines()]


def zcproto(home: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "zcproto", "--home", str(home), *words], check=True)


@contextlib.contextmanager
def run_zcproto(home: Path) -> Iterator[tuple[int, int]]:
    command = [
        sys.executable,
        "-m",
        "zcproto",
        "--home",
        str(home),
        "serve",
        "bench.compare.app:app",
        "--port",
        "0",
    ]
    with running(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        if "listening on" not in line:
            raise SystemExit(f"zcproto serve did not start: {line}")
        yield server.pid, int(line.rpartition(":")[2])


@contextlib.contextmanager
def run_bare(home: Path) -> Iterator[tuple[int, int]]:
    script = Path(__file__).parent / "bare_server.py"
    port = FIRST_PORT + os.getpid() % PORTS
    with _yardstick(
        home, port, lambda pem: [sys.executable, str(script), str(port), pem, "uvloop"]
    ) as server:
        yield server


@contextlib.contextmanager
def run_floor(home: Path) -> Iterator[tuple[int, int]]:
    program, source = home / "floor", Path(__file__).parent / "floor.c"
    command = ["cc", "-O2", "-o", str(program), str(source), "-lssl", "-lcrypto"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ZcprotoError(
            "floor.c cannot be compiled; it takes a C compiler and OpenSSL's headers, on Debian: "
            "apt-get install gcc libc6-dev libssl-dev"
        ) from error
    port = FIRST_PORT + PORTS + os.getpid() % PORTS
    with _yardstick(home, port, lambda pem: [str(program), str(port), pem]) as server:
        yield server


@contextlib.contextmanager
def _yardstick(home: Path, port: int, command: Callable[[str], list[str]]) -> Iterator[tuple[int, int]]:
    """A server that takes a port, and certificate and key in one file; it is there when it can be connected to."""
    pem = home / f"{port}.pem"
    with open(pem, "wb") as out:
        for name in ("server-ecdsa.crt", "server-ecdsa.key"):
            with open(home / "certs" / name, "rb") as part:
                shutil.copyfileobj(part, out)
    with running(command(str(pem))) as server:
        context = context_for(str(home / "certs" / "ca.crt"))
        for _ in range(100):
            try:
                Connection(port, context).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield server.pid, port


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server process on its own core, ended at the end whatever happens."""
    process = subprocess.Popen(command, **options)
    try:
        if len(os.sched_getaffinity(process.pid)) or CLIENT_CPU:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(process.pid, {SERVER_CPU})
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
