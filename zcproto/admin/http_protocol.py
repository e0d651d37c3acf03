"""The pump of one HTTP connection: transport <-> connection <-> handlers, above TLS, plain TCP or a UNIX socket.

    data -> connection.receive_data -> request -> handler -> connection.respond -> transport.write

Decides: when a request is answered, and what happens to a slow reader.

Rules:
- One request at a time, and one per turn of the loop however many are pipelined.
- From a peer that does not read, nothing more is read, and its requests are not answered.
- A handler that raises is answered with 500 and the id of the incident.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import Handler, HttpRequest, HttpResponse, Peer, SecurityHeaders, text_response
from zcproto.server.eager import EagerWorker
from zcproto.server.state import ServerState

MIN_READ: Final = 16_384
"""Bytes that a slow client must read in each `write_timeout`: less counts as not reading."""

WRITE_BUFFER: Final = 65_536
"""Bytes that may be buffered for a slow client before its next request waits."""


@dataclass(slots=True, eq=False)
class HttpEndpoint:
    """The shared state of all HTTP connections of one kind.

    `find` returns the handler of a request or a response. `peer_of` returns the peer of a transport.
    """

    state: ServerState
    find: Callable[[HttpRequest], Handler | HttpResponse]
    security: SecurityHeaders
    limits: HttpLimits
    peer_of: Callable[[Any], Peer]
    connections_opened: int = 0
    write_timeouts: int = 0
    responses: dict[int, int] = field(default_factory=dict)
    """Counts by status."""
    connections: set[HttpProtocol] = field(default_factory=set)
    answering: int = 0
    """Running handlers."""
    draining: bool = False
    _at_rest: asyncio.Event = field(default_factory=asyncio.Event)

    def protocol(self) -> HttpProtocol:
        """Return the protocol of a new connection."""
        return HttpProtocol(self)

    def drain(self) -> None:
        """Let each connection have one more response; idle ones are closed by `close`."""
        self.draining = True
        for protocol in self.connections:
            protocol.go_away()
        self.answered()

    async def wait_at_rest(self) -> None:
        """Wait, after `drain`, until no handler runs."""
        await self._at_rest.wait()

    def answered(self) -> None:
        if self.draining and not self.answering:
            self._at_rest.set()

    def close(self) -> None:
        """Close every connection."""
        for protocol in list(self.connections):
            protocol.close()


@dataclass(slots=True, eq=False, repr=False)
class HttpProtocol(asyncio.Protocol):
    """One connection of an HttpEndpoint."""

    _endpoint: HttpEndpoint
    _transport: asyncio.Transport | None = None
    _connection: HttpConnection | None = None
    _number: int = 0
    _next: HttpRequest | None = None  # pipelined; answered in a later turn of the loop
    _worker: EagerWorker | None = None
    _paused_since: float | None = None  # or since the peer last read MIN_READ
    _unread: int = 0  # bytes buffered at that time
    _reading: bool = True
    peer: str = ""
    deadline_tick: int = 0

    @property
    def id(self) -> str:
        """The id of the connection in the log."""
        state = self._endpoint.state
        if not self._number:
            self._number = next(state.numbers)
        return f"{state.run}-{self._number}"

    @property
    def is_ended(self) -> bool:
        """Whether no more requests are answered, though the transport may be open."""
        return self._connection is None

    def peer_certificate(self) -> bytes | None:
        """Return the client's certificate in DER form, or None."""
        return None if self._transport is None else self._endpoint.peer_of(self._transport).certificate()

    # --- called by the transport -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        endpoint = self._endpoint
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER)
        peer = endpoint.peer_of(transport)
        self.peer = peer.address
        now = endpoint.state.clock.now()
        self._connection = HttpConnection(endpoint.limits, endpoint.security, now, peer)
        endpoint.connections.add(self)
        endpoint.connections_opened += 1
        if endpoint.draining:
            self._connection.go_away()
        self._update()

    def data_received(self, data: bytes) -> None:
        connection, clock = self._connection, self._endpoint.state.clock
        if connection is not None:
            self._take(connection.receive_data(data, clock.wall(), clock.now()))
            self._update()

    def eof_received(self) -> None:
        self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        self._release()
        self._transport = None

    def pause_writing(self) -> None:
        self._paused_since = self._endpoint.state.clock.now()
        if self._transport is not None:
            self._unread = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._paused_since = None
        self._continue()

    # --- requests ------------------------------------------------------------------------------------

    def _take(self, request: HttpRequest | None) -> None:
        """Start the handler of a request, and respond if it does not have to wait."""
        if request is None:
            return
        tasks = self._endpoint.state.tasks
        try:
            answer: Any = self._endpoint.find(request)
            if not isinstance(answer, HttpResponse):
                answer = answer(request)
            if not isinstance(answer, HttpResponse):
                worker = tasks.start(answer)
                if worker is not None:
                    self._await(worker)
                    return
                answer = tasks.result
        except Exception as error:
            self._fail(error)
        else:
            self._respond_safely(answer)

    def _await(self, worker: EagerWorker) -> None:
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
            self._endpoint.state.call_soon(self._continue)

    def _respond_safely(self, response: HttpResponse) -> None:
        """Respond with the result of a handler, which may not be a valid response."""
        try:
            self._respond(response)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        incident = self._endpoint.state.incident("http", error, peer=self.peer, connection=self.id)
        self._respond(text_response(500, f"internal error, incident {incident}", close=True))

    def _continue(self) -> None:
        """Start the pipelined request, unless the peer must read first."""
        if self._paused_since is None:
            request, self._next = self._next, None
            self._take(request)
        self._update()

    # --- bytes out, and time -------------------------------------------------------------------------

    def _update(self) -> None:
        """Write pending data, then update the deadline and the reading of the transport."""
        connection, transport, endpoint = self._connection, self._transport, self._endpoint
        if connection is None or transport is None:
            return
        responses = endpoint.responses
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
        if self._paused_since is not None:  # replaces any other deadline: everything waits for the peer
            deadline = self._paused_since + endpoint.state.write_timeout
        endpoint.state.wheel.set(self, deadline)
        reading = connection.wants_data and self._paused_since is None
        if reading is not self._reading:
            self._reading = reading
            if reading:
                transport.resume_reading()  # last: it may deliver data at once
            else:
                transport.pause_reading()

    def handle_deadline(self, now: float) -> None:
        connection, transport, endpoint = self._connection, self._transport, self._endpoint
        if connection is None or transport is None:
            return
        if self._paused_since is not None:
            unread = transport.get_write_buffer_size()
            if unread > self._unread - MIN_READ:
                endpoint.write_timeouts += 1
                self.abort()
                return
            self._paused_since, self._unread = now, unread
        else:
            connection.handle_timeout(endpoint.state.clock.wall(), now)
        self._update()

    # --- the end -------------------------------------------------------------------------------------

    def go_away(self) -> None:
        """Make the next response the last."""
        if self._connection is not None:
            self._connection.go_away()

    def close(self) -> None:
        """Close after writing the buffered data."""
        transport = self._transport
        self._release()
        if transport is not None:
            transport.close()

    def abort(self) -> None:
        """Reset the connection."""
        transport = self._transport
        self._release()
        if transport is not None:
            transport.abort()

    def _release(self) -> None:
        """Release all references, so that nothing keeps a closed connection alive. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        endpoint = self._endpoint
        endpoint.state.wheel.discard(self)
        endpoint.connections.discard(self)
        self._next = None
        if self._worker is not None:
            self._worker.cancel()
