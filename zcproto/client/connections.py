"""The client's connections: one for new calls, extra ones for calls that find no room on it (gRPC proposal A105),
and older ones on which requests are still in flight.

    Endpoints -> Round -> dial, several at once -> the first one with WELCOME: current

Decides: when to connect and reconnect, when an extra connection is made and closed, which call gets the next room.

Rules:
- Before the first connection, repeat a round only while nothing listens or the server goes away, for
  `start_timeout` seconds: the server may be starting, or replaced by a new one.
- After a loss or GOAWAY, reconnect automatically, to another endpoint at once if there is one that does not rest;
  after an idle close, when the next call needs it. A connection is kept until then, even if a name resolves to
  others now.
- While requests wait for a silent server, connect to another endpoint beside it, and move there if the session is
  accepted before a byte arrives (zcp1.md, section 11.2). With one endpoint, wait: a server that is merely busy must
  not get handshakes on top.
- After the server has ended the session, do not reconnect until the application asks for a session.
- Concurrent callers share one round.
- An extra connection is made, to where the main one is, while calls wait for room and all connections have as many
  requests in flight as the server allows: one at a time. A failure does not fail a call. The next attempt after it,
  or after a loss, is delayed. Calls are served in order of arrival, by whichever connection has room first.
- An extra connection takes calls once the requests that show the sessions there were answered.
- An extra connection is closed when nothing was in flight on it for IDLE_AFTER. A lost one is not replaced until it
  is needed.

Must not know: sessions, except that `on_connected`, `on_extra` and `shows_session` show them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from math import inf
from typing import Any, Final

from zcproto.client.dial import Resolve
from zcproto.client.endpoints import Address, Endpoint, Endpoints, GoingAway, Round, is_ip
from zcproto.client.protocol import ClientProtocol, WaitingQueue, join, mark_retrieved
from zcproto.client.retry import Backoff
from zcproto.connection.events import EventReceived, GoAwayReason, GoAwayReceived
from zcproto.errors import CannotConnect, ConnectionClosed, TlsError, ZcprotoError
from zcproto.wire.frame import NO_TOKEN

IDLE_REASONS: Final = frozenset({GoAwayReason.IDLE, GoAwayReason.NO_SESSION})
"""The server's reasons to close an unused connection: a new one would be closed again."""

SILENT: Final = "the server did not answer a PING, and another address took over"

_SESSION_EVENTS: Final = "session."
"""Events that a server sends on all connections of a session."""

IDLE_AFTER: Final = 30.0
"""Seconds."""


@dataclass(eq=False, repr=False)
class ExtraConnections:
    """At most `limit` connections beside the main one. `on_opened` is called with each new one."""

    _loop: asyncio.AbstractEventLoop
    _dial: Callable[[Endpoint], Awaitable[ClientProtocol]]
    _backoff: Backoff
    limit: int
    on_opened: Callable[[ClientProtocol], None]
    _used_at: dict[ClientProtocol, float] = field(default_factory=dict, init=False)
    _waiting: WaitingQueue = field(default_factory=WaitingQueue, init=False)
    connecting: asyncio.Task[None] | None = field(default=None, init=False)
    _not_before: float = field(default=0.0, init=False)
    _idle_timer: asyncio.TimerHandle | None = field(default=None, init=False)

    def __contains__(self, connection: ClientProtocol) -> bool:
        return connection in self._used_at

    def __iter__(self) -> Iterator[ClientProtocol]:
        return iter([*self._used_at])

    async def wait_ready(self, main: ClientProtocol) -> ClientProtocol:
        """Return a connection that has room for a request, or the main one if it takes no more."""
        was_woken = False
        while True:
            if main.draining or main.error is not None:
                return main
            for connection in (main, *self._used_at):
                if connection.ready:
                    if connection is not main:
                        self._used_at[connection] = self._loop.time()
                    # There may be more room than when this caller was woken.
                    self.wake(connection.free_streams - 1)
                    return connection
            if all(connection.free_streams <= 0 for connection in (main, *self._used_at)):
                self._grow(main.endpoint)
            await self._waiting.wait(was_woken=was_woken, pass_on=partial(self.wake, 1))
            was_woken = True

    def wake(self, requests: int) -> None:
        """Wake the next callers, as many as there is room for."""
        self._waiting.wake(requests)

    def wake_all(self) -> None:
        """Wake all callers: the main connection takes no more requests."""
        self._waiting.wake_all()

    # --- opening and closing ----------------------------------------------------------------------

    def _grow(self, endpoint: Endpoint) -> None:
        """Make another connection, unless that is under way, was refused lately, or there are too many."""
        if (
            self.connecting is None
            and len(self._used_at) < self.limit
            and self._loop.time() >= self._not_before
        ):
            self.connecting = self._loop.create_task(self._connect(endpoint))

    async def _connect(self, endpoint: Endpoint) -> None:
        try:
            connection = await self._dial(endpoint)
        except ZcprotoError:  # the main connection still serves
            self._not_before = self._loop.time() + self._backoff.next()
            return
        finally:
            self.connecting = None
        if connection.draining or connection.error is not None:
            self._not_before = self._loop.time() + self._backoff.next(connection.retry_after_ms)
            return
        self._used_at[connection] = self._loop.time()
        self._close_later()
        self.on_opened(connection)
        connection.hold()
        self.wake(connection.free_streams)
        if self._waiting:
            self._grow(endpoint)

    def _close_later(self) -> None:
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(IDLE_AFTER, self._close_idle)

    def _close_idle(self) -> None:
        """Close the connections that were not used lately."""
        self._idle_timer = None
        idle_since = self._loop.time() - IDLE_AFTER
        for connection, used_at in [*self._used_at.items()]:
            if used_at <= idle_since and connection.is_idle:
                self.discard(connection)
                self._backoff.reset()
                connection.close("no calls for an extra connection")
        if self._used_at:
            self._close_later()

    def discard(self, connection: ClientProtocol) -> None:
        """Stop using a connection: it was lost, or the server goes away."""
        if self._used_at.pop(connection, None) is not None:
            self._not_before = self._loop.time() + self._backoff.next(connection.retry_after_ms)

    def close(self) -> None:
        """Make no more connections. The caller closes those that are open, and cancels `connecting`."""
        self.limit = 0
        if self._idle_timer is not None:
            self._idle_timer.cancel()


@dataclass(eq=False, repr=False)
class ConnectionManager:
    """Manages the connections of a client.

    `current` takes new calls; None without a connection. `on_event` is called with the server's events,
    `on_connected` with each new connection, `on_extra` with each one beside it, of which there are `max_extra`.
    `shows_session` shows the session on a connection that is not used yet, and returns whether that was accepted.
    `on_starting` is called once if nothing listens before the first connection. `is_wanted` returns whether to
    reconnect before the next call.
    """

    _loop: asyncio.AbstractEventLoop
    _resolve: Resolve
    _dial: Callable[[ConnectionManager, Endpoint, Callable[[], None]], Coroutine[Any, Any, ClientProtocol]]
    _endpoints: Endpoints
    _: KW_ONLY
    on_event: Callable[[EventReceived], None]
    on_connected: Callable[[ClientProtocol], None]
    on_extra: Callable[[ClientProtocol], None]
    shows_session: Callable[[ClientProtocol], Awaitable[bool]]
    is_wanted: Callable[[], bool]
    max_extra: int = 0
    start_timeout: float = 0.0
    on_starting: Callable[[], None] = lambda: None
    current: ClientProtocol | None = field(default=None, init=False)
    extra: ExtraConnections = field(init=False)
    _older: set[ClientProtocol] = field(default_factory=set, init=False)  # until their TLS close is complete
    _connecting: asyncio.Task[None] | None = field(default=None, init=False)
    _standby: asyncio.Task[None] | None = field(default=None, init=False)  # connects while a server is silent
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.extra = ExtraConnections(
            self._loop,
            lambda endpoint: self._dial(self, endpoint, lambda: None),
            Backoff(self._endpoints.random),
            self.max_extra,
            self.on_extra,
        )

    @property
    def last_error(self) -> ZcprotoError | None:
        """The cause of the last failed attempt, or of the last loss."""
        return self._endpoints.last_error

    @property
    def open(self) -> list[ClientProtocol]:
        """All connections that have not ended, with those that take no more requests."""
        current = [] if self.current is None else [self.current]
        return [*current, *self.extra, *(each for each in self._older if each.error is None)]

    async def get(self) -> ClientProtocol:
        """Return the connection for new calls; connect first if necessary, and retry transient failures.

        Raises the error of the first round after a server has started, and later only permanent ones: TlsError,
        CertificateError, ConnectionClosed.
        """
        while self.current is None:
            if self._closed:
                raise ConnectionClosed("this client is closed; create a new one", clean=True)
            await join(self._start())
        return self.current

    async def wait_ready(self) -> ClientProtocol:
        """Return a connection that has room for a request, or takes no more. Raises like `get`."""
        connection = await self.get()
        if self.max_extra:
            return await self.extra.wait_ready(connection)
        await connection.wait_ready()
        return connection

    # --- connecting -------------------------------------------------------------------------------

    def _start(self) -> asyncio.Task[None]:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return self._connecting

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        mark_retrieved(task)  # without a waiter the next call connects again and raises it

    async def _connect(self) -> None:
        loop, endpoints = self._loop, self._endpoints
        starts_until = loop.time() + self.start_timeout
        is_starting = False
        while True:
            delay = endpoints.due_at - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
            connection = await self._try_all(endpoints.begin_round())
            if connection is not None:
                fault = _fault_of(connection)
                if fault is None:
                    break
                endpoints.failed(connection.endpoint, fault, loop.time(), connection.retry_after_ms)
            error = endpoints.failure(starts_until)
            if error is not None:
                raise error
            if not endpoints.was_connected and not is_starting and endpoints.is_refused:
                is_starting = True
                self.on_starting()
        self.current = connection
        endpoints.connected(connection.endpoint, loop.time())
        self.on_connected(connection)

    async def _connect_standby(self, silent: ClientProtocol) -> None:
        """Connect to another endpoint than a silent server's, and move there if it is silent until then."""
        connection = await self._try_all(self._endpoints.begin_round(silent.endpoint))
        if connection is None:
            return
        try:
            is_accepted = await self.shows_session(connection)
            fault = _fault_of(connection)
            if fault is None and not is_accepted:
                fault = CannotConnect(f"{connection.endpoint.address}: the server did not accept the session")
            if fault is not None:
                now, asked = self._loop.time(), connection.retry_after_ms
                self._endpoints.failed(connection.endpoint, fault, now, asked)
            elif silent.conversation.is_silent:
                self._move(silent, connection)
        finally:
            if connection is not self.current:
                connection.close("another connection is used")

    def _move(self, silent: ClientProtocol, connection: ClientProtocol) -> None:
        """Use another connection, and lose those on which the silent server has not answered."""
        asked = silent.conversation
        lost = [each for each in self.extra if not each.conversation.has_answered_since(asked)]
        now = self._loop.time()
        self._endpoints.failed(silent.endpoint, ConnectionClosed(SILENT), now)
        self._endpoints.connected(connection.endpoint, now)
        self.current = connection
        for each in (silent, *lost):
            each.lose(SILENT)
        self.extra.wake_all()
        self.on_connected(connection)

    def _leave_standby(self) -> None:
        """Stop connecting elsewhere: the server is not silent any more, or not used."""
        if self._standby is not None:
            self._standby.cancel()

    def _standby_done(self, task: asyncio.Task[None]) -> None:
        self._standby = None
        mark_retrieved(task)  # the silent connection goes on

    async def _try_all(self, attempts: Round) -> ClientProtocol | None:
        """Make the attempts of a round. Return the first connection; None if all have failed."""
        loop = self._loop
        names: dict[asyncio.Task[Sequence[str]], Address] = {}
        running: dict[asyncio.Task[ClientProtocol], Endpoint] = {}
        for address in attempts.order:
            if is_ip(address.host):
                attempts.resolved(address, [address.host], loop.time())
            else:
                names[loop.create_task(self._resolve(address))] = address
        try:
            while True:
                step = attempts.next(loop.time())
                if isinstance(step, Endpoint):
                    on_reached = partial(self._reached, attempts, step)
                    running[loop.create_task(self._dial(self, step, on_reached))] = step
                    continue
                if not (names or running):
                    return None
                timeout = None if step == inf else step - loop.time()
                await asyncio.wait([*names, *running], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for name in [each for each in names if each.done()]:
                    address = names.pop(name)
                    try:
                        attempts.resolved(address, name.result(), loop.time())
                    except (ConnectionClosed, TlsError) as error:
                        attempts.unresolved(address, error, loop.time())
                for attempt in [each for each in running if each.done()]:
                    endpoint = running.pop(attempt)
                    try:
                        return attempt.result()
                    except (ConnectionClosed, TlsError) as error:
                        attempts.failed(endpoint, error, loop.time())
        finally:
            await self._abandon([*names, *running])

    def _reached(self, attempts: Round, endpoint: Endpoint) -> None:
        attempts.reached(endpoint, self._loop.time())

    @staticmethod
    async def _abandon(tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Cancel the attempts that are under way, and close the connection of one that was too late."""
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if (
                not task.cancelled()
                and task.exception() is None
                and isinstance(task.result(), ClientProtocol)
            ):
                task.result().close("another address has answered first")

    # --- called by a connection -------------------------------------------------------------------

    def event_received(self, connection: ClientProtocol, event: EventReceived) -> None:
        if connection in self.extra and (event.token == NO_TOKEN or event.name.startswith(_SESSION_EVENTS)):
            return  # it comes on the main connection, too
        # Later in this turn: callers that await an answer of the same read resume first.
        self._loop.call_soon(self.on_event, event)

    def connection_free(self, connection: ClientProtocol, requests: int) -> None:
        self.extra.wake(requests)

    @property
    def has_other_address(self) -> bool:
        return self._endpoints.has_several

    def connection_silent(self, connection: ClientProtocol) -> None:
        main = self.current
        if connection is main:
            if self._standby is None:
                self._standby = self._loop.create_task(self._connect_standby(main))
                self._standby.add_done_callback(self._standby_done)
        elif connection in self.extra and main is not None:
            if main.conversation.has_answered_since(connection.conversation):
                connection.lose(SILENT)  # the process behind it hangs, but not that of the main connection
            else:
                main.probe()

    def connection_heard(self, connection: ClientProtocol) -> None:
        if connection is self.current:
            self._leave_standby()

    def connection_draining(self, connection: ClientProtocol, event: GoAwayReceived) -> None:
        self._older.add(connection)
        self.extra.discard(connection)
        if connection is not self.current:
            return
        self._leave()
        if event.reason not in IDLE_REASONS:
            self._reconnect(connection)

    def connection_ended(self, connection: ClientProtocol, error: ConnectionClosed) -> None:
        self._older.add(connection)
        connection.closed.add_done_callback(lambda _: self._older.discard(connection))
        self.extra.discard(connection)
        if connection is not self.current:
            return
        self._leave()
        self._endpoints.last_error = error
        self._reconnect(connection)

    def _leave(self) -> None:
        """Stop using the current connection."""
        self.current = None
        self._leave_standby()
        self.extra.wake_all()

    def _reconnect(self, lost: ClientProtocol) -> None:
        """Let the endpoint of a connection rest, and connect again now if that is wanted."""
        self._endpoints.lost(lost.endpoint, self._loop.time(), lost.retry_after_ms)
        if not self._closed and self.is_wanted():
            self._start()

    # --- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close all connections. Each ends within the time limit of a TLS close."""
        self._closed = True
        self.extra.close()
        connections = {*self._older, *self.extra} | ({self.current} if self.current is not None else set())
        self._leave()
        for connection in connections:
            connection.close("closed by this client")
        leaving: list[asyncio.Future[Any]] = [connection.closed for connection in connections]
        for connecting in (self._connecting, self._standby, self.extra.connecting):
            if connecting is not None:
                connecting.cancel()
                leaving.append(connecting)
        try:
            if leaving:
                await asyncio.wait(leaving)
        finally:  # a caller that is cancelled here may stop the loop at once
            for connection in connections:
                connection.abort()


def _fault_of(connection: ClientProtocol) -> CannotConnect | ConnectionClosed | None:
    """Return why a new connection cannot be used."""
    return GoingAway("the server is going away") if connection.draining else connection.error
