"""Echoes of 1 MiB: CPU and page faults of each, and the server's memory after a burst.

A server whose allocator maps memory for every body, or returns it after each, has the kernel clear 256 pages again
for every copy of it. The faults show that directly, whatever the machine is busy with. In the burst all connections
wait in a method at once, so that their bodies are in memory together, and a few connect while they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any, Final

import click
import msgpack

from bench.command import COUNT, measurement
from bench.compare.client import ALPN, Connection, context_for
from bench.report import Row
from bench.stage import CLIENT_CPU, ECDSA_ONLY, Stage, cpu_seconds, memory_bytes
from zcproto.app.app import App
from zcproto.load.demo import temporary_home
from zcproto.load.plan import SESSIONS_PER_USER
from zcproto.load.processes import on_processor

PAYLOAD: Final = 1 << 20
MIB: Final = 1 << 20
SETTINGS: Final = {
    "limits.connections_per_address": 0,
    "limits.max_frame_bytes": 2 * PAYLOAD,
    "limits.partial_frame_bytes": 1 << 30,
    "limits.partial_frame_bytes_per_user": 1 << 30,
    **ECDSA_ONLY,
}
MAX_FAULTS: Final = 64
"""Page faults of one echo; a body that is copied to fresh pages once has 256."""

MAX_GROWTH: Final = 16.0
"""MiB that a server may be larger after a burst than before."""

NEWCOMERS: Final = 20
HELD_S: Final = 1.0
LONGEST_RETURN_S: Final = 10.0

app = App()


@app.method("echo")
def echo(**params: Any) -> dict[str, Any]:
    """Return the params."""
    return params


@app.method("hold")
async def hold(**params: Any) -> dict[str, Any]:
    """Return the params after a while."""
    await asyncio.sleep(HELD_S)
    return params


def page_faults(pid: int) -> int:
    """Return the page faults of a process that needed no disk."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def measure(folder: Path, requests: int, connections: int) -> list[Row]:
    stage = Stage(folder, SETTINGS)
    users = iter(stage.add_users_for("user", connections + -(-requests // connections) * NEWCOMERS))
    stage.make_certificates()
    params = {"data": os.urandom(PAYLOAD)}
    answer = msgpack.packb(params)
    with stage.serve(app="bench.micro.large_bodies:app") as server, contextlib.ExitStack() as stack:
        context = context_for(stage.ca_file, ALPN)

        def connect(count: int) -> list[Connection]:
            made = [Connection(server.port, context) for _ in range(count)]
            for connection in made:
                stack.callback(connection.close)
                connection.open_session(*next(users))
            return made

        def call(method: str, callers: list[Connection]) -> None:
            for connection in callers:
                connection.echo(method, params, 1)
            peaks.append(memory_bytes(server.pid)[0])
            if method == "hold":
                connect(NEWCOMERS)
            for connection in callers:
                connection.check_echoes(answer, 1)

        peaks, callers = list[int](), connect(connections)
        for _ in range(SESSIONS_PER_USER):
            call("echo", callers[:1])
        cpu, faults = cpu_seconds(server.pid), page_faults(server.pid)
        for _ in range(requests):
            call("echo", callers[:1])
        cpu, faults = cpu_seconds(server.pid) - cpu, page_faults(server.pid) - faults
        before = memory_bytes(server.pid)[0]
        for _ in range(-(-requests // connections)):
            call("hold", callers)
        begin, bound = time.monotonic(), before + MAX_GROWTH * MIB
        while memory_bytes(server.pid)[0] >= bound and time.monotonic() < begin + LONGEST_RETURN_S:
            time.sleep(0.1)
        after = memory_bytes(server.pid)[0]
    return [
        Row("cpu_us", "an echo, CPU", cpu * 1e6 / requests, "us"),
        Row("faults", "an echo, page faults", faults / requests, below=MAX_FAULTS),
        Row("peak_mb", "memory in a burst, above that before", (max(peaks) - before) / MIB, "MiB"),
        Row(
            "after_mb", "memory after it, above that before", (after - before) / MIB, "MiB", below=MAX_GROWTH
        ),
    ]


@measurement
@click.option(
    "--requests", type=COUNT, default=1_000, show_default=True, help="One by one, and in the burst."
)
@click.option("--connections", type=COUNT, default=100, show_default=True, help="Connections of the burst.")
def command(requests: int, connections: int) -> list[Row]:
    with temporary_home() as home, on_processor(CLIENT_CPU):
        return measure(home.path, requests, connections)
