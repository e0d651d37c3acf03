"""All curves in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console

from bench.curves import tokens
from bench.curves.curve import Curve, Series
from bench.curves.echoes import BIG_FRAMES, ECHO_CONNECTIONS, Cost, echo_cost, requests_of, sessions_on
from bench.curves.sizes import Sizes
from bench.curves.watch import Watched, load_new_server
from bench.stage import CLIENT_CPU, Stages
from zcproto.common.process import raise_file_limit
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.demo import SERVER_SPARE, temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.processes import on_processor
from zcproto.load.result import Verdict

ROUND_TO: Final = 500
SMALL_PAYLOAD: Final = 64
MIB: Final = 1024 * 1024


@dataclass(slots=True)
class Grown:
    """All curves of a run, and why others are missing."""

    curves: list[Curve] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether every curve was measured."""
        return bool(self.curves) and not self.failed


def run_curves(sizes: Sizes, console: Console, only: Sequence[str] = ()) -> Grown:
    """Measure all curves, or those with these keys. Raises ConfigError for other keys."""
    grown, started = Grown(), time.monotonic()
    with temporary_home() as home:
        stages = Stages(home.path)
        steps: dict[str, Callable[[], Curve]] = {
            "sessions": lambda: by_sessions(sizes, console),
            "payload": lambda: by_payload(stages, sizes, console),
            "depth": lambda: by_depth(stages, sizes, console),
            "connections": lambda: by_connections(stages, sizes, console),
        }
        unknown = sorted(set(only) - set(steps))
        if unknown:
            raise ConfigError([f"no such curve: {', '.join(unknown)}; there are {', '.join(steps)}"])
        for key, step in steps.items():
            if only and key not in only:
                continue
            _say(console, f"curve: {key} ...")
            try:
                grown.curves.append(step())
            except (ZcprotoError, OSError) as error:
                grown.failed[key] = f"{type(error).__name__}: {error}"
                _say(console, f"    could not be measured: {grown.failed[key]}")
    grown.seconds = time.monotonic() - started
    return grown


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# --- by live sessions ---------------------------------------------------------------------------------------


def by_sessions(sizes: Sizes, console: Console) -> Curve:
    points = []
    for count in sizes.sessions:
        points.append(tokens.in_a_process(count, sizes.checks))
        _say(
            console, f"    {count:,} sessions: {points[-1].check_us:.2f} us, {points[-1].bytes / MIB:.1f} MiB"
        )
    return Curve(
        "sessions",
        "Token check, by live sessions",
        "session",
        "sessions",
        sizes.sessions,
        (
            Series("a check, p50", "us", tuple(each.check_us for each in points)),
            Series("a check, p99", "us", tuple(each.p99_us for each in points)),
            Series("memory", "KiB", tuple(each.bytes / 1024 for each in points)),
        ),
        f"{sizes.checks:,} checks in random order in a process of its own, each with the median of three times",
    )


# --- by payload and by depth --------------------------------------------------------------------------------


def by_payload(stages: Stages, sizes: Sizes, console: Console) -> Curve:
    points = [(payload, 1, requests_of(payload, sizes.requests)) for payload in sizes.payloads]
    costs = _echoes(stages, "payload", points, console)
    return Curve(
        "payload",
        "One request, by its payload",
        "byte",
        "bytes",
        sizes.payloads,
        (
            Series("server CPU", "us", tuple(cost.cpu_us for cost in costs)),
            Series("its client waits", "us", tuple(cost.wait_us for cost in costs)),
        ),
        f"the payload goes both ways; CPU by the scheduler's account of the server's process, with requests on"
        f" {ECHO_CONNECTIONS} connections at once; waits with one request at a time",
    )


def by_depth(stages: Stages, sizes: Sizes, console: Console) -> Curve:
    costs = _echoes(
        stages, "depth", [(SMALL_PAYLOAD, depth, sizes.requests) for depth in sizes.depths], console
    )
    return Curve(
        "depth",
        "One request, by how many go in one write",
        "request",
        "requests in one write",
        sizes.depths,
        (
            Series("server CPU", "us", tuple(cost.cpu_us for cost in costs)),
            Series("its client waits", "us", tuple(cost.wait_us for cost in costs)),
        ),
        f"{SMALL_PAYLOAD} bytes each; CPU with such writes on {ECHO_CONNECTIONS} connections at once; waits with"
        " one write at a time, by its requests",
        inverse=True,
    )


def _echoes(
    stages: Stages, name: str, points: Sequence[tuple[int, int, int]], console: Console
) -> list[Cost]:
    """Return the costs at points of payload, depth and requests, on one server."""
    stage = stages.new(f"curve-{name}", BIG_FRAMES)
    users, costs = stage.add_users_for("echo", ECHO_CONNECTIONS), []
    with stage.serve() as server, on_processor(CLIENT_CPU):
        connections = sessions_on(server, users)
        for payload, depth, requests in points:
            costs.append(cost := echo_cost(server.pid, connections, payload, depth, requests))
            _say(console, f"    {payload:,} bytes, {depth} in a write: {cost.cpu_us:.1f} us of server CPU")
        for connection in connections:
            connection.close()
    return costs


# --- by connections -----------------------------------------------------------------------------------------


def by_connections(stages: Stages, sizes: Sizes, console: Console) -> Curve:
    counts, note = fitting(sizes.connections, most_connections(max(sizes.connections)))
    runs = []
    for count in counts:
        _say(console, f"    {count:,} connections ...")
        folder, rates = (
            stages.folder / f"connections-{count}",
            (sizes.rate, sizes.load_s, sizes.arrival_rate),
        )
        watched = load_new_server(folder, count, *rates, stages.certificates)
        if watched.result.verdict is not Verdict.VERIFIED:
            raise ZcprotoError(f"{count:,} connections: {'; '.join(watched.result.reasons()[:2])}")
        runs.append(watched)
    return Curve(
        "connections",
        "Cost by connections, each with a session",
        "connection",
        "connections",
        counts,
        tuple(
            Series(name, unit, tuple(measure(each) for each in runs))
            for name, unit, measure in (
                ("server memory above its start", "KiB", _memory),
                ("server CPU to connect one, with its session", "ms", _connect_cpu),
                ("server CPU for a request", "us", _request_cpu),
                ("request, p50", "ms", lambda each: _latency(each, "p50")),
                ("request, p99", "ms", lambda each: _latency(each, "p99")),
            )
        ),
        f"a new server each; {sizes.rate:,.0f} requests a second over all of them for {sizes.load_s:g} s, in an"
        " open loop, every answer compared",
        notes=note,
    )


def most_connections(wanted: int) -> int:
    """Return how many of these connections the system allows a process."""
    return raise_file_limit(wanted + SERVER_SPARE) - SERVER_SPARE


def fitting(counts: Sequence[int], most: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the counts that fit, with the largest that fits in place of the others, and a note about it."""
    left = tuple(count for count in counts if count <= most)
    if len(left) == len(counts):
        return left, ()
    largest = most // ROUND_TO * ROUND_TO or most
    note = f"{largest:,} is the most that the limit of open files allows here"
    return (left if largest in left else (*left, largest)), (note,)


def _memory(watched: Watched) -> float:
    result = watched.result
    return (result.kib_per_connection or 0.0) * result.connected


def _connect_cpu(watched: Watched) -> float:
    result = watched.result
    return (result.connect_cpu_s or 0.0) / max(result.connected, 1) * 1000


def _request_cpu(watched: Watched) -> float:
    return watched.result.cpu_per_request_us or 0.0


def _latency(watched: Watched, percentile: str) -> float:
    return percentiles_ms(watched.result.record.latencies["request"]).get(percentile, 0.0)
