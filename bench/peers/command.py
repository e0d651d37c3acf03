"""The same echo over TLS 1.3 by zcproto and by others, side by side: the cost to each server.

grpcio's asyncio server, uvicorn (HTTP/1.1), websockets and uvloop are installed from PyPI into a virtual
environment in the user's cache, once. The fourth is asyncio's own streams on the loop of the standard library.

All serve one certificate (ECDSA P-256) from one processor and get requests from another, in short slices in
turn: 50 connections, one request in flight on each. A ratio is taken in each round; the table has the median.

CPU is that of the server's process, of all its threads, by the kernel's account. Memory is resident memory. The
servers do not do the same: the notes say what is in a figure and what is not.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, FOLDER, measurement, progress
from bench.peers.calls import COMPRESSING, OWN, PLAIN, Target, measure_calls, run_callers
from bench.peers.environment import Environment, default_folder
from bench.peers.measure import (
    CONNECTIONS,
    GRPC,
    NAMES,
    STREAMS,
    UVICORN,
    WEBSOCKETS,
    ZCPROTO,
    Figures,
    Plan,
    Servers,
    measure,
)
from bench.report import Report, Row
from zcproto.load.demo import temporary_home
from zcproto.load.plan import SPARE_FILES, require_open_files

MAX_PAYLOAD: Final = 16_000
"""Bytes: what fits into one frame of each protocol."""

MAX_HELD: Final = 20_000
"""From one address to one port there are about 28,000 connections."""

REQUEST: Final = "request_us"
ITEM: Final = "item_us"
CONNECT: Final = "connect_us"
MEMORY: Final = "memory_kib"
CALL_BARS: Final = {1: 0.90, 16: 0.40}
"""What a call may cost zcproto's client at most, by calls in flight, as a part of what it costs that of websockets
with its defaults."""

CALL_AIM: Final = 0.6
"""The aim for one call in flight."""

FIGURES: Final = {
    REQUEST: ("server CPU of a request, depth 1", "us"),
    ITEM: ("server CPU of an item of a stream", "us"),
    CONNECT: ("server CPU of a connection", "us"),
    MEMORY: ("server memory of a connection", "KiB"),
}
BARS: Final = {
    REQUEST: {GRPC: 0.13, UVICORN: 1 / 2, WEBSOCKETS: 3 / 5, STREAMS: 3 / 4},
    ITEM: {GRPC: 0.10},
    CONNECT: {},
    MEMORY: {STREAMS: 1 / 7, GRPC: 1.0, UVICORN: 1.0},
}
"""What zcproto may cost at most, as a part of what the other costs."""

NOTES: Final = {
    ZCPROTO: {
        REQUEST: "checks token, nonce, timestamp and limits, decodes and encodes params, counts requests",
        ITEM: "encodes a map with the payload and a number; one stream, whose client has room for all items",
        CONNECT: "with WELCOME and session.open: compares a key's digest, makes a session with two tokens",
        MEMORY: "each with a session of its own",
    },
    STREAMS: {
        REQUEST: "a length and bytes: no routing, no sessions, no limits but of size",
        CONNECT: "TLS and nothing else, with two session tickets, as the standard library sends them",
        MEMORY: "no sessions",
    },
    GRPC: {
        REQUEST: "HTTP/2 with headers, deadlines and flow control; bytes instead of protobuf, no interceptors",
        ITEM: "an async generator of bytes; windows of 1 GiB, so that flow control waits for nothing",
        CONNECT: "with the settings of HTTP/2; TLS is BoringSSL's, which chooses its own suite",
        MEMORY: "no sessions; its C core keeps memory of its own",
    },
    UVICORN: {
        REQUEST: "parses HTTP/1.1, calls an ASGI application; no framework, no access log, no cookies or tokens",
        CONNECT: "TLS and nothing else, with two session tickets",
        MEMORY: "no sessions",
    },
    WEBSOCKETS: {
        REQUEST: "masked binary messages; no compression, no pings by the clock, no sessions",
        CONNECT: "with the HTTP upgrade",
        MEMORY: "no sessions; compression, off here, would add to it",
    },
}
"""What is in the figure of a server, and what is not."""


def report(figures: Figures, plan: Plan, versions: dict[str, str]) -> Report:
    """Return all figures beside one another: a column for each server, ratios by round."""
    columns: dict[str, list[Row]] = {name: [] for name in NAMES}
    rounds = {REQUEST: figures.request_s, ITEM: figures.item_s, CONNECT: figures.connect_s}
    rounds |= (
        {MEMORY: {name: [kib] for name, kib in figures.memory_kib.items()}} if figures.memory_kib else {}
    )
    for figure, by_round in rounds.items():
        label, unit = FIGURES[figure]
        scale = 1.0 if figure == MEMORY else 1e6
        for name, rows in columns.items():
            if name not in by_round:
                continue
            rows.append(Row(figure, label, statistics.median(by_round[name]) * scale, unit))
            if name != ZCPROTO:
                ratios = [own / other for own, other in zip(by_round[ZCPROTO], by_round[name], strict=True)]
                key, bar = f"{figure}_ratio", BARS[figure].get(name)
                rows.append(Row(key, f"{label}: zcproto / it", statistics.median(ratios), below=bar))
    for depth, by_client in figures.call_us.items():
        label = f"client CPU of a call, {depth} in flight"
        own = by_client[OWN]
        columns[ZCPROTO].append(Row(f"call_{depth}_us", label, statistics.median(own), "us"))
        for name, suffix in ((COMPRESSING, ""), (PLAIN, ", no compression")):
            key, theirs = f"call_{depth}_us{'_plain' if suffix else ''}", by_client[name]
            ratio = statistics.median(mine / other for mine, other in zip(own, theirs, strict=True))
            bar = CALL_BARS.get(depth) if name == COMPRESSING else None
            aim = CALL_AIM if (name, depth) == (COMPRESSING, 1) else None
            columns[WEBSOCKETS] += [
                Row(key, label + suffix, statistics.median(theirs), "us"),
                Row(f"{key}_ratio", f"{label}{suffix}: zcproto / it", ratio, below=bar, aim=aim),
            ]
    notes = [
        f"echo of {plan.payload_bytes} bytes; {plan.held:,} connections held",
        *(
            f"{name}: {FIGURES[figure][0]}: {NOTES[name][figure]}"
            for figure in rounds
            for name in rounds[figure]
        ),
        "client CPU: each library's own client on uvloop; zcproto's with ids, deadlines and retries of calls;"
        " that of websockets without pings and timeouts, its answers matched by their order, with its default"
        " (compression) and without compression",
        *(
            ", ".join(f"{name} {value}" for name, value in words.items())
            for words in (versions, figures.suites)
        ),
    ]
    return Report(columns, notes=notes, details={"versions": versions, "suites": figures.suites})


@measurement
@click.option("--rounds", type=COUNT, default=7, show_default=True, help="In which a ratio is taken.")
@click.option("--requests", type=COUNT, default=5_000, show_default=True, help="In a round, to each server.")
@click.option("--connects", type=click.IntRange(1, 2_000), default=200, show_default=True, help="In a round.")
@click.option(
    "--connections",
    type=click.IntRange(0, MAX_HELD),
    default=10_000,
    show_default=True,
    help="Held to measure memory; 0: memory is not measured.",
)
@click.option("--payload", type=click.IntRange(1, MAX_PAYLOAD), default=64, show_default=True, help="Bytes.")
@click.option("--environment", type=FOLDER, help="A folder for the others instead of the user's cache.")
def command(
    rounds: int, requests: int, connects: int, connections: int, payload: int, environment: Path | None
) -> Report:
    plan = Plan(rounds, requests, connects, connections, payload)
    open_files = max(plan.held, len(NAMES) * (CONNECTIONS + plan.connects)) + SPARE_FILES
    require_open_files(open_files, plan.held, lambda limit: limit - SPARE_FILES)
    others = Environment(environment or default_folder())
    others.prepare(progress)
    with temporary_home() as home:
        servers = Servers(home.path, others, plan)
        figures = measure(servers, plan, progress)
        progress("calls by the clients of zcproto and websockets ...")
        with servers.run(ZCPROTO) as own, servers.run(WEBSOCKETS) as websockets:
            mine, theirs = (Target(each.port, servers.ca_file, payload) for each in (own, websockets))
            with run_callers(mine, theirs, servers.user, others, home.path) as callers:
                figures.call_us = measure_calls(callers, 2 * rounds)
    return report(figures, plan, {**others.versions(), "zcproto": importlib.metadata.version("zcproto")})
