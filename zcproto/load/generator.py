"""One generator: its connections and its load.

Four phases, in order: `connect`, `load`, `verify`, `close`. Each ends by itself within a bound, or early after
`stop`; then `close` still frees what was opened on the server. Every latency counts from the time at which the
thing was due, not from when this process got round to it; how late it was is measured apart.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.errors import Code, TlsError
from zcproto.load.latency import Latencies
from zcproto.load.load_link import Asked, LoadLink, Stage
from zcproto.load.pacer import Pacer
from zcproto.load.plan import Share
from zcproto.load.record import TICKS_PER_SECOND, Record
from zcproto.load.schedule import arrivals, rounds, steady
from zcproto.load.tally import Kind, count
from zcproto.tls.client import TlsConnector
from zcproto.tls.context import client_context
from zcproto.wire.frame import TOKEN_SIZE

MAX_CONNECTING: Final = 1_000
"""Connections being made at once; the server's backlog holds 4,096. The rest wait, and their wait counts."""

CONNECT_TIMEOUT: Final = 30.0
"""Seconds for a TCP connection, for its handshake, and for what is under way when all have arrived."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds after the last request of a phase in which answers still count."""

CLOSE_TIMEOUT: Final = 10.0
PORTS_OF_AN_ADDRESS: Final = 20_000
"""Connections to one port that are made from one address; systems commonly have 28,232 ports for them."""

CLOSES_PER_TURN: Final = 64
POOL_BYTES: Final = 65_536
POOL_STEP: Final = 31
"""Consecutive requests take their bytes so far apart; any odd number visits all of the pool."""

CLIENT_NAME: Final = "zcproto-bench/1"


class Generator:
    """The connections of one process. All its methods run on one loop."""

    def __init__(self, share: Share, loop: asyncio.AbstractEventLoop) -> None:
        self.share = share
        self.wheel = DeadlineWheel(loop)
        self.record = Record()
        self.in_flight = 0
        self._loop = loop
        self._pacer = Pacer(loop)
        self._random = random.Random(share.seed)  # noqa: S311  no secret, and the same again with the same seed
        self._pool = self._random.randbytes(POOL_BYTES + share.payload_bytes)
        self._number = share.number
        self._stopped = False
        self._waiting: deque[LoadLink] = deque()  # due, but as many as allowed are being made already
        self._connecting: dict[LoadLink, asyncio.Task[None]] = {}
        self._unsettled = share.connections
        self._joining: dict[int, list[LoadLink]] = {}  # by the index of the link that has the session
        self._open_links = 0
        self._event: asyncio.Future[None] | None = None  # what the current phase waits for
        self._connector = TlsConnector(
            client_context(ca_file=None if share.ca_file is None else Path(share.ca_file)),
            share.host,
            self.wheel,
            wall=system_clock.wall,
            handshake_timeout=CONNECT_TIMEOUT,
        )
        self.links = [LoadLink(self, index) for index in range(share.connections)]

    # --- phases ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open all connections, each with its session."""
        if self._stopped:
            return
        share = self.share
        links = iter(self.links)
        times = steady(share.arrival_rate, share.connections)
        await self._pacer.run(times, lambda intended: self._arrive(next(links), intended))
        await self._wait(lambda: self._unsettled == 0, CONNECT_TIMEOUT)
        self._waiting.clear()
        for link in self.links:
            if link.stage < Stage.READY:
                task = self._connecting.get(link)
                if task is not None:
                    task.cancel()
                link.close()
                self._not_made(link, "no session in time")

    async def load(self) -> None:
        """The load, in an open loop."""
        share = self.share
        ready = [link for link in self.links if link.stage is Stage.READY]
        if not ready or self._stopped:
            return
        turns = rounds(ready, self._random)
        times = arrivals(share.rate / share.pipeline, share.duration_s, self._random)
        used = time.process_time()
        started = self.record.load_started = time.monotonic()
        await self._pacer.run(
            times, lambda intended: self._send(next(turns), Kind.LOAD, intended, share.pipeline)
        )
        self.record.cpu_share = (time.process_time() - used) / (time.monotonic() - started)
        await self._wait_for_answers()

    async def verify(self) -> None:
        """One last request on each connection that was asked for."""
        if self._stopped:
            return
        links = iter(self.links)
        times = steady(self.share.verify_rate, len(self.links))
        await self._pacer.run(times, lambda intended: self._send(next(links), Kind.LAST, intended, 1))
        await self._wait_for_answers()

    async def close(self) -> None:
        """Close the sessions, so that their users have room for others, then the connections."""
        self._stopped = False
        owners = [link for link in self.links[: len(self.share.credentials)] if link.stage is Stage.READY]
        for number, link in enumerate(owners):
            link.ask(Kind.CLOSE, "session.close", {}, 0, time.monotonic())
            link.flush()
            if number % CLOSES_PER_TURN == 0:
                await asyncio.sleep(0)
        await self._wait_for_answers()
        for number, link in enumerate(self.links):
            link.stage = Stage.OVER
            link.close()
            if number % CLOSES_PER_TURN == 0:
                await asyncio.sleep(0)
        await self._wait(lambda: self._open_links == 0, CLOSE_TIMEOUT)
        for link in self.links:
            if link.tls is not None:
                link.tls.abort()
        await asyncio.sleep(0)
        self._pacer.close()
        self.wheel.close()

    def stop(self) -> None:
        """End the current phase now, or the next as soon as it begins. `close` is not affected."""
        self._stopped = True
        self._pacer.stop()
        self._wake()

    def progress(self) -> dict[str, int]:
        """How far each phase is, and what has failed in all."""
        record = self.record
        load, last = record.tallies[Kind.LOAD], record.tallies[Kind.LAST]
        return {
            "connect": record.ready,
            "load": load.equal,
            "verify": last.equal,
            "failed": sum(record.lost_links.values()) + load.failed + last.failed,
        }

    # --- waiting ---------------------------------------------------------------------------------

    async def _wait(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = self._loop.time() + limit_s
        while not done() and not self._stopped:
            self._event = self._loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._event
            except TimeoutError:
                return

    async def _wait_for_answers(self) -> None:
        await self._wait(lambda: self.in_flight == 0, ANSWER_TIMEOUT)
        for link in self.links:
            self._give_up(link)

    def _wake(self) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result(None)

    # --- connecting ------------------------------------------------------------------------------

    def _arrive(self, link: LoadLink, intended: float) -> None:
        link.intended = intended
        self._waiting.append(link)
        self._connect_waiting()

    def _connect_waiting(self) -> None:
        while self._waiting and len(self._connecting) < MAX_CONNECTING and not self._stopped:
            link = self._waiting.popleft()
            self.record.latencies["arrival_lag"].add(time.monotonic() - link.intended)
            self._connecting[link] = self._loop.create_task(self._open(link))

    async def _open(self, link: LoadLink) -> None:
        transport = link.tls = self._connector.transport(link, lambda error: self._handshaken(link, error))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._loop.create_connection(
                    lambda: transport,
                    self.share.address,
                    self.share.port,
                    local_addr=source(self.share.address, link.index),
                )
        except TimeoutError:
            self._not_made(link, "no TCP connection in time")
        except OSError as error:
            reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
            self._not_made(link, f"TCP: {reason}")

    def _handshaken(self, link: LoadLink, error: TlsError | None) -> None:
        if error is not None:
            self._not_made(link, f"TLS: {error.failure}")
            return
        self._open_links += 1
        if link.stage is Stage.NEW:
            link.stage = Stage.CONNECTED
            self.record.latencies["handshake"].add(time.monotonic() - link.intended)

    def welcomed(self, link: LoadLink) -> None:
        """A connection's conversation has begun: it needs a session now."""
        sessions = len(self.share.credentials)
        if link.index < sessions:
            user, key = self.share.credentials[link.index]
            params = {"scheme": "api_key", "user": user, "key": key, "client": CLIENT_NAME}
            link.ask(Kind.OPEN, "session.open", params, 0, time.monotonic())
            return
        owner = self.links[link.index % sessions]
        if owner.stage is Stage.READY:
            self._join(link, owner)
        elif owner.stage is Stage.OVER:
            self._not_made(link, "its session could not be opened")
        else:
            self._joining.setdefault(owner.index, []).append(link)

    def _join(self, link: LoadLink, owner: LoadLink) -> None:
        """Use another connection's session: the first request with its token makes this connection one of it."""
        link.token = owner.token
        number = self._take_number()
        link.ask(Kind.JOIN, "echo", self._params(number), number, time.monotonic())
        link.flush()

    def _opened(self, link: LoadLink, asked: Asked, value: Any) -> None:
        tally = self.record.tallies[Kind.OPEN]
        token = value.get("token") if isinstance(value, dict) else None
        if not isinstance(token, bytes) or len(token) != TOKEN_SIZE:
            tally.unequal += 1
            self._not_made(link, "session.open was answered with no token")
            return
        tally.equal += 1
        self.record.latencies["session_open"].add(time.monotonic() - asked.intended)
        self.record.sessions += 1
        link.token = token
        self._made(link)
        for waiting in self._joining.pop(link.index, ()):
            if waiting.stage is Stage.CONNECTED:
                self._join(waiting, link)

    def _made(self, link: LoadLink) -> None:
        link.stage = Stage.READY
        self.record.ready += 1
        self._count(self.record.connected_over_time, 1)
        self._settled(link)

    def _not_made(self, link: LoadLink, cause: str) -> None:
        """A connection will not get its session. Those that wait for this session will not either."""
        if link.stage >= Stage.READY:
            return
        link.stage = Stage.OVER
        count(self.record.lost_links, escape_text(cause, 120))
        self._settled(link)
        for waiting in self._joining.pop(link.index, ()):
            self._not_made(waiting, "its session could not be opened")

    def _settled(self, link: LoadLink) -> None:
        self._connecting.pop(link, None)
        self._unsettled -= 1
        if not self._unsettled:
            self._wake()
        self._connect_waiting()

    # --- requests --------------------------------------------------------------------------------

    def _send(self, link: LoadLink, kind: Kind, intended: float, number_of_requests: int) -> None:
        if kind is Kind.LOAD:
            self.record.latencies["lag"].add(time.monotonic() - intended)
        if link.stage is not Stage.READY:
            tally = self.record.tallies[kind]
            tally.planned += number_of_requests
            count(tally.not_sent, "the connection is lost", number_of_requests)
            return
        for _ in range(number_of_requests):
            number = self._take_number()
            link.ask(kind, "echo", self._params(number), number, intended)
        link.flush()

    def _take_number(self) -> int:
        number = self._number
        self._number += self.share.processes
        return number

    def _params(self, number: int) -> dict[str, Any]:
        """What a request sends: a number that no other has, and bytes that go with it."""
        start = number * POOL_STEP % POOL_BYTES
        return {"n": number, "data": self._pool[start : start + self.share.payload_bytes]}

    def answered(self, link: LoadLink, asked: Asked, value: Any) -> None:
        """A request got its RESPONSE."""
        self._answer_arrived()
        kind = asked.kind
        if kind is Kind.OPEN:
            self._opened(link, asked, value)
            return
        tally = self.record.tallies[kind]
        if value != ({} if kind is Kind.CLOSE else self._params(asked.number)):
            tally.unequal += 1
            if kind is Kind.JOIN:
                self._not_made(link, "the first answer was not what was sent")
            return
        tally.equal += 1
        if kind is Kind.LOAD:
            self._time_load(asked)
        elif kind is Kind.LAST:
            self.record.latencies["last_request"].add(time.monotonic() - asked.intended)
            self._count(self.record.answered_over_time, 1)
        elif kind is Kind.JOIN:
            self._made(link)

    def _time_load(self, asked: Asked) -> None:
        record = self.record
        now = record.load_ended = time.monotonic()
        record.latencies["request"].add(now - asked.intended)
        record.latencies["from_send"].add(now - asked.sent)
        second = int(now - self.share.origin)
        latencies = record.request_by_second.get(second)
        if latencies is None:
            latencies = record.request_by_second[second] = Latencies()
        latencies.add(now - asked.intended)
        self._count(record.answered_over_time, 1)

    def refused(self, link: LoadLink, asked: Asked, code: int) -> None:
        """A request got an ERROR."""
        self._answer_arrived()
        name = code_name(code)
        count(self.record.tallies[asked.kind].errors, name)
        if asked.kind in (Kind.OPEN, Kind.JOIN):
            self._not_made(link, f"no session: {name}")

    def _answer_arrived(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._wake()

    # --- losses ----------------------------------------------------------------------------------

    def link_lost(self, link: LoadLink, cause: str) -> None:
        """A connection ended that we did not close."""
        self._give_up(link)
        if link.stage is Stage.READY:
            link.stage = Stage.OVER
            self.record.ready -= 1
            count(self.record.lost_links, escape_text(cause, 120))
            self._count(self.record.connected_over_time, -1)
        else:
            self._not_made(link, cause)

    def link_gone(self) -> None:
        """A connection is closed on both sides."""
        self._open_links -= 1
        if not self._open_links:
            self._wake()

    def _give_up(self, link: LoadLink) -> None:
        """Whatever it was asked gets no answer any more that counts."""
        for asked in link.pending.values():
            self.record.tallies[asked.kind].lost += 1
            self.in_flight -= 1
        link.pending.clear()
        if not self.in_flight:
            self._wake()

    def _count(self, series: dict[int, int], change: int) -> None:
        tick = int((time.monotonic() - self.share.origin) * TICKS_PER_SECOND)
        series[tick] = series.get(tick, 0) + change


def code_name(code: int) -> str:
    """The name of an error's code; its number if it has none here."""
    try:
        return Code(code).name
    except ValueError:
        return f"CODE_{code}"


def source(address: str, index: int) -> tuple[str, int] | None:
    """From where a connection is made; None is as the system likes.

    A machine has many addresses for itself, each with ports of its own, so there may be more connections to itself
    than an address has ports.
    """
    if index < PORTS_OF_AN_ADDRESS or not address.startswith("127."):
        return None
    return f"127.0.0.{1 + index // PORTS_OF_AN_ADDRESS}", 0
