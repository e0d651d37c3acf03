"""Slow and hasty readers of streams and topics: what do they cost the server and the others?

\b
topic     10,000 clients subscribe to a topic, and one that does not read; events are published
unread    clients open a stream of endless items, give credit without limit, and read nothing
hasty     100,000 streams are opened and cancelled at once, while others send requests

A slice is the processor's time for one turn of the event loop.
Memory is resident memory; what an unread stream takes is that of many, divided by their number.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.attacks import NICENESS, SETTLE_S
from bench.scenarios.harness import until
from bench.scenarios.helper import Helper
from bench.scenarios.reader_clients import Hasty, Subscribers, Unread
from bench.scenarios.storm_clients import Honest, Served
from bench.stage import ECDSA_ONLY, KIB, Server, Stage, check_open_files, memory_bytes, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load.caller import Operator
from zcproto.load.demo import temporary_home
from zcproto.load.hdr import percentiles_ms
from zcproto.load.processes import on_processor

APP: Final = "bench.scenarios.reader_app:app"
KINDS: Final = ("topic", "unread", "hasty")

MAX_SLICE_MS: Final = 5.0
MAX_UNREAD_KIB: Final = 128.0
P99_MS: Final = 20.0
MAX_OPEN: Final = 64
"""The default of `streams.max_open`."""

EVENT_BYTES: Final = 100
ITEM_BYTES: Final = 1_000
DELIVERY_S: Final = 20.0
HASTY_CONNECTIONS: Final = 8


@dataclass(frozen=True, slots=True)
class ReadersPlan:
    """One run."""

    subscribers: int = 10_000
    events: int = 20
    unread: int = 50
    """Connections that do not read."""
    hasty: int = 100_000
    """Streams that are opened and cancelled."""
    honest: int = 20
    """Connections of others meanwhile."""
    rate: float = 200.0
    """Requests a second on them."""


@dataclass(slots=True)
class Found:
    rows: list[Row]
    counts: Counter[str] = field(default_factory=Counter)


async def topic(plan: ReadersPlan, server: Server, operator: Operator, stack: AsyncExitStack) -> Found:
    """Publish to many subscribers, one of which does not read."""
    where = server.port, server.stage.ca_file
    users = server.stage.add_users_for("subscriber", plan.subscribers + 1)
    stuck = await stack.enter_async_context(Helper(Unread, *where, users[:1]))
    await stuck.call("open", "news", {})
    await stuck.call("allow")
    subscribers = await stack.enter_async_context(Helper(Subscribers, *where, users[1:], "news"))
    await subscribers.call("open")

    async def all_have_begun() -> bool:
        return bool(await operator.call("subscribers", {}) > plan.subscribers)

    await until(all_have_begun, DELIVERY_S)
    turns = []
    for number in range(plan.events):
        turns.append(await operator.call("publish", {"number": number, "size": EVENT_BYTES}))
    complete = await subscribers.call("complete", plan.events, DELIVERY_S)
    return Found([
        Row("subscribers", "subscribers", await operator.call("subscribers", {}), equals=plan.subscribers + 1),
        Row("complete", "received every event, in order", complete, equals=plan.subscribers),
        Row("publish_ms", "longest publish", max(turn["published_s"] for turn in turns) * 1000, "ms",
            below=MAX_SLICE_MS),
        Row("slice_ms", "longest slice of the loop", max(turn["longest_s"] for turn in turns) * 1000, "ms",
            below=MAX_SLICE_MS),
    ])  # fmt: skip


async def unread(plan: ReadersPlan, server: Server, operator: Operator, stack: AsyncExitStack) -> Found:
    """Measure the memory of streams that are not read."""
    users = server.stage.add_users_for("unread", plan.unread)
    helper = await stack.enter_async_context(Helper(Unread, server.port, server.stage.ca_file, users))
    await helper.call("open", "fill", {"size": ITEM_BYTES})
    await asyncio.sleep(SETTLE_S)
    before = memory_bytes(server.pid)[0]
    await helper.call("allow")
    await asyncio.sleep(SETTLE_S)
    grown = (memory_bytes(server.pid)[0] - before) / plan.unread / KIB
    stats = await operator.call("server.stats", {})
    return Found([
        Row("unread", "streams that are not read", stats["running"], equals=plan.unread),
        Row("unread_kib", "memory that each takes", grown, "KiB", below=MAX_UNREAD_KIB),
    ])  # fmt: skip


async def hasty(plan: ReadersPlan, server: Server, operator: Operator, stack: AsyncExitStack) -> Found:
    """Open and cancel streams in a row while others send requests."""
    where = server.port, server.stage.ca_file
    honest = await stack.enter_async_context(
        Helper(Honest, *where, server.stage.add_users_for("honest", plan.honest), plan.rate)
    )
    await honest.call("open")
    users = server.stage.add_users_for("hasty", HASTY_CONNECTIONS)
    attacker = await stack.enter_async_context(Helper(Hasty, *where, users, plan.hasty, niceness=NICENESS))
    load = asyncio.create_task(honest.call("load", 3_600.0))
    counts: Counter[str] = await attacker.call("run")
    await honest.call("stop")
    served: Served = await load
    most = await operator.call("alive", {})
    waits = percentiles_ms(served.latency)
    return Found([
        Row("hasty", "streams opened and cancelled", counts.total(), equals=plan.hasty),
        Row("alive", "most methods alive on one connection", most, below=MAX_OPEN + 1),
        Row("requests_lost", "requests of others lost", served.sent - served.equal, equals=0),
        Row("request_p50_ms", "p50 of a request", waits.get("p50"), "ms"),
        Row("request_p99_ms", "p99 of a request", waits.get("p99"), "ms", below=P99_MS),
        Row("lag_p99_ms", "p99 of how late they were sent", percentiles_ms(served.lag).get("p99"), "ms"),
    ], counts)  # fmt: skip


async def measure(plan: ReadersPlan, folder: Path, names: tuple[str, ...]) -> Report:
    columns, notes = dict[str, list[Row]](), [f"load average: {os.getloadavg()[0]:.2f}"]
    stage = Stage(folder, {**room_for(plan.subscribers + plan.unread), **ECDSA_ONLY})
    stage.make_certificates()
    for name in names:
        progress(f"{name} ...")
        with stage.serve(app=APP) as server:
            async with AsyncExitStack() as stack:
                operator = await server.operator()
                stack.push_async_callback(operator.disconnect)
                found = await {"topic": topic, "unread": unread, "hasty": hasty}[name](
                    plan, server, operator, stack
                )
        columns[name] = found.rows
        notes += counted(f"{name}: answers", found.counts)
    return Report(columns, notes=notes)


@measurement
@click.option("--subscribers", type=COUNT, default=10_000, show_default=True)
@click.option("--hasty", type=COUNT, default=100_000, show_default=True, help="Streams opened and cancelled.")
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="One kind; may be repeated.")
def command(subscribers: int, hasty: int, only: tuple[str, ...]) -> Report:
    if not os.path.exists("/proc/self/status"):
        raise ConfigError(["readers need Linux: they read the server's memory"])
    check_open_files(subscribers)
    plan = ReadersPlan(subscribers, hasty=hasty)
    with temporary_home() as home, on_processor(1), asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure(plan, home.path / "stage", only or KINDS))
