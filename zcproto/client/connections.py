"""The client's connections: one for new calls, and older ones on which requests are still in flight.

Decides: when to connect and reconnect.

Rules:
- Before the first connection, repeat an attempt only while nothing listens or the server goes away, for
  `start_timeout` seconds: the server may be starting, or replaced by a new one.
- After a loss, reconnect automatically with growing, jittered delays; after GOAWAY, when the server asked for it;
  after an idle close, when the next call needs it. The delays start again once a connection has lasted
  STABLE_AFTER: a server that answers and ends each one must not make its clients reconnect many times a second.
- After the server has ended the session, do not reconnect until the application asks for a session.
- Concurrent callers share one attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from math import inf
from typing import Final

from zcproto.client.protocol import ClientProtocol
from zcproto.client.retry import MAX_RETRY_AFTER_MS, Backoff, is_transient
from zcproto.connection.events import EventReceived, GoAwayReason, GoAwayReceived
from zcproto.errors import CannotConnect, ConnectionClosed, TlsError, ZcprotoError

IDLE_REASONS: Final = frozenset({GoAwayReason.IDLE, GoAwayReason.NO_SESSION})
"""The server's reasons to close an unused connection: a new one would be closed again."""

STABLE_AFTER: Final = 5.0
"""Seconds after which a connection counts as a success."""

MAX_START_DELAY: Final = 1.0
"""Maximum of seconds between two attempts to connect to a server that is starting."""


class _GoingAway(CannotConnect):
    """GOAWAY arrived together with WELCOME."""


@dataclass(eq=False, repr=False)
class ConnectionManager:
    """Manages the connections to one server.

    `current` takes new calls; None without a connection. `last_error` is the cause of the last failed attempt.
    `on_event` is called with the server's events, `on_connected` with each new connection, `on_starting` once if
    nothing listens before the first one. `is_wanted` returns whether to reconnect before the next call.
    """

    _loop: asyncio.AbstractEventLoop
    _dial: Callable[[ConnectionManager], Awaitable[ClientProtocol]]
    _backoff: Backoff
    _: KW_ONLY
    on_event: Callable[[EventReceived], None]
    on_connected: Callable[[ClientProtocol], None]
    is_wanted: Callable[[], bool]
    start_timeout: float = 0.0
    on_starting: Callable[[], None] = lambda: None
    current: ClientProtocol | None = field(default=None, init=False)
    last_error: ZcprotoError | None = field(default=None, init=False)
    _older: set[ClientProtocol] = field(default_factory=set, init=False)  # until their TLS close is complete
    _connecting: asyncio.Task[None] | None = field(default=None, init=False)
    _not_before: float = field(default=0.0, init=False)
    _stable_at: float = field(default=inf, init=False)  # when `current` counts as a success
    _was_connected: bool = field(default=False, init=False)
    _closed: bool = field(default=False, init=False)

    async def get(self) -> ClientProtocol:
        """Return the connection for new calls; connect first if necessary, and retry transient failures.

        Raises the error of the first attempt after the server has started, and later only permanent ones: TlsError,
        CertificateError, ConnectionClosed.
        """
        while self.current is None:
            if self._closed:
                raise ConnectionClosed("this client is closed", clean=True)
            await join(self._start())
        return self.current

    def _start(self) -> asyncio.Task[None]:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return self._connecting

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # mark it as retrieved: without a waiter the next call connects again and raises it

    async def _connect(self) -> None:
        starts_until = self._loop.time() + self.start_timeout
        is_starting = False
        while True:
            delay = self._not_before - self._loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
            try:
                connection = await self._dial(self)
                if connection.draining:
                    raise _GoingAway("the server is going away")
                if connection.error is not None:
                    raise connection.error
            except (ConnectionClosed, TlsError) as error:
                self.last_error = error
                delay = self._backoff.next()
                if self._was_connected:
                    if isinstance(error, TlsError) and not is_transient(error.failure):
                        raise
                else:
                    delay = min(delay, MAX_START_DELAY)
                    is_refused = isinstance(error, CannotConnect) and error.refused
                    begins_at = max(self._loop.time() + delay, self._not_before)
                    if not (is_refused or isinstance(error, _GoingAway)) or begins_at >= starts_until:
                        raise
                    if is_refused and not is_starting:
                        is_starting = True
                        self.on_starting()
                self._delay(delay)
                continue
            if not self._was_connected:
                self._was_connected = True
                self._backoff.reset()
            self.current = connection
            self._stable_at = self._loop.time() + STABLE_AFTER
            self.on_connected(connection)
            return

    def _delay(self, delay: float) -> None:
        self._not_before = max(self._not_before, self._loop.time() + delay)

    # --- called by a connection -------------------------------------------------------------------

    def event_received(self, connection: ClientProtocol, event: EventReceived) -> None:
        # Later in this turn: callers that await an answer of the same read resume first.
        self._loop.call_soon(self.on_event, event)

    def connection_draining(self, connection: ClientProtocol, event: GoAwayReceived) -> None:
        if connection is self.current:
            self.current = None
            self._older.add(connection)
        if event.reason not in IDLE_REASONS:
            self._reconnect(min(event.retry_after_ms, MAX_RETRY_AFTER_MS))

    def connection_ended(self, connection: ClientProtocol, error: ConnectionClosed) -> None:
        self._older.add(connection)
        connection.gone.add_done_callback(lambda _: self._older.discard(connection))
        if connection is not self.current:
            return
        self.current = None
        self.last_error = error
        self._reconnect(0)

    def _reconnect(self, retry_after_ms: int) -> None:
        """Delay the next attempt to connect, and start it now if it is wanted."""
        if self._loop.time() >= self._stable_at:
            self._backoff.reset()
        self._stable_at = inf
        self._delay(self._backoff.next(retry_after_ms))
        if self._was_connected and not self._closed and self.is_wanted():
            self._start()

    async def close(self) -> None:
        """Close all connections. Each ends within the time limit of a TLS close."""
        self._closed = True
        connections = self._older | ({self.current} if self.current is not None else set())
        self.current = None
        for connection in connections:
            connection.close("closed by this client")
        leaving: list[asyncio.Future[None]] = [connection.gone for connection in connections]
        if self._connecting is not None:
            self._connecting.cancel()
            leaving.append(self._connecting)
        try:
            if leaving:
                await asyncio.wait(leaving)
        finally:  # a caller that is cancelled here may stop the loop at once
            for connection in connections:
                connection.abort()


async def join(task: asyncio.Task[None]) -> None:
    """Await a task that is shared with other callers: cancelling one of them does not cancel it."""
    await asyncio.wait([task])
    if task.cancelled():
        raise ConnectionClosed("this client is closed", clean=True)
    task.result()
