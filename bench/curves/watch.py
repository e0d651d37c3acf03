"""A load of many connections, with samples of the server's figures meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from bench.stage import Stage, check_open_files, room_for
from zcproto.common.event_loop import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.plan import Plan
from zcproto.load.progress import new_console, view_for
from zcproto.load.result import Moment, Result
from zcproto.load.run import Stop, View, run
from zcproto.load.stats import Operator

PERIOD: Final = 0.5
WATCHED: Final = {"connect": Moment.CONNECTED, "load": Moment.LOADED}
"""The phases with samples, and the reading that ends each."""


class Sample(NamedTuple):
    """The server's figures at one moment."""

    phase: str
    at: float
    """Monotonic seconds."""
    connections: int
    sessions: int
    rss_bytes: int
    longest_s: float
    """The longest pause of its loop since the sample before."""
    longest_own_s: float
    """The same, without the time of other programs."""
    pauses: tuple[int, ...]
    """Since its start, by length: bounds in zcproto.observe.loop_lag.BOUNDS_MS, then all longer ones."""

    @classmethod
    def of(cls, phase: str, stats: Mapping[str, Any]) -> Self:
        return cls(
            phase,
            time.monotonic(),
            int(stats["connections"]),
            int(stats["sessions"]),
            int(stats["rss_bytes"]),
            float(stats["longest_pause_s"]),
            float(stats["longest_own_pause_s"]),
            tuple(map(int, stats["pauses"])),
        )


class Pauses(NamedTuple):
    """How often a loop paused in a time."""

    seconds: float
    counts: tuple[int, ...]
    """By length, as in `Sample.pauses`."""


class Watched(NamedTuple):
    """A run, and the samples of the server meanwhile."""

    result: Result
    samples: list[Sample]

    def longest_ms(self, phase: str, *, own: bool = False) -> float | None:
        """Return the longest pause of a phase; None without samples."""
        pauses = [
            (each.longest_own_s if own else each.longest_s) * 1000
            for each in self.samples
            if each.phase == phase
        ]
        if not own and (last := self.result.longest_pause_ms(WATCHED[phase])) is not None:
            pauses.append(last)
        return max(pauses, default=None)

    def pauses(self, phase: str) -> Pauses | None:
        """Return the pauses of a phase; None if there are too few samples."""
        samples = [each for each in self.samples if each.phase == phase]
        if len(samples) < 2:
            return None
        first, last = samples[0], samples[-1]
        counts = tuple(after - before for before, after in zip(first.pauses, last.pauses, strict=True))
        return Pauses(last.at - first.at, counts)


class _WatchingView:
    """Passes a view's calls on, and takes samples in the watched phases."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._operator: Operator | None = None
        self._task: asyncio.Task[None] | None = None
        self.samples: list[Sample] = []

    def lend(self, operator: Operator) -> None:
        self._operator = operator

    def phase(self, name: str, label: str, total: int) -> None:
        self.stop()
        if name in WATCHED:
            self._task = asyncio.get_running_loop().create_task(self._read(name))
        self._view.phase(name, label, total)

    def update(self, counts: dict[str, int]) -> None:
        self._view.update(counts)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _read(self, phase: str) -> None:
        assert self._operator is not None
        with suppress(ZcprotoError):  # the server is gone, which the load's result shows, too
            while True:
                self.samples.append(Sample.of(phase, await self._operator.call("server.stats", {})))
                await asyncio.sleep(PERIOD)


def watched_run(plan: Plan) -> Watched:
    """Carry out a plan. Raises as `zcproto.load.run.run`."""

    async def carry_out(view: View) -> Watched:
        watching = _WatchingView(view)
        try:
            return Watched(await run(plan, watching, Stop(), lend=watching.lend), watching.samples)
        finally:
            watching.stop()

    with view_for(new_console()) as view, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(carry_out(view))


def load_new_server(
    folder: Path,
    connections: int,
    rate: float,
    seconds: float,
    arrival_rate: float,
    certificates: Path | None = None,
) -> Watched:
    """Load a new server in this home folder with so many connections, each with its session.

    Raises ConfigError if the system does not allow so many.
    """
    check_open_files(connections)
    stage = Stage(folder, room_for(connections), certificates=certificates)
    users = stage.add_users_for("load", connections)
    with stage.serve(cpu=None) as server:
        return watched_run(server.load(users, connections, rate, seconds, arrival_rate=arrival_rate))
