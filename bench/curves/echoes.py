"""The cost of a request: the server's CPU time by the kernel's account, and how long its client waits."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgpack

from bench.compare.client import Connection
from bench.stage import Server, cpu_seconds
from zcproto.load.plan import Credential

ROUNDS: Final = 3
"""Measurements of one point; the figure is the median of them."""

WARM_UP: Final = 10
"""One of so many requests is sent before, and not counted."""

WAITING: Final = 4
"""One of so many is timed at its client as well."""


LEAST_REQUESTS: Final = 20
ECHO_CONNECTIONS: Final = 20
BIG_FRAMES: Final = {"limits.max_frame_bytes": 4_194_304, "limits.connections_per_address": 0}


class Cost(NamedTuple):
    """The cost of one request, in microseconds."""

    cpu_us: float
    """CPU of the server's process, which does not sleep: requests wait on all connections."""
    wait_us: float
    """From a write to its last answer, divided by its requests, with one connection at a time: the median."""
    requests: int


def sessions_on(server: Server, users: Sequence[Credential]) -> list[Connection]:
    """Return a connection with a session for each."""
    context, connections = server.context(), []
    for user in users:
        connection = Connection(server.port, context)
        connection.open_session(*user)
        connections.append(connection)
    return connections


def requests_of(payload: int, most: int) -> int:
    """Return so many requests of this size that they take about as long as those of other sizes."""
    return max(LEAST_REQUESTS, most * 4_096 // max(4_096, payload))


def echo_cost(pid: int, connections: Sequence[Connection], payload: int, depth: int, requests: int) -> Cost:
    """Send requests of this size, `depth` in each write. Every answer is compared with what was sent."""
    params: dict[str, Any] = {"data": os.urandom(payload)}
    answer = msgpack.packb(params)
    turns = max(1, requests // (len(connections) * depth))
    _all_at_once(connections, params, answer, depth, max(1, turns // WARM_UP))
    costs = []
    for _ in range(ROUNDS):
        before = cpu_seconds(pid)
        _all_at_once(connections, params, answer, depth, turns)
        costs.append((cpu_seconds(pid) - before) / (turns * len(connections) * depth) * 1e6)
    waits = _one_by_one(connections, params, answer, depth, max(1, turns // WAITING))
    return Cost(statistics.median(costs), statistics.median(waits), ROUNDS * turns * len(connections) * depth)


def _all_at_once(
    connections: Sequence[Connection], params: dict[str, Any], answer: bytes, depth: int, turns: int
) -> None:
    for _ in range(turns):
        for connection in connections:
            connection.echo("echo", params, depth)
        for connection in connections:
            connection.check_echoes(answer, depth)


def _one_by_one(
    connections: Sequence[Connection], params: dict[str, Any], answer: bytes, depth: int, turns: int
) -> list[float]:
    """Return the microseconds for each write, divided by its requests."""
    waits = []
    for _ in range(turns):
        for connection in connections:
            begin = time.perf_counter()
            connection.echo("echo", params, depth)
            connection.check_echoes(answer, depth)
            waits.append((time.perf_counter() - begin) / depth * 1e6)
    return waits
