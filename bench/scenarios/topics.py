"""A topic of 10,000 subscribers: does each get every event, what does it cost, and when does the last one have it?

\b
process   a topic of one process
shared    a topic with the scope "server" of a server of one process, which must cost the same
workers   a topic with the scope "server" on two workers, which have half of the subscribers each

The clients run in another process on the same processors. The cost is the processor time of all processes of the
server, for each event and subscriber. The delay is that of the last subscriber, the median of all events.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row
from bench.scenarios.harness import until
from bench.scenarios.helper import Helper
from bench.scenarios.reader_clients import Subscribers
from bench.stage import ECDSA_ONLY, Stage, check_open_files, cpu_seconds, family, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load.demo import temporary_home

APP: Final = "bench.scenarios.reader_app:app"
KINDS: Final = {"process": ("news", 1), "shared": ("shared", 1), "workers": ("shared", 2)}
"""The topic of each run, and the workers."""

EVENT_BYTES: Final = 100
DELIVERY_S: Final = 60.0
MAX_COST: Final = 1.25
"""Cost of a subscriber on two workers over that in one process: each has turns of the loop of its own."""

MAX_SHARED_COST: Final = 1.1
MAX_DELAY: Final = 2.0


async def measure_one(stage: Stage, topic: str, subscribers: int, events: int) -> dict[str, float]:
    """Return the figures of one run."""
    users = stage.add_users_for("subscriber", subscribers)
    with stage.serve(cpu=None, app=APP) as server:
        async with AsyncExitStack() as running:
            operator = await server.operator()
            running.push_async_callback(operator.disconnect)
            helper = await running.enter_async_context(
                Helper(Subscribers, server.port, server.stage.ca_file, users, topic)
            )
            await helper.call("open")

            async def all_have_begun() -> bool:
                status = await operator.call("server.stats", {})
                return bool(status["running"] >= subscribers)

            await until(all_have_begun, DELIVERY_S)
            pids, delays = family(server.pid), []
            before = sum(map(cpu_seconds, pids))
            for number in range(events):
                said = await operator.call("say", {"topic": topic, "number": number, "size": EVENT_BYTES})
                complete = await helper.call("complete", number + 1, DELIVERY_S)
                delays.append(await helper.call("last_at") - said)
            cpu = sum(map(cpu_seconds, pids)) - before
    return {
        "complete": complete,
        "cost_us": cpu / events / subscribers * 1e6,
        "delay_ms": statistics.median(delays) * 1000,
    }


async def measure(folder: Path, subscribers: int, events: int) -> Report:
    columns: dict[str, list[Row]] = {}
    first: dict[str, float] = {}
    load = os.getloadavg()[0]
    for name, (topic, workers) in KINDS.items():
        progress(f"{name} ...")
        (folder / name).mkdir(parents=True)
        stage = Stage(folder / name, {**room_for(subscribers), **ECDSA_ONLY, "server.workers": workers})
        stage.make_certificates()
        found = await measure_one(stage, topic, subscribers, events)
        first = first or found
        cost, delay = (found[key] / first[key] for key in ("cost_us", "delay_ms"))
        columns[name] = [
            Row("complete", "subscribers with every event, in order", found["complete"], equals=subscribers),
            Row("cost_us", "processor time of an event for a subscriber", found["cost_us"], "us"),
            Row("cost", "over that of one process", cost, "times",
                below=MAX_COST if workers > 1 else MAX_SHARED_COST),
            Row("delay_ms", "delay of the last subscriber", found["delay_ms"], "ms"),
            Row("delay", "over that of one process", delay, "times", below=MAX_DELAY),
        ]  # fmt: skip
    return Report(columns, notes=[f"load average: {load:.2f}"])


@measurement
@click.option("--subscribers", type=COUNT, default=10_000, show_default=True)
@click.option("--events", type=COUNT, default=20, show_default=True)
def command(subscribers: int, events: int) -> Report:
    if not os.path.exists("/proc/self/status"):
        raise ConfigError(["topics need Linux: they read the server's CPU time"])
    check_open_files(subscribers)
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure(home.path / "stage", subscribers, events))
