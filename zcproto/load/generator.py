"""The generator of one process: its connections and its load.

Four phases, in order: `connect`, `load`, `verify`, `close`. Each ends within a time limit, or early after `stop`;
`close` still frees what was opened on the server.

Rules:
- Every latency starts when its action was due, not when this process got to it; that delay is measured separately.
- The load is an open loop: requests are sent on schedule, whether answers arrive or not.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.client.streams import DEFAULT_WINDOW
from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.connection.client_streams import ClientStream
from zcproto.errors import (
    Code,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
    TlsError,
    Unimplemented,
    ZcprotoError,
)
from zcproto.load.connection import FrameConnection
from zcproto.load.pacer import Pacer, poisson_times, shuffled_rounds, uniform_times
from zcproto.load.plan import CLIENT_NAME, Share, Target
from zcproto.load.record import TICKS_PER_SECOND, Latencies, Record, RequestKind, count
from zcproto.tls.client import TlsClientTransport, TlsConnector
from zcproto.tls.context import client_context
from zcproto.tls.transport import TlsTransport
from zcproto.wire.frame import NO_TOKEN, TOKEN_SIZE

MAX_CONNECTING: Final = 1_000
"""Maximum of concurrent attempts to connect; the server's backlog holds 4,096. The delay of the others counts."""

CLOSES_PER_TURN: Final = 64
POOL_BYTES: Final = 65_536
POOL_STEP: Final = 31
"""Distance in the pool between the payloads of consecutive requests; an odd number visits the whole pool."""


class Stage(IntEnum):
    """The state of a connection."""

    NEW = 0
    CONNECTED = 1  # after the handshake
    READY = 2  # with its session
    OVER = 3


class PendingRequest(NamedTuple):
    """A request in flight. Times are in monotonic seconds."""

    kind: RequestKind
    number: int
    due: float
    sent: float
    stream: LoadStream | OwnStream | None = None


class LoadConnection(FrameConnection):
    """One of many connections of a Generator."""

    __slots__ = ("_generator", "due", "index", "pending", "stage", "tls", "token")

    def __init__(self, generator: Generator, index: int) -> None:
        super().__init__(generator.wheel)
        self._generator = generator
        self.index = index
        self.stage = Stage.NEW
        self.due = 0.0
        """When it should connect."""
        self.token = NO_TOKEN
        self.tls: TlsTransport | None = None
        """Unlike `transport`, set before the connection is made, so that it can be aborted at any time."""
        self.pending: dict[int, PendingRequest] = {}
        """Requests by stream: answers arrive in any order."""

    def queue(
        self,
        kind: RequestKind,
        method: str,
        params: dict[str, Any],
        number: int,
        due: float,
        stream: LoadStream | OwnStream | None = None,
    ) -> bool:
        """Queue a request, or the opening of a stream, which `flush` sends. Return False if it is impossible."""
        tally = self._generator.record.tallies[kind]
        tally.planned += 1
        wall = system_clock.wall()
        try:
            if stream is None:
                key = self.conversation.request(method, params, token=self.token, wall=wall)
            else:
                stream.half = self.conversation.open_stream(
                    method, params, token=self.token, window=DEFAULT_WINDOW, wall=wall
                )
                key = stream.half.number
        except ResourceExhausted:
            count(tally.not_sent, "too many requests in flight on the connection")
            return False
        except InvalidArgument:
            count(tally.not_sent, "larger than the server accepts")
            return False
        except Unimplemented:
            count(tally.not_sent, "the server has no streams")
            return False
        except ZcprotoError:
            count(tally.not_sent, "the connection is ending")
            return False
        tally.sent += 1
        self._generator.in_flight += 1
        self.pending[key] = PendingRequest(kind, number, due, time.monotonic(), stream)
        return True

    def item_received(self, stream: int) -> None:
        request = self.pending.get(stream)
        if request is None or request.stream is None:  # it has timed out
            return
        assert request.stream.half is not None
        try:
            value = self.conversation.take_item(request.stream.half, system_clock.wall())
        except InternalError:
            value = None  # it cannot be decoded
        self._generator.item_arrived(request.kind, request.stream, value)

    def welcomed(self) -> None:
        self._generator.welcomed(self)

    def answered(self, stream: int, value: Any) -> None:
        request = self.pending.pop(stream, None)
        if request is not None:  # None: it has timed out
            self._generator.answered(self, request, value)

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        request = self.pending.pop(stream, None)
        if request is not None:
            self._generator.refused(self, request, code)

    def lost(self, cause: str) -> None:
        self._generator.connection_lost(self, cause)

    def gone(self) -> None:
        self._generator.connection_gone()


class Generator:
    """The connections of one process, all on one event loop."""

    def __init__(self, share: Share, loop: asyncio.AbstractEventLoop) -> None:
        self.share = share
        self.wheel = DeadlineWheel(loop)
        self.record = Record()
        self.in_flight = 0
        self._loop = loop
        self._pacer = Pacer(loop)
        self._random = random.Random(share.seed)  # noqa: S311 - no secret; repeatable with the same seed
        self._pool = self._random.randbytes(POOL_BYTES + share.payload_bytes)
        self._number = share.number
        self._target = Target.from_text(share.target) if share.target else None
        self._method = self._target.method if self._target else "echo"
        self._stopped = False
        self._waiting: deque[LoadConnection] = deque()  # due, but MAX_CONNECTING are connecting
        self._connecting: dict[LoadConnection, asyncio.Task[None]] = {}
        self._unsettled = share.connections
        self._joining: dict[int, list[LoadConnection]] = {}  # by the connection that opens their session
        self._open_connections = 0
        self._event: asyncio.Future[None] | None = None  # wakes the current phase
        self._connector = TlsConnector(
            client_context(ca_file=None if share.ca_file is None else Path(share.ca_file)),
            share.host,
            self.wheel,
            wall=system_clock.wall,
            handshake_timeout=share.connect_timeout_s,
        )
        self.connections = [LoadConnection(self, index) for index in range(share.connections)]

    # --- phases ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open all connections and their sessions."""
        if self._stopped:
            return
        share = self.share
        remaining = iter(self.connections)
        times = uniform_times(share.arrival_rate, share.connections)
        await self._pacer.run(times, lambda due: self._arrive(next(remaining), due))
        await self._wait(lambda: self._unsettled == 0, share.connect_timeout_s)
        self._waiting.clear()
        for connection in self.connections:
            if connection.stage < Stage.READY:
                task = self._connecting.get(connection)
                if task is not None:
                    task.cancel()
                connection.close()
                self._fail(connection, "no session in time")

    async def load(self) -> None:
        """Send the load."""
        share = self.share
        ready = [connection for connection in self.connections if connection.stage is Stage.READY]
        if not ready or self._stopped:
            return
        turns = shuffled_rounds(ready, self._random)
        used = time.process_time()
        started = self.record.load_started = time.monotonic()
        if share.stream:
            times = opening_times(share, len(ready) * share.pipeline)
            await self._pacer.run(times, lambda due: self._open_stream(next(turns), due))
            await self._wait(lambda: self.in_flight == 0, share.items_per_stream * share.interval_s)
        else:
            times = poisson_times(share.rate / share.pipeline, share.duration_s, self._random)
            await self._pacer.run(
                times, lambda due: self._send(next(turns), RequestKind.LOAD, due, share.pipeline)
            )
        self.record.cpu_share = (time.process_time() - used) / (time.monotonic() - started)
        await self._wait_for_answers()

    async def verify(self) -> None:
        """Send one last request on each planned connection."""
        if self._stopped:
            return
        remaining = iter(self.connections)
        times = uniform_times(self.share.verify_rate, len(self.connections))
        await self._pacer.run(times, lambda due: self._send(next(remaining), RequestKind.LAST, due, 1))
        await self._wait_for_answers()

    async def close(self) -> None:
        """Close the sessions, which count towards their users' limits, and then the connections."""
        self._stopped = False
        owners = [
            connection
            for connection in self.connections[: len(self.share.credentials)]
            if connection.stage is Stage.READY
        ]
        for number, connection in enumerate(owners):
            connection.queue(RequestKind.CLOSE, "session.close", {}, 0, time.monotonic())
            connection.flush()
            if number % CLOSES_PER_TURN == 0:
                await asyncio.sleep(0)
        await self._wait_for_answers()
        for number, connection in enumerate(self.connections):
            connection.stage = Stage.OVER
            connection.close()
            if number % CLOSES_PER_TURN == 0:
                await asyncio.sleep(0)
        await self._wait(lambda: self._open_connections == 0, self.share.answer_timeout_s)
        for connection in self.connections:
            if connection.tls is not None:
                connection.tls.abort()
        await asyncio.sleep(0)
        self._pacer.close()
        self.wheel.close()

    def stop(self) -> None:
        """End the current phase, or the next one at its start. Does not affect `close`."""
        self._stopped = True
        self._pacer.stop()
        self._wake()

    def progress(self) -> dict[str, int]:
        """Return the progress of each phase, and the number of all failures."""
        record = self.record
        load, last = record.tallies[RequestKind.LOAD], record.tallies[RequestKind.LAST]
        return {
            "connect": record.ready,
            "load": record.items.equal if self.share.stream else load.equal,
            "verify": last.equal,
            "failed": sum(record.lost_connections.values()) + load.failed + last.failed + record.items.failed,
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
        await self._wait(lambda: self.in_flight == 0, self.share.answer_timeout_s)
        for connection in self.connections:
            self._drop_pending(connection)

    def _wake(self) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result(None)

    # --- connecting ------------------------------------------------------------------------------

    def _arrive(self, connection: LoadConnection, due: float) -> None:
        connection.due = due
        self._waiting.append(connection)
        self._connect_waiting()

    def _connect_waiting(self) -> None:
        while self._waiting and len(self._connecting) < MAX_CONNECTING and not self._stopped:
            connection = self._waiting.popleft()
            self.record.latencies["arrival_lag"].add(time.monotonic() - connection.due)
            self._connecting[connection] = self._loop.create_task(self._open(connection))

    async def _open(self, connection: LoadConnection) -> None:
        transport = connection.tls = TlsClientTransport(
            self._connector, connection, lambda error: self._handshaken(connection, error)
        )
        try:
            async with asyncio.timeout(self.share.connect_timeout_s):
                await self._loop.create_connection(
                    lambda: transport,
                    self.share.address,
                    self.share.port,
                    local_addr=self.share.source(connection.index),
                )
        except TimeoutError:
            self._fail(connection, "no TCP connection in time")
        except OSError as error:
            reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
            self._fail(connection, f"TCP: {reason}")

    def _handshaken(self, connection: LoadConnection, error: TlsError | None) -> None:
        if error is not None:
            self._fail(connection, f"TLS: {error.failure}")
            return
        self._open_connections += 1
        if connection.stage is Stage.NEW:
            connection.stage = Stage.CONNECTED
            self.record.latencies["handshake"].add(time.monotonic() - connection.due)

    def welcomed(self, connection: LoadConnection) -> None:
        """Get a session for a connection that has received WELCOME."""
        sessions = len(self.share.credentials)
        if connection.index < sessions:
            user, key = self.share.credentials[connection.index]
            params = {"scheme": "api_key", "user": user, "key": key, "client": CLIENT_NAME}
            connection.queue(RequestKind.OPEN, "session.open", params, 0, time.monotonic())
            return
        owner = self.connections[connection.index % sessions]
        if owner.stage is Stage.READY:
            self._join(connection, owner)
        elif owner.stage is Stage.OVER:
            self._fail(connection, "its session could not be opened")
        else:
            self._joining.setdefault(owner.index, []).append(connection)

    def _join(self, connection: LoadConnection, owner: LoadConnection) -> None:
        """Use the session of another connection, with a first request that carries its token."""
        connection.token = owner.token
        number = self._take_number()
        connection.queue(RequestKind.JOIN, self._method, self._params(number), number, time.monotonic())
        connection.flush()

    def _handle_opened(self, connection: LoadConnection, request: PendingRequest, value: Any) -> None:
        tally = self.record.tallies[RequestKind.OPEN]
        token = value.get("token") if isinstance(value, dict) else None
        if not isinstance(token, bytes) or len(token) != TOKEN_SIZE:
            tally.unequal += 1
            self._fail(connection, "the answer to session.open has no token")
            return
        tally.equal += 1
        self.record.latencies["session_open"].add(time.monotonic() - request.due)
        self.record.sessions += 1
        connection.token = token
        self._made(connection)
        for waiting in self._joining.pop(connection.index, ()):
            if waiting.stage is Stage.CONNECTED:
                self._join(waiting, connection)

    def _made(self, connection: LoadConnection) -> None:
        connection.stage = Stage.READY
        self.record.ready += 1
        self._count(self.record.connected_over_time, 1)
        self._settled(connection)

    def _fail(self, connection: LoadConnection, cause: str) -> None:
        """Record that a connection got no session, and the same for connections that wait for its session."""
        if connection.stage >= Stage.READY:
            return
        connection.stage = Stage.OVER
        count(self.record.lost_connections, escape_text(cause, 120))
        self._settled(connection)
        for waiting in self._joining.pop(connection.index, ()):
            self._fail(waiting, "its session could not be opened")

    def _settled(self, connection: LoadConnection) -> None:
        self._connecting.pop(connection, None)
        self._unsettled -= 1
        if not self._unsettled:
            self._wake()
        self._connect_waiting()

    # --- requests --------------------------------------------------------------------------------

    def _send(
        self, connection: LoadConnection, kind: RequestKind, due: float, number_of_requests: int
    ) -> None:
        if kind is RequestKind.LOAD:
            self.record.latencies["lag"].add(time.monotonic() - due)
        if connection.stage is not Stage.READY:
            tally = self.record.tallies[kind]
            tally.planned += number_of_requests
            count(tally.not_sent, "the connection was lost", number_of_requests)
            return
        for _ in range(number_of_requests):
            number = self._take_number()
            stream = OwnStream(self._target, due) if self._target and self._target.is_stream else None
            connection.queue(kind, self._method, self._params(number), number, due, stream)
        connection.flush()

    def _open_stream(self, connection: LoadConnection, due: float) -> None:
        share, items = self.share, self.record.items
        self.record.latencies["lag"].add(time.monotonic() - due)
        items.planned += share.items_per_stream
        number = self._take_number()
        stream = LoadStream(share, number, self._params(number)["data"], due)
        if connection.stage is Stage.READY and connection.queue(
            RequestKind.LOAD, share.stream, stream.params, number, due, stream
        ):
            items.sent += share.items_per_stream
            connection.flush()
        else:
            count(items.not_sent, "its stream could not be opened", share.items_per_stream)

    def item_arrived(self, kind: RequestKind, stream: LoadStream | OwnStream, value: Any) -> None:
        """Compare an item of a stream and time it."""
        record = self.record
        now = time.monotonic()
        if kind is RequestKind.LOAD:
            record.load_ended = now
            record.latencies["between_items" if stream.received else "first_item"].add(now - stream.last_at)
        stream.last_at = now
        if isinstance(stream, OwnStream):
            stream.received += 1
            return
        latency = now - stream.next_due
        if stream.take(value):
            record.items.equal += 1
            self._time("item", now, latency)
        else:
            record.items.unequal += 1

    def _take_number(self) -> int:
        number = self._number
        self._number += self.share.processes
        return number

    def _params(self, number: int) -> dict[str, Any]:
        """Return the params of a request: of the target, or its unique number and a payload that depends on it."""
        if self._target is not None:
            return self._target.params
        start = number * POOL_STEP % POOL_BYTES
        return {"n": number, "data": self._pool[start : start + self.share.payload_bytes]}

    def answered(self, connection: LoadConnection, request: PendingRequest, value: Any) -> None:
        """Compare the answer to a request."""
        self._answer_arrived()
        kind = request.kind
        if kind is RequestKind.OPEN:
            self._handle_opened(connection, request, value)
            return
        tally = self.record.tallies[kind]
        if request.stream is not None:
            self.record.items.lost += request.stream.missing
            is_right = request.stream.is_complete(value)
        elif kind is RequestKind.CLOSE or self._target is None:
            is_right = value == ({} if kind is RequestKind.CLOSE else self._params(request.number))
        else:
            is_right = self._target.is_right(value)
        if not is_right:
            tally.unequal += 1
            if kind is RequestKind.JOIN:
                self._fail(connection, "its first answer differs from the request")
            return
        tally.equal += 1
        if isinstance(request.stream, LoadStream):
            return  # its items were timed
        if kind is RequestKind.LOAD:
            now = self.record.load_ended = time.monotonic()
            self.record.latencies["from_send"].add(now - request.sent)
            self._time("request", now, now - request.due)
        elif kind is RequestKind.LAST:
            self.record.latencies["last_request"].add(time.monotonic() - request.due)
            self._count(self.record.answered_over_time, 1)
        elif kind is RequestKind.JOIN:
            self._made(connection)

    def _time(self, name: str, now: float, latency: float) -> None:
        """Record the latency of an answer or item of the load."""
        record = self.record
        record.latencies[name].add(latency)
        second = int(now - self.share.origin)
        latencies = record.request_by_second.get(second)
        if latencies is None:
            latencies = record.request_by_second[second] = Latencies()
        latencies.add(latency)
        self._count(record.answered_over_time, 1)

    def refused(self, connection: LoadConnection, request: PendingRequest, code: int) -> None:
        """Count the error of a request."""
        self._answer_arrived()
        if request.stream is not None:
            self.record.items.lost += request.stream.missing
        name = code_name(code)
        count(self.record.tallies[request.kind].errors, name)
        if request.kind in (RequestKind.OPEN, RequestKind.JOIN):
            self._fail(connection, f"no session: {name}")

    def _answer_arrived(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._wake()

    # --- losses ----------------------------------------------------------------------------------

    def connection_lost(self, connection: LoadConnection, cause: str) -> None:
        """Record that a connection ended before `close`."""
        self._drop_pending(connection)
        if connection.stage is Stage.READY:
            connection.stage = Stage.OVER
            self.record.ready -= 1
            count(self.record.lost_connections, escape_text(cause, 120))
            self._count(self.record.connected_over_time, -1)
        else:
            self._fail(connection, cause)

    def connection_gone(self) -> None:
        """Note that a transport is closed."""
        self._open_connections -= 1
        if not self._open_connections:
            self._wake()

    def _drop_pending(self, connection: LoadConnection) -> None:
        """Count the requests in flight of a connection as lost."""
        for request in connection.pending.values():
            self.record.tallies[request.kind].lost += 1
            if request.stream is not None:
                self.record.items.lost += request.stream.missing
            self.in_flight -= 1
        connection.pending.clear()
        if not self.in_flight:
            self._wake()

    def _count(self, series: dict[int, int], change: int) -> None:
        tick = int((time.monotonic() - self.share.origin) * TICKS_PER_SECOND)
        series[tick] = series.get(tick, 0) + change


def code_name(code: int) -> str:
    """Return the name of an error code, or its number if it is unknown."""
    try:
        return Code(code).name
    except ValueError:
        return f"CODE_{code}"


MAX_OPENED_PER_SECOND: Final = 2_500
"""By all processes. Opening a stream costs a server more than an item, and a late stream has only late items."""


def opening_times(share: Share, streams: int) -> Iterator[float]:
    """Yield when to open each stream, in seconds, over whole intervals: so their items are due evenly."""
    intervals = math.ceil(share.rate * share.processes / MAX_OPENED_PER_SECOND)
    return uniform_times(share.rate / intervals, streams)


class LoadStream:
    """The items of one stream. `half` is its state in the connection, once it is open."""

    __slots__ = ("_data", "_interval", "_number", "_planned", "due", "half", "last_at", "received", "wrong")

    def __init__(self, share: Share, number: int, data: bytes, due: float) -> None:
        self._planned = share.items_per_stream
        self._interval = share.interval_s
        self._number = number * share.items_per_stream  # no number occurs in two streams
        self._data = data
        self.due = due
        """When it should open, and so when its first item is due."""
        self.last_at = due
        self.half: ClientStream | None = None
        self.received = 0
        self.wrong = 0

    @property
    def params(self) -> dict[str, Any]:
        return {"n": self._number, "data": self._data, "count": self._planned, "interval": self._interval}

    @property
    def next_due(self) -> float:
        """When the next item is due."""
        return self.due + self.received * self._interval

    @property
    def missing(self) -> int:
        """The number of items that have not arrived."""
        return max(self._planned - self.received, 0)

    def take(self, value: Any) -> bool:
        """Compare the next item. Return whether it is the expected one."""
        is_right = self.missing > 0 and value == {"n": self._number + self.received, "data": self._data}
        self.received += 1
        self.wrong += not is_right
        return is_right

    def is_complete(self, result: Any) -> bool:
        """Return whether all items have arrived in order, and the result is right."""
        return not self.wrong and self.received == self._planned and result == {"items": self._planned}


class OwnStream:
    """A stream of an application's method, which may send any items. Its end is the answer to a request."""

    __slots__ = ("_target", "half", "last_at", "received")

    missing: Final = 0

    def __init__(self, target: Target, due: float) -> None:
        self._target = target
        self.last_at = due
        self.half: ClientStream | None = None
        self.received = 0

    def is_complete(self, result: Any) -> bool:
        return self._target.is_right(result)
