"""10,000 clients that reconnect at once, or a fifth of hostile ones: how do they affect everyone else?

Storm: so many clients with a session each lose their server, which is killed and started again. All come back
at once, and try until they are served. 50 others, connected before, send requests all the time. It is done
twice: with the default of `tls.max_handshakes`, which is held against the bars, and without a bound, to
compare.

Mix: of so many connections a fifth is hostile: slow (a byte a second), garbage, replay (a request sent twice),
deaf (never reads an answer), and all of them. The rest is honest and sends 500 requests a second in all; so it
does alone, to compare.

The server has one processor, its clients another. Latency counts from when a request was due.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from bench.command import RATE, SECONDS, measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.harness import FOREVER_S
from bench.scenarios.helper import Helper
from bench.scenarios.storm_clients import CameBack, Crowd, Honest, Hostile, Served
from bench.stage import ECDSA_ONLY, SERVER_CPU, Server, Stage, check_open_files, memory_bytes, room_for
from zcproto.common.process import new_event_loop
from zcproto.config import Config
from zcproto.errors import Code, ConfigError
from zcproto.load.demo import SERVER_SPARE, temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor
from zcproto.load.report import SATURATED_LAG_MS

ALL_SERVED_S: Final = 15.0
"""By when all of a crowd have to be served."""

HONEST_P99_MS: Final = 100.0
"""Latency of the clients that stay connected, at the 99th percentile."""

UNBOUNDED: Final = 65_536
"""Handshakes at once: the most that can be configured, and more than there are."""

NICENESS: Final = 3
"""Of crowds and hostile clients, so that the measured clients on the same processor come first."""

AFTER_S: Final = 0.5
"""Seconds of load after the last of a crowd was served."""

MIB: Final = 1 << 20
KINDS: Final = ("slow", "garbage", "replay", "deaf")
MIXES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("honest alone", ()),
    *((kind, (kind,)) for kind in KINDS),
    ("all kinds", KINDS),
)


@dataclass(frozen=True, slots=True)
class StormPlan:
    """One run. Rates are of all honest clients together."""

    clients: int = 10_000
    """Of a crowd; in a mix, honest and hostile together."""
    honest: int = 50
    """Clients connected before a crowd comes."""
    rate: float = 500.0
    rest_s: float = 5.0
    seconds: float = 10.0
    """Of each mix."""
    hostile_share: float = 0.2
    comes_back_s: float = 5.0
    """Until a disconnected hostile client is back."""
    within_s: float = 60.0
    """Seconds after which a crowd gives up."""

    @property
    def hostile(self) -> int:
        return round(self.clients * self.hostile_share)


@dataclass(slots=True)
class Storm:
    """A crowd that came back at once."""

    clients: int
    has_bars: bool
    at_rest: Served
    served: Served
    """Of the honest clients, while the crowd came back."""
    back: CameBack
    answered: int
    """Of the crowd, when each sent one more request."""
    memory_after: int
    memory_peak: int
    stats: Mapping[str, Any]

    def rows(self) -> list[Row]:
        def bar(value: float) -> float | None:
            return value if self.has_bars else None

        back, clients = self.back, self.clients
        times = sorted(back.served_s)
        all_served = len(times) == clients
        return [
            Row("served", "clients served", len(times), equals=bar(clients)),
            Row("all_served_s", "until all were", times[-1] if all_served else None, "s", below=bar(ALL_SERVED_S)),
            Row("half_served_s", "until half were", times[clients // 2] if all_served else None, "s"),
            Row("begun_s", "until all had begun to connect", back.begun_s, "s"),
            Row("crowd_cpu", "processor used by the crowd", back.cpu_share * 100, "%"),
            Row("verified", "of them answered once more", self.answered, equals=bar(clients)),
            Row("tries", "tries of a client", back.tries / clients),
            Row("wrong", "wrong answers", back.wrong, equals=0),
            *served_rows(self.served, bar(0), bar(HONEST_P99_MS)),
            Row("rest_p50_ms", "p50 of the honest before", percentiles_ms(self.at_rest.latency).get("p50"), "ms"),
            Row("rest_p99_ms", "p99 of the honest before", percentiles_ms(self.at_rest.latency).get("p99"), "ms"),
            *server_rows(self.stats, self.memory_peak),
            Row("memory_after_mib", "memory of the server, all connected", self.memory_after / MIB, "MiB"),
        ]  # fmt: skip


@dataclass(slots=True)
class Mix:
    """Honest connections among hostile ones of some kinds; of no kind to compare with."""

    kinds: tuple[str, ...]
    honest: int
    served: Served
    memory_peak: int
    stats: Mapping[str, Any]
    counts: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)

    def rows(self) -> list[Row]:
        counts, served = self.counts, self.served
        refused = self.stats["errors"].get(str(int(Code.REPLAYED)), 0)
        rows = [
            *served_rows(served, 0, HONEST_P99_MS),
            Row("honest_open", "connections of the honest", served.connections, equals=self.honest),
            *server_rows(self.stats, self.memory_peak),
            Row("connected", "hostile connections made", counts["connected"]),
            Row("disconnected", "of them disconnected", counts["disconnected"]),
        ]
        if "garbage" in self.kinds:
            rows.append(Row("tolerated", "garbage tolerated", counts["garbage_tolerated"], equals=0))
        if "replay" in self.kinds:
            rows.append(Row("replays", "replays refused", refused, equals=counts["replays_sent"]))
        return rows


def served_rows(served: Served, lost: float | None, p99_ms: float | None) -> list[Row]:
    found = percentiles_ms(served.latency)
    return [
        Row("honest_lost", "requests lost by the honest", served.sent - served.equal, equals=lost),
        Row("honest_p50_ms", "p50 of the honest", found.get("p50"), "ms"),
        Row("honest_p99_ms", "p99 of the honest", found.get("p99"), "ms", below=p99_ms),
        Row("lag_p99_ms", "p99 of how late they were sent", percentiles_ms(served.lag).get("p99"), "ms"),
    ]


def server_rows(stats: Mapping[str, Any], memory_peak: int) -> list[Row]:
    return [
        Row("pause_ms", "longest pause of the server's loop", stats["longest_pause_s"] * 1000, "ms"),
        Row("memory_peak_mib", "memory of the server, peak", memory_peak / MIB, "MiB"),
    ]


def report(found: Mapping[str, Storm | Mix]) -> Report:
    """Return all storms and mixes, by their names, as one report."""
    notes = list[str]()
    for name, each in found.items():
        causes = each.back.causes if isinstance(each, Storm) else each.causes
        notes += counted(f"{name}: connections that failed", causes)
        notes += counted(f"{name}: handshakes that failed at the server", each.stats["tls_failures"])
        notes += counted(f"{name}: honest requests that failed", each.served.failed)
    late = [
        name
        for name, each in found.items()
        if percentiles_ms(each.served.lag).get("p99", 0.0) > SATURATED_LAG_MS
    ]
    if late:
        notes.append(
            f"the clients themselves were late ({', '.join(late)}): this machine is too small or too busy to show "
            "the latency of the server alone"
        )
    details = {
        "served_s": {
            name: sorted(each.back.served_s) for name, each in found.items() if isinstance(each, Storm)
        },
        "counts": {name: each.counts for name, each in found.items() if isinstance(each, Mix)},
        "latency_ms": {name: percentiles_ms(each.served.latency) for name, each in found.items()},
    }
    return Report({name: each.rows() for name, each in found.items()}, notes=notes, details=details)


# --- carrying them out -------------------------------------------------------------------------------------


async def storms(plan: StormPlan, folder: Path) -> dict[str, Storm | Mix]:
    """Let a crowd lose its server, with the default of handshake admission and then without a bound."""
    stage = Stage(folder)
    crowd_users = stage.add_users_for("crowd", plan.clients)
    honest_users = stage.add_users_for("honest", 2 * plan.honest)
    default, found = Config().tls.max_handshakes, dict[str, Storm | Mix]()
    _configure(stage, plan, default)
    stage.make_certificates()
    async with Helper(Crowd, stage.ca_file, crowd_users, niceness=NICENESS) as crowd:
        with stage.serve("sqlite", SERVER_CPU) as server:  # sessions have to be there after the kill
            progress(f"{plan.clients:,} clients open a session each ...")
            await crowd.call("open", server.port)
            server.kill()
        for name, admission in (("with admission", default), ("without admission", UNBOUNDED)):
            progress(f"{name}: all come back at once ...")
            _configure(stage, plan, admission)
            users = honest_users[len(found) * plan.honest :][: plan.honest]
            with stage.serve("sqlite", SERVER_CPU) as server:
                found[name] = await _storm(plan, server, crowd, users, admission == default)
                server.kill()
    return found


def _configure(stage: Stage, plan: StormPlan, max_handshakes: int) -> None:
    room = room_for(plan.clients + plan.honest)
    stage.configure({"tls.max_handshakes": max_handshakes, **room, **ECDSA_ONLY})


async def _storm(
    plan: StormPlan, server: Server, crowd: Helper, users: Sequence[Credential], has_bars: bool
) -> Storm:
    async with Helper(Honest, server.port, server.stage.ca_file, users, plan.rate) as honest:
        await honest.call("open")
        at_rest = await honest.call("load", plan.rest_s)
        async with _loading(honest) as loaded:
            back = await crowd.call("come_back", server.port, plan.within_s)
            await asyncio.sleep(AFTER_S)
        answered = await crowd.call("check")
        memory, peak = memory_bytes(server.pid)
        stats = await server.stats()
    return Storm(plan.clients, has_bars, at_rest, loaded[0], back, answered, memory, peak, stats)


@asynccontextmanager
async def _loading(honest: Helper) -> AsyncIterator[list[Served]]:
    """Load while the body runs; then the list holds what became of the requests."""
    served: list[Served] = []
    load = asyncio.create_task(honest.call("load", FOREVER_S))
    try:
        yield served
        await honest.call("stop")
        served.append(await load)
    finally:
        load.cancel()
        await asyncio.wait({load})


async def mixes(plan: StormPlan, folder: Path) -> dict[str, Storm | Mix]:
    """Load by the honest alone, among hostile ones of each kind, then among all kinds."""
    stage = Stage(folder, {**room_for(plan.clients), **ECDSA_ONLY})
    honest_users = stage.add_users_for("honest", plan.clients - plan.hostile)
    hostile_users = stage.add_users_for("hostile", plan.hostile)
    stage.make_certificates()
    found = dict[str, Storm | Mix]()
    for name, kinds in MIXES:
        progress(f"a mix: {name} ...")
        with stage.serve() as server:
            found[name] = await _mix(plan, server, kinds, honest_users, hostile_users)
    return found


async def _mix(
    plan: StormPlan,
    server: Server,
    kinds: tuple[str, ...],
    honest_users: Sequence[Credential],
    hostile_users: Sequence[Credential],
) -> Mix:
    port, ca_file, counts, causes = server.port, server.stage.ca_file, Counter[str](), Counter[str]()
    async with Helper(Honest, port, ca_file, honest_users, plan.rate) as honest:
        await honest.call("open")
        if not kinds:
            served = await honest.call("load", plan.seconds)
        else:
            share = (port, ca_file, hostile_users, kinds, plan.comes_back_s)
            async with Helper(Hostile, *share, niceness=NICENESS) as hostile, _loading(honest) as loaded:
                # They come over a fifth of the time: all at once they would be a storm.
                await hostile.call("begin", plan.seconds / 5)
                await asyncio.sleep(plan.seconds * 4 / 5)
                counts, causes = await hostile.call("end")
            served = loaded[0]
        _, peak = memory_bytes(server.pid)
        stats = await server.stats()
    return Mix(kinds, len(honest_users), served, peak, stats, counts, causes)


@measurement
@click.option(
    "--clients",
    type=click.IntRange(10, 25_000),
    default=10_000,
    show_default=True,
    help="Of a crowd, and of a mix.",
)
@click.option(
    "--honest",
    type=click.IntRange(1, 1_000),
    default=50,
    show_default=True,
    help="Connected before a crowd comes.",
)
@click.option(
    "--rate", type=RATE, default=500.0, show_default=True, help="Requests a second of the honest, over all."
)
@click.option("--seconds", type=SECONDS, default=10.0, show_default=True, help="Of each mix.")
@click.option(
    "--comes-back",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="Seconds until a hostile client is back.",
)
@click.option("--only", type=click.Choice(["storm", "mix"]), help="One of them alone.")
def command(
    clients: int, honest: int, rate: float, seconds: float, comes_back: float, only: str | None
) -> Report:
    if not os.path.exists("/proc/self/status"):
        raise ConfigError(["storms need Linux: they read the server's memory from /proc"])
    check_open_files(clients, SERVER_SPARE + honest)
    plan = StormPlan(clients, honest, rate, seconds=seconds, comes_back_s=comes_back)
    found: dict[str, Storm | Mix] = {}
    with temporary_home() as home, on_processor(1), asyncio.Runner(loop_factory=new_event_loop) as runner:
        for name, conduct in (("storm", storms), ("mix", mixes)):
            if only in (None, name):
                found |= runner.run(conduct(plan, home.path / name))
    return report(found)
