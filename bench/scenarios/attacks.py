"""A server under attack: what do the others notice?

\b
silence    one address opens 100 connections a second, 1,000 at a time, and sends nothing, half a ClientHello, or
           half a PROXY header
flood      four addresses connect as fast as they can, and send nothing, half a ClientHello, or all of it
requests   one user sends requests with idempotency keys flat out on 10 connections, another one without keys on 10,
           and an address without a session calls server.info on 20
frames     600 connections, of one user or of 60, each send all but the end of a frame of 1 MiB
waste      8 connections without a session and 8 of one user send CANCEL, END and CREDIT on no stream flat out
threads    one user fills the threads of the server with calls of 12 seconds and cancels them, again and again
items      40 connections, of one user or of 20, open 64 streams each and then send all that they were granted,
           which no method takes

The server runs with its default settings, a store in a file, and one processor. Meanwhile others, from one address,
send requests on connections that were open before, and log in: each connects, opens a session, uses it and leaves.
They share the other processor with the attackers, which have a lower priority. Under `waste`, `threads` and `items`
the requests on open connections are those of the library: calls, calls of methods in threads, and uploads.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from bench.command import RATE, SECONDS, measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.attackers import (
    HELD,
    Frames,
    Hoarders,
    Logins,
    Newcomers,
    Occupants,
    Requests,
    Sockets,
    Steady,
    Wasters,
)
from bench.scenarios.helper import Helper
from bench.scenarios.storm_clients import Honest, Served
from bench.scenarios.storms import MIB
from bench.stage import ECDSA_ONLY, SERVER_CPU, Server, Stage, check_open_files, cpu_seconds, memory_bytes
from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load.caller import Operator
from zcproto.load.demo import temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor

NICENESS: Final = 15
"""Of attackers, so that the measured clients on the same processor come first."""

AT_ONCE_S: Final = 1.0
"""A login within this time, at its first try, succeeded at once: a lost SYN is repeated after one second."""

P99_MS: Final = 200.0
AT_ONCE_SHARE: Final = 0.95
MAX_GROWTH_MIB: Final = 96.0
"""The largest budget, 64 MiB of `streams.memory_bytes`, and 32 MiB."""
MAX_KEPT_MIB: Final = 16.0
"""Growth that may remain after an attack."""

TIMES_QUIET: Final = 3.0
"""How many times as long as before the attack a request may take."""

STEADY_PART: Final = 0.5
"""Of the rate of requests, for clients of the library."""

APP: Final = "bench.scenarios.attack_app:app"

SETTLE_S: Final = 5.0
"""Seconds until the server has returned memory to the system."""

LOOK_S: Final = 0.2
PROXY: Final = "127.9.1.1"
"""The address of the load balancer that attacks with PROXY headers."""


class Attacker(NamedTuple):
    """A process that attacks: a class of `attackers` and its arguments after those of the server."""

    factory: type
    arguments: tuple[Any, ...]


class Place(NamedTuple):
    """Where an attack is made."""

    port: int
    ca_file: Path
    users: Sequence[Credential]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack, and the bars of its kind."""

    kind: str
    attackers: Callable[[Place], Sequence[Attacker]]
    p99_ms: float | None = None
    at_once: float | None = None
    all_succeed: bool = True
    growth_mib: float | None = None
    act: str = ""
    """What the others do on open connections: a method of `Steady`, or requests written by hand."""


def _sockets(sources: Sequence[str], first: str, rate: float) -> Callable[[Place], Sequence[Attacker]]:
    return lambda place: [Attacker(Sockets, (place.port, source, first, rate)) for source in sources]


def _requests(place: Place) -> Sequence[Attacker]:
    where = place.port, place.ca_file
    keyed, unkeyed, *_ = place.users
    return [
        Attacker(Requests, (*where, "127.1.1.1", 10, "echo", keyed, True)),
        Attacker(Requests, (*where, "127.1.2.1", 10, "echo", unkeyed)),
        Attacker(Requests, (*where, "127.1.3.1", 20, "server.info")),
    ]


def _frames(users: int) -> Callable[[Place], Sequence[Attacker]]:
    return lambda place: [
        Attacker(Frames, (place.port, place.ca_file, "127.1.1.1", 600, place.users[:users]))
    ]


def _waste(place: Place) -> Sequence[Attacker]:
    where = place.port, place.ca_file
    return [
        Attacker(Wasters, (*where, "127.1.1.1", 8)),
        Attacker(Wasters, (*where, "127.1.2.1", 8, place.users[0])),
    ]


def _threads(place: Place) -> Sequence[Attacker]:
    return [Attacker(Occupants, (place.port, place.ca_file, "127.1.1.1", 1, place.users[0]))]


def _items(users: int) -> Callable[[Place], Sequence[Attacker]]:
    return lambda place: [
        Attacker(Hoarders, (place.port, place.ca_file, "127.1.1.1", 40, place.users[:users]))
    ]


def _attacks() -> dict[str, Attack]:
    four = [f"127.{number}.1.1" for number in range(1, 5)]
    silence = {"nothing": four[0], "half a ClientHello": four[0], "half a PROXY header": PROXY}
    return {
        **{
            f"silence: {first}": Attack("silence", _sockets([source], first, 100.0), p99_ms=P99_MS)
            for first, source in silence.items()
        },
        **{
            f"flood: {first}": Attack(
                "flood", _sockets(four, first, 0.0), at_once=AT_ONCE_SHARE, all_succeed=False
            )
            for first in ("nothing", "half a ClientHello", "a ClientHello")
        },
        "requests": Attack("requests", _requests),
        "frames: of one user": Attack("frames", _frames(1), growth_mib=MAX_GROWTH_MIB),
        "frames: of 60 users": Attack("frames", _frames(60), growth_mib=MAX_GROWTH_MIB),
        "waste": Attack("waste", _waste, growth_mib=MAX_GROWTH_MIB, act="call"),
        "threads": Attack("threads", _threads, growth_mib=MAX_GROWTH_MIB, act="block"),
        "items: of one user": Attack("items", _items(1), growth_mib=MAX_GROWTH_MIB, act="upload"),
        "items: of 20 users": Attack("items", _items(20), growth_mib=MAX_GROWTH_MIB, act="upload"),
    }


ATTACKS: Final = _attacks()
KINDS: Final = tuple(dict.fromkeys(attack.kind for attack in ATTACKS.values()))


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """One run. Rates are per second."""

    seconds: float = 15.0
    """Of each attack."""
    rest_s: float = 3.0
    """Before it, to compare with."""
    honest: int = 50
    """Connections of others that were open before, each with a session."""
    rate: float = 200.0
    """Requests on them."""
    logins: float = 20.0


@dataclass(slots=True)
class Figures:
    """What the server used during an attack, and what its store was."""

    before: int = 0
    """Memory in bytes, as the next two."""
    peak: int = 0
    after: int = 0
    cpu_share: float = 0.0
    unhealthy: int = 0
    """How often the store was not healthy when it was looked at."""
    pause_s: float = 0.0
    """The longest of its loop."""
    stats: dict[str, Any] = field(default_factory=dict)

    def look(self, pid: int, stats: dict[str, Any]) -> None:
        self.peak = max(self.peak, memory_bytes(pid)[0])
        self.unhealthy += stats["store"]["state"] != "healthy"
        self.pause_s = max(self.pause_s, stats["longest_pause_s"])
        self.stats = stats


@dataclass(slots=True)
class Outcome:
    """What one attack did to the others."""

    attack: Attack
    rest: Logins
    quiet: Served
    """Before the attack, as `rest`."""
    logins: Logins
    served: Served
    connections: int
    counts: Counter[str]
    figures: Figures

    def rows(self) -> list[Row]:
        attack, logins, served, figures = self.attack, self.logins, self.served, self.figures
        request_ms = percentiles_ms(served.latency).get("p99")
        quiet_ms = percentiles_ms(self.quiet.latency).get("p99")
        times = request_ms / quiet_ms if request_ms and quiet_ms else None
        waits, rest = percentiles_ms(logins.latency), percentiles_ms(self.rest.latency)
        at_once = sum(n for micros, n in logins.latency.counts.items() if micros < AT_ONCE_S * 1e6)
        return [
            Row("logins", "logins of others", logins.begun, at_least=1),
            Row("logins_failed", "failed", logins.failed.total(), equals=0 if attack.all_succeed else None),
            Row("at_once", "at once", at_once / logins.begun * 100 if logins.begun else None, "%",
                at_least=attack.at_once and attack.at_once * 100),
            Row("login_p50_ms", "p50 of a login", waits.get("p50"), "ms"),
            Row("login_p99_ms", "p99 of a login", waits.get("p99"), "ms", below=attack.p99_ms),
            Row("login_max_ms", "longest login", waits.get("max"), "ms"),
            Row("rest_p99_ms", "p99 of a login before", rest.get("p99"), "ms"),
            Row("lag_p99_ms", "p99 of how late they began", percentiles_ms(logins.lag).get("p99"), "ms"),
            Row("requests", "requests of live sessions", served.sent, at_least=1),
            Row("requests_lost", "refused or lost", served.sent - served.equal, equals=0),
            Row("connections_lost", "connections lost", self.connections - served.connections, equals=0),
            Row("request_p99_ms", "p99 of a request", request_ms, "ms"),
            Row("quiet_p99_ms", "p99 of a request before", quiet_ms, "ms"),
            Row("times_quiet", "times as long as before", times, below=TIMES_QUIET if attack.act else None),
            Row("unhealthy", "times that the store was degraded", figures.unhealthy, equals=0),
            Row("pause_ms", "longest pause of the loop", figures.pause_s * 1000, "ms"),
            Row("cpu", "processor of the server", figures.cpu_share * 100, "%"),
            Row("growth_mib", "growth of memory", (figures.peak - figures.before) / MIB, "MiB",
                below=attack.growth_mib),
            Row("kept_mib", "of it kept afterwards", (figures.after - figures.before) / MIB, "MiB",
                below=attack.growth_mib and MAX_KEPT_MIB),
        ]  # fmt: skip


def report(found: dict[str, Outcome]) -> Report:
    notes = [f"load average at the end: {os.getloadavg()[0]:.2f}"]
    for name, outcome in found.items():
        notes += counted(f"{name}: the attackers' counts", outcome.counts)
        notes += counted(f"{name}: logins that failed", outcome.logins.failed)
        notes += counted(f"{name}: requests that failed", outcome.served.failed)
        stats = outcome.figures.stats
        refused = {key: count for key, count in stats.items() if key.startswith("refused_") and count}
        notes += counted(f"{name}: refused connections", refused)
    return Report({name: outcome.rows() for name, outcome in found.items()}, notes=notes)


# --- carrying them out -------------------------------------------------------------------------------------


async def conduct(plan: AttackPlan, attack: Attack, server: Server, users: Users) -> Outcome:
    """Measure the others at rest, then under the attack."""
    port, ca_file = server.port, server.stage.ca_file
    async with AsyncExitStack() as stack:
        operator = await server.operator()
        stack.push_async_callback(operator.disconnect)
        honest = await stack.enter_async_context(
            Helper(Steady, port, ca_file, users.live, plan.rate * STEADY_PART, attack.act)
            if attack.act
            else Helper(Honest, port, ca_file, users.live, plan.rate)
        )
        await honest.call("open")
        newcomers = await stack.enter_async_context(
            Helper(Newcomers, port, ca_file, users.newcomers, plan.logins)
        )
        quiet, rest = await asyncio.gather(
            honest.call("load", plan.rest_s), newcomers.call("load", plan.rest_s)
        )
        helpers = [
            await stack.enter_async_context(Helper(factory, *arguments, niceness=NICENESS))
            for factory, arguments in attack.attackers(Place(port, ca_file, users.attackers))
        ]
        figures = Figures(before=memory_bytes(server.pid)[0])
        await operator.call("server.stats", {})  # its longest pause begins here
        watching = asyncio.create_task(_watch(server, operator, figures))
        used = cpu_seconds(server.pid)
        began = asyncio.get_running_loop().time()
        attacking = [asyncio.create_task(helper.call("begin")) for helper in helpers]
        served, logins = await asyncio.gather(
            honest.call("load", plan.seconds), newcomers.call("load", plan.seconds)
        )
        figures.cpu_share = (cpu_seconds(server.pid) - used) / (asyncio.get_running_loop().time() - began)
        watching.cancel()
        await asyncio.wait({watching})
        figures.look(server.pid, await operator.call("server.stats", {}))
        await asyncio.gather(*attacking)
        figures.look(server.pid, figures.stats)
        counts = sum([await helper.call("end") for helper in helpers], Counter[str]())
        await asyncio.sleep(SETTLE_S)
        figures.after = memory_bytes(server.pid)[0]
    return Outcome(attack, rest, quiet, logins, served, plan.honest, counts, figures)


async def _watch(server: Server, operator: Operator, figures: Figures) -> None:
    while True:
        figures.look(server.pid, await operator.call("server.stats", {}))
        await asyncio.sleep(LOOK_S)


class Users(NamedTuple):
    live: Sequence[Credential]
    newcomers: Sequence[Credential]
    attackers: Sequence[Credential]


async def attacks(plan: AttackPlan, folder: Path, names: Sequence[str]) -> dict[str, Outcome]:
    stage = Stage(folder, {"server.proxy_protocol_from": [PROXY], **ECDSA_ONLY})
    users = Users(
        stage.add_users_for("live", plan.honest),
        stage.add_users("newcomer", 50),
        stage.add_users("attacker", 60),
    )
    stage.make_certificates()
    found = dict[str, Outcome]()
    for name in names:
        progress(f"{name} ...")
        copy = stage.copy(folder.with_name(name.replace(" ", "-")))
        with copy.serve("sqlite", SERVER_CPU, APP) as server:
            found[name] = await conduct(plan, ATTACKS[name], server, users)
    return found


@measurement
@click.option("--seconds", type=SECONDS, default=15.0, show_default=True, help="Of each attack.")
@click.option("--logins", type=RATE, default=20.0, show_default=True, help="Of others, a second.")
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="One kind; may be repeated.")
def command(seconds: float, logins: float, only: tuple[str, ...]) -> Report:
    if not os.path.exists("/proc/self/status"):
        raise ConfigError(
            ["attacks need Linux: they read the server's memory, and use addresses of 127.0.0.0/8"]
        )
    check_open_files(4 * HELD)
    names = [name for name, attack in ATTACKS.items() if not only or attack.kind in only]
    plan = AttackPlan(seconds, logins=logins)
    with temporary_home() as home, on_processor(1), asyncio.Runner(loop_factory=new_event_loop) as runner:
        found = runner.run(attacks(plan, home.path / "stage", names))
    return report(found)
