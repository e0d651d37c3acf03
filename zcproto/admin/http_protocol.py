"""The pump of one HTTP connection: transport <-> connection <-> handlers. It is the same above TLS, above plain TCP
and above a UNIX socket.

    data -> connection.receive_data -> request -> handler -> connection.respond -> transport.write

What it decides: one request at a time, and one a turn of the loop however many are sent together; a peer that does
not read is not read from, nor are its requests answered; a handler that raises is 500 with an incident's id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import Handler, HttpRequest, HttpResponse, Peer, text_response
from zcproto.http.security_headers import SecurityHeaders

if TYPE_CHECKING:
    from zcproto.server.eager import Worker
    from zcproto.server.state import ServerState

TAKEN_AT_LEAST: Final = 16_384
"""Bytes that a client which lets an answer wait must take in each `write_timeout`: a drip is no reading."""

WRITE_BUFFER: Final = 65_536
"""Bytes that wait for a client that reads slowly, before nothing more is answered."""


class HttpTransport(Protocol):
    """What is asked of the transport below."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def get_write_buffer_size(self) -> int: ...


class Routes(Protocol):
    """Who answers requests, as a Router tells."""

    def find(self, request: HttpRequest) -> Handler | HttpResponse: ...


@dataclass(slots=True)
class HttpCounters:
    """Plain integers; whoever reports them reads them."""

    connections_opened: int = 0
    write_timeouts: int = 0
    responses: dict[int, int] = field(default_factory=dict)
    """By status."""


class HttpEndpoint:
    """What all HTTP connections of one kind share. `peer_of` says who is at the other end of a transport."""

    def __init__(
        self,
        state: ServerState,
        routes: Routes,
        security: SecurityHeaders,
        limits: HttpLimits,
        peer_of: Callable[[Any], Peer],
    ) -> None:
        self.state = state
        self.routes = routes
        self.security = security
        self.limits = limits
        self.peer_of = peer_of
        self.counters = HttpCounters()
        self.connections: set[HttpProtocol] = set()
        self.answering = 0  # handlers that wait
        self._draining = False
        self._at_rest = asyncio.Event()

    def protocol(self) -> HttpProtocol:
        """A new connection's protocol."""
        return HttpProtocol(self)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Each connection may have one more answer; those that stand idle are closed by `close`."""
        self._draining = True
        for protocol in self.connections:
            protocol.go_away()
        self.answered()

    async def wait_at_rest(self) -> None:
        """After `drain`: return when no handler is at work."""
        await self._at_rest.wait()

    def answered(self) -> None:
        if self._draining and not self.answering:
            self._at_rest.set()

    def close(self) -> None:
        """Close every connection."""
        for protocol in list(self.connections):
            protocol.close()


class HttpProtocol(asyncio.Protocol):
    """One connection of an HttpEndpoint."""

    __slots__ = (
        "_connection",
        "_endpoint",
        "_next",
        "_number",
        "_paused_since",
        "_reading",
        "_transport",
        "_unread",
        "_worker",
        "deadline_tick",
        "peer",
    )

    def __init__(self, endpoint: HttpEndpoint) -> None:
        self._endpoint = endpoint
        self._transport: HttpTransport | None = None
        self._connection: HttpConnection | None = None
        self._number = 0
        self._next: HttpRequest | None = None  # sent together with the one before; its turn comes
        self._worker: Worker | None = None
        self._paused_since: float | None = None  # or since its peer last took its least
        self._unread = 0  # what waited for the peer then
        self._reading = True
        self.peer = ""
        self.deadline_tick = 0

    @property
    def id(self) -> str:
        """What the connection is called in the log."""
        state = self._endpoint.state
        if not self._number:
            self._number = state.number_connection()
        return f"{state.run}-{self._number}"

    def peer_certificate(self) -> bytes | None:
        """The client's certificate in DER form; None without one."""
        return None if self._transport is None else self._endpoint.peer_of(self._transport).certificate()

    # --- the transport's calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        endpoint = self._endpoint
        self._transport = cast("HttpTransport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER)
        peer = endpoint.peer_of(transport)
        self.peer = peer.address
        now = endpoint.state.clock.now()
        self._connection = HttpConnection(endpoint.limits, endpoint.security, now, peer)
        endpoint.connections.add(self)
        endpoint.counters.connections_opened += 1
        if endpoint.draining:
            self._connection.go_away()
        self._update()

    def data_received(self, data: bytes) -> None:
        connection, clock = self._connection, self._endpoint.state.clock
        if connection is not None:
            self._take(connection.receive_data(data, clock.wall(), clock.now()))
            self._update()

    def eof_received(self) -> None:
        self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()
        self._transport = None

    def pause_writing(self) -> None:
        self._paused_since = self._endpoint.state.clock.now()
        if self._transport is not None:
            self._unread = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._paused_since = None
        self._go_on()

    # --- requests ------------------------------------------------------------------------------------

    def _take(self, request: HttpRequest | None) -> None:
        """Run what answers a request, as far as it goes without waiting."""
        if request is None:
            return
        tasks = self._endpoint.state.tasks
        try:
            answer: Any = self._endpoint.routes.find(request)
            if not isinstance(answer, HttpResponse):
                answer = answer(request)
            if not isinstance(answer, HttpResponse):
                worker = tasks.start(answer)
                if worker is not None:
                    self._hold(worker)
                    return
                answer = tasks.result
        except Exception as error:
            self._fail(error)
        else:
            self._respond_safely(answer)

    def _hold(self, worker: Worker) -> None:
        endpoint = self._endpoint
        self._worker = worker
        endpoint.answering += 1

        def done(result: Any, error: BaseException | None) -> None:
            self._worker = None
            endpoint.answering -= 1
            if self._connection is not None:
                if error is None:
                    self._respond_safely(result)
                else:
                    self._fail(error)
                self._update()
            endpoint.answered()

        worker.done = done

    def _respond(self, response: HttpResponse) -> None:
        connection, clock = self._connection, self._endpoint.state.clock
        if connection is None:
            return
        following = connection.respond(response, clock.wall(), clock.now())
        if following is not None:
            self._next = following
            self._endpoint.state.call_soon(self._go_on)

    def _respond_safely(self, response: HttpResponse) -> None:
        """As `_respond`, with what a handler has made: it may hold what no response can."""
        try:
            self._respond(response)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        incident = self._endpoint.state.incident("http", error, peer=self.peer, connection=self.id)
        self._respond(text_response(500, f"internal error, incident {incident}", close=True))

    def _go_on(self) -> None:
        """Answer what came together with the last request, unless its peer must read first."""
        if self._paused_since is None:
            request, self._next = self._next, None
            self._take(request)
        self._update()

    # --- bytes out, and time -------------------------------------------------------------------------

    def _update(self) -> None:
        """Send what there is to send, and go by what the connection is in now."""
        connection, transport, endpoint = self._connection, self._transport, self._endpoint
        if connection is None or transport is None:
            return
        responses = endpoint.counters.responses
        for status in connection.sent:
            responses[status] = responses.get(status, 0) + 1
        connection.sent.clear()
        data = connection.data_to_send()
        if data:
            transport.write(data)
        if connection.closing:
            self.close()
            return
        deadline = connection.next_deadline()
        if self._paused_since is not None:  # no other counts: what waits, waits for the peer
            deadline = self._paused_since + endpoint.state.write_timeout
        endpoint.state.wheel.set(self, deadline)
        reading = connection.wants_data and self._paused_since is None
        if reading is not self._reading:
            self._reading = reading
            if reading:
                transport.resume_reading()  # last: it may bring data at once
            else:
                transport.pause_reading()

    def handle_deadline(self, now: float) -> None:
        connection, transport, endpoint = self._connection, self._transport, self._endpoint
        if connection is None or transport is None:
            return
        if self._paused_since is not None:
            unread = transport.get_write_buffer_size()
            if unread > self._unread - TAKEN_AT_LEAST:
                endpoint.counters.write_timeouts += 1
                self.abort()
                return
            self._paused_since, self._unread = now, unread
        else:
            connection.handle_timeout(endpoint.state.clock.wall(), now)
        self._update()

    # --- the end -------------------------------------------------------------------------------------

    def go_away(self) -> None:
        """The next answer is the last."""
        if self._connection is not None:
            self._connection.go_away()

    def close(self) -> None:
        """Close after what is queued."""
        transport = self._transport
        self._ended()
        if transport is not None:
            transport.close()

    def abort(self) -> None:
        """Reset the connection: its peer does not read."""
        transport = self._transport
        self._ended()
        if transport is not None:
            transport.abort()

    def _ended(self) -> None:
        """Let go of everything; only once. Nothing may keep a closed connection alive."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        endpoint = self._endpoint
        endpoint.state.wheel.discard(self)
        endpoint.connections.discard(self)
        self._next = None
        if self._worker is not None:
            self._worker.cancel()
