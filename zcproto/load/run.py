"""Conducting a run: the phases in order, the server's figures read between them, all closed at the end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final, Protocol

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ConnectionClosed
from zcproto.load.plan import Plan, shares
from zcproto.load.result import Moment, Reading, Result
from zcproto.load.stats import Operator
from zcproto.load.workers import Workers

VERIFY_RATE: Final = 5_000.0
"""Last requests a second: gentle, as they prove and do not measure."""

CLOSED_TIMEOUT: Final = 5.0
"""Seconds in which the server should see that the connections are gone."""

CLOSED_POLL: Final = 0.1


class View(Protocol):
    """Who watches a run."""

    def phase(self, name: str, label: str, total: int) -> None:
        """A phase begins, of which `total` are to be done."""

    def update(self, counts: dict[str, int]) -> None:
        """How many are done, by the names of the phases, and `failed`."""


class Stop:
    """Somebody's wish to end early, which a run looks for and is told of."""

    def __init__(self) -> None:
        self.requested = False
        self.on_request: Callable[[], None] = lambda: None

    def request(self) -> None:
        self.requested = True
        self.on_request()


async def resolve(host: str, port: int) -> str:
    """A numeric address of a host. Raises ConfigError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError([f"{escape_text(host)}: no such host: {error.strerror}"]) from error
    return str(found[0][4][0])


async def run(
    plan: Plan, view: View, stop: Stop, *, lend: Callable[[Operator], None] = lambda operator: None
) -> Result:
    """Carry out a checked plan. `lend` gets the operator's connection before the first phase: who has something to
    ask the server meanwhile asks it there, where requests are known and not taken for somebody else's.

    Raises ConfigError for what is found before the first connection of the load, ConnectionClosed if there is
    no such server. What goes wrong later is in the result.
    """
    address = await resolve(plan.host, plan.port)
    operator = await Operator.connect(plan.host, address, plan.port, plan.ca_file, plan.operator)
    try:
        lend(operator)
        return await _Run(plan, view, stop, operator).conduct(address)
    finally:
        await operator.leave()


class _Run:
    def __init__(self, plan: Plan, view: View, stop: Stop, operator: Operator) -> None:
        self._plan = plan
        self._view = view
        self._stop = stop
        self._operator = operator
        self._origin = time.monotonic()
        self._result = Result(plan)

    async def conduct(self, address: str) -> Result:
        plan, result = self._plan, self._result
        await self._read(Moment.IDLE)
        async with Workers(shares(plan, address, self._origin, VERIFY_RATE), self._view.update) as workers:
            self._stop.on_request = workers.stop
            await self._connect(workers)
            await self._load(workers)
            await self._phase(workers, "verify", "verifying", plan.connections, Moment.VERIFIED)
            result.interrupted = self._stop.requested
            self._stop.on_request = lambda: None  # closing is what is wanted then
            self._view.phase("close", "closing", plan.connections)
            result.record = await workers.close()
        self._time_load()
        await self._read_closed()
        result.total_s = time.monotonic() - self._origin
        return result

    async def _connect(self, workers: Workers) -> None:
        started = time.monotonic()
        done = await self._phase(workers, "connect", "connecting", self._plan.connections, Moment.CONNECTED)
        self._result.connect_s = done - started

    async def _load(self, workers: Workers) -> None:
        total = round(self._plan.rate * self._plan.duration_s)
        await self._phase(workers, "load", "loading", total, Moment.LOADED)

    async def _phase(self, workers: Workers, name: str, label: str, total: int, after: Moment) -> float:
        """Have the workers carry out one phase, then read the server's figures. Returns when they were done."""
        if self._stop.requested:
            return time.monotonic()
        self._view.phase(name, label, total)
        said = await workers.run(name)
        ended = time.monotonic()
        if name == "connect":
            self._result.connected = sum(each["ready"] for each in said)
        await self._read(after)
        return ended

    def _time_load(self) -> None:
        record = self._result.record
        if record.load_ended > record.load_started:
            self._result.load_s = record.load_ended - record.load_started

    async def _read(self, moment: Moment) -> None:
        try:
            stats = await self._operator.stats()
        except ConnectionClosed as error:
            self._result.unread = f"the server's figures could not be read: {error}"
            return
        self._result.readings[moment] = Reading(stats, self._operator.asked, time.monotonic() - self._origin)

    async def _read_closed(self) -> None:
        """Read once the server has seen that all are gone, or after a while."""
        before = self._result.readings.get(Moment.IDLE)
        deadline = time.monotonic() + CLOSED_TIMEOUT
        while before is not None and not self._result.unread:
            await self._read(Moment.CLOSED)
            reading = self._result.readings.get(Moment.CLOSED)
            if reading is None or reading.stats.connections <= before.stats.connections:
                return
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(CLOSED_POLL)
