"""A run: the phases in order, with the server's counters read in between, and everything closed at the end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from zcproto.common.text import escape_text
from zcproto.errors import CallError, ConfigError, ConnectionClosed, Unavailable
from zcproto.load.caller import Operator, UserCaller
from zcproto.load.plan import Plan, Target, shares, sources_for
from zcproto.load.result import Moment, Result, StatsReading
from zcproto.load.worker import WorkerPool

VERIFY_RATE: Final = 5_000.0
"""Last requests per second: a low rate, because they verify and do not measure."""

CLOSED_TIMEOUT: Final = 5.0
"""Seconds for the server to notice that the connections are closed."""

CLOSED_POLL: Final = 0.1


class View(Protocol):
    """A display of the progress of a run."""

    def phase(self, name: str, label: str, total: int) -> None:
        """Start a phase with `total` steps."""

    def update(self, counts: dict[str, int]) -> None:
        """Show the steps done by the names of the phases, and `failed`."""


class Stop:
    """A request to end a run early. The run polls `requested` and sets `on_request`."""

    def __init__(self) -> None:
        self.requested = False
        self.on_request: Callable[[], None] = lambda: None

    def request(self) -> None:
        self.requested = True
        self.on_request()


async def resolve(host: str, port: int) -> str:
    """Return a numeric address of a host. Raises ConfigError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            [f"{escape_text(host)}: cannot be resolved: {error.strerror}; check the name"]
        ) from error
    return str(found[0][4][0])


async def run(
    plan: Plan,
    view: View,
    stop: Stop,
    *,
    on_operator: Callable[[Operator], None] = lambda operator: None,
    after_load: Callable[[], Awaitable[object]] | None = None,
) -> Result:
    """Carry out a checked plan.

    `on_operator` gets the operator's connection before the first phase: requests that the caller sends on it are
    excluded from the comparison with the server's counters. `after_load` is awaited before the connections are
    verified.

    Raises ConfigError for errors before the load's first connection, ConnectionClosed if the server cannot be
    reached. Later errors are in the result.
    """
    address = await resolve(plan.host, plan.port)
    sources_for(plan, address)  # fail before the first connection
    if plan.target is not None and not plan.target.is_stream:
        await _try_target(plan, plan.target, address)
    if plan.operator is None:
        return await _Run(plan, view, stop, None, after_load).conduct(address)
    operator = await Operator.connect(plan.host, address, plan.port, plan.ca_file, plan.operator)
    try:
        on_operator(operator)
        return await _Run(plan, view, stop, operator, after_load).conduct(address)
    finally:
        await operator.disconnect()


async def _try_target(plan: Plan, target: Target, address: str) -> None:
    """Call the target once, alone. Raises ConfigError if its answer is an error or another result."""
    user = await UserCaller.connect(plan.host, address, plan.port, plan.ca_file, plan.credentials[0])
    try:
        value = await user.call(target.method, target.params)
    except CallError as error:
        raise ConfigError([f"{escape_text(target.method)} cannot be measured: {error}"]) from error
    finally:
        await user.disconnect()
    if not target.is_right(value):
        raise ConfigError(
            [
                f"{escape_text(target.method)} answered {escape_text(repr(value), 200)}; give that to --expect,"
                " or leave --expect out if its results differ"
            ]
        )


class _Run:
    def __init__(
        self,
        plan: Plan,
        view: View,
        stop: Stop,
        operator: Operator | None,
        after_load: Callable[[], Awaitable[object]] | None,
    ) -> None:
        self._plan = plan
        self._view = view
        self._stop = stop
        self._operator = operator
        self._after_load = after_load
        self._origin = time.monotonic()
        self._result = Result(plan)

    async def conduct(self, address: str) -> Result:
        plan, result = self._plan, self._result
        await self._read(Moment.IDLE)
        pool = WorkerPool(shares(plan, address, self._origin, VERIFY_RATE), self._view.update)
        async with pool as workers:
            self._stop.on_request = workers.stop
            await self._connect(workers)
            await self._load(workers)
            await self._phase(workers, "verify", "verifying", plan.connections, Moment.VERIFIED)
            result.interrupted = self._stop.requested
            self._stop.on_request = lambda: None  # closing is not interrupted
            self._view.phase("close", "closing", plan.connections)
            result.record = await workers.close()
        self._time_load()
        await self._read_closed()
        result.total_s = time.monotonic() - self._origin
        return result

    async def _connect(self, workers: WorkerPool) -> None:
        started = time.monotonic()
        done = await self._phase(workers, "connect", "connecting", self._plan.connections, Moment.CONNECTED)
        self._result.connect_s = done - started

    async def _load(self, workers: WorkerPool) -> None:
        await self._phase(workers, "load", "loading", self._plan.load, Moment.LOADED)

    async def _phase(self, workers: WorkerPool, name: str, label: str, total: int, after: Moment) -> float:
        """Run a phase in all workers, then read the server's counters. Return the time when the workers ended."""
        if self._stop.requested:
            return time.monotonic()
        self._view.phase(name, label, total)
        reports = await workers.run(name)
        ended = time.monotonic()
        if name == "load" and self._after_load is not None:
            await self._after_load()
        if name == "connect":
            self._result.connected = sum(each["ready"] for each in reports)
        await self._read(after)
        return ended

    def _time_load(self) -> None:
        record = self._result.record
        if record.load_ended > record.load_started:
            self._result.load_s = record.load_ended - record.load_started

    async def _read(self, moment: Moment) -> None:
        if self._operator is None:
            return
        try:
            stats = await self._operator.stats()
        except (ConnectionClosed, Unavailable) as error:  # Unavailable: it drains
            self._result.unread = f"the server's counters could not be read: {error}"
            return
        self._result.readings[moment] = StatsReading(
            stats, self._operator.requests, time.monotonic() - self._origin
        )

    async def _read_closed(self) -> None:
        """Read the counters when the server has closed all connections, or after CLOSED_TIMEOUT."""
        before = self._result.readings.get(Moment.IDLE)  # None without an operator
        deadline = time.monotonic() + CLOSED_TIMEOUT
        while before is not None and not self._result.unread:
            await self._read(Moment.CLOSED)
            reading = self._result.readings.get(Moment.CLOSED)
            if reading is None or reading.stats.connections <= before.stats.connections:
                return
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(CLOSED_POLL)
