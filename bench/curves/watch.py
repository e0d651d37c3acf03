"""A load of many connections, with samples of the server's figures meanwhile."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

from bench.samples import Sample, Span
from bench.stage import Stage, check_open_files, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Operator
from zcproto.load.plan import Plan
from zcproto.load.progress import Progress
from zcproto.load.result import Result
from zcproto.load.run import Stop, View, run

PERIOD_S: Final = 0.5
PHASES: Final = ("connect", "load")
"""The phases of a load in which samples are taken."""


class Watched(NamedTuple):
    """A run, and the samples of the server meanwhile, by phase."""

    result: Result
    samples: dict[str, list[Sample]]

    def span(self, phase: str) -> Span | None:
        """Return the time from the first to the last sample of a phase; None if there are too few."""
        samples = self.samples.get(phase, [])
        return Span(samples[0], samples[-1]) if len(samples) > 1 else None


class _WatchingView:
    """Passes a view's calls on, and takes samples in the watched phases."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._operator: Operator | None = None
        self._task: asyncio.Task[None] | None = None
        self.samples: dict[str, list[Sample]] = {}

    def lend(self, operator: Operator) -> None:
        self._operator = operator

    def phase(self, name: str, label: str, total: int) -> None:
        self.stop()
        if name in PHASES:
            self._task = asyncio.get_running_loop().create_task(self._sample(name))
        self._view.phase(name, label, total)

    def update(self, counts: dict[str, int]) -> None:
        self._view.update(counts)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _sample(self, phase: str) -> None:
        assert self._operator is not None
        samples = self.samples.setdefault(phase, [])
        with suppress(ZcprotoError):  # the server is gone, which the load's result shows, too
            while True:
                samples.append(Sample.of(await self._operator.call("server.stats", {})))
                await asyncio.sleep(PERIOD_S)


def watched_run(plan: Plan) -> Watched:
    """Carry out a plan. Raises as `zcproto.load.run.run`."""

    async def carry_out(view: View) -> Watched:
        watching = _WatchingView(view)
        try:
            return Watched(await run(plan, watching, Stop(), on_operator=watching.lend), watching.samples)
        finally:
            watching.stop()

    with closing(Progress(sys.stdout)) as view, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(carry_out(view))


def load_new_server(
    folder: Path,
    connections: int,
    rate: float,
    seconds: float,
    arrival_rate: float,
    certificates: Path | None = None,
    stream: str = "",
) -> Watched:
    """Load a new server in this home folder with so many connections, each with its session.

    With the name of a `stream` the load are its items. Raises ConfigError if the system does not allow so many.
    """
    check_open_files(connections)
    stage = Stage(folder, room_for(connections), certificates=certificates)
    users = stage.add_users_for("load", connections)
    with stage.serve(cpu=None) as server:
        plan = server.load(users, connections, rate, seconds, arrival_rate=arrival_rate, stream=stream)
        return watched_run(plan)
