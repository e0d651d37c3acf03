"""The pump of one client connection: TLS transport <-> conversation <-> waiting calls.

    request -> connection.request -> once a turn: connection.data_to_send -> transport.write
    data -> connection.receive_data -> for each answer: the call that waits for it

What it decides: which call gets which answer, when a call may be sent (streams, back-pressure), how a timed out or
cancelled call leaves without disturbing another, keepalive, and what the calls still waiting at the end are
told. It knows no retries and no sessions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, Protocol, cast

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import (
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.connection.state import State
from zcproto.errors import CallError, ConnectionClosed, DeadlineExceeded, TlsError

SENT_AT_ONCE: Final = 65_536
"""Bytes of requests gathered in one turn of the loop, beyond which they are written without waiting for its end:
back-pressure must be felt before more is made."""

REASON_SHOWN: Final = 200


class Owner(Protocol):
    """Whoever uses a connection, and is told what concerns it as a whole."""

    def event_received(self, link: ClientProtocol, event: EventReceived) -> None: ...

    def link_draining(self, link: ClientProtocol, event: GoAwayReceived) -> None: ...

    def link_lost(self, link: ClientProtocol, error: ConnectionClosed) -> None: ...


class PendingCall(asyncio.Future[Any]):
    """A request on its way; its result is the answer. It is an entry of the wheel, for its deadline."""

    __slots__ = ("deadline_tick", "link", "stream")

    def __init__(self, loop: asyncio.AbstractEventLoop, link: ClientProtocol, stream: int) -> None:
        super().__init__(loop=loop)
        self.deadline_tick = 0
        self.link = link
        self.stream = stream

    def handle_deadline(self, now: float) -> None:
        if self.link.abandon(self) and not self.done():
            self.set_exception(DeadlineExceeded("no answer within the call's timeout"))


class ClientProtocol(asyncio.Protocol):
    """One connection to a server.

    `ready` says that a request may be sent now; wait for it with `wait_ready`. `error` is why the connection
    ended, once it did. `answered` says whether any request was answered here, `proved` whether a device has proved
    its key here. After the end,
    `unanswered_not_run` says that what had no answer was certainly not run: the server had said GOAWAY, and
    then closed in an orderly way.
    """

    __slots__ = (
        "_clock",
        "_connection",
        "_flush_planned",
        "_loop",
        "_max_streams",
        "_owner",
        "_paused",
        "_pending",
        "_ready_waiters",
        "_transport",
        "_wheel",
        "answered",
        "deadline_tick",
        "draining",
        "error",
        "gone",
        "proved",
        "ready",
        "unanswered_not_run",
        "welcomed",
    )

    def __init__(
        self,
        owner: Owner,
        loop: asyncio.AbstractEventLoop,
        wheel: DeadlineWheel,
        clock: Clock,
        connection: ClientConnection,
    ) -> None:
        self._owner: Owner | None = owner
        self._loop = loop
        self._wheel = wheel
        self._clock = clock
        self._connection = connection
        self._transport: asyncio.Transport | None = None
        self._pending: dict[int, PendingCall] = {}
        self._ready_waiters: deque[asyncio.Future[None]] | None = None
        self._flush_planned = False
        self._paused = False
        self._max_streams = 0
        self.deadline_tick = 0
        self.ready = False
        self.draining = False
        self.answered = False
        self.proved = False
        self.unanswered_not_run = False
        self.error: ConnectionClosed | None = None
        self.welcomed: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()

    @property
    def welcome(self) -> Mapping[str, Any]:
        """What the server said in its WELCOME."""
        return self._connection.welcome

    @property
    def clock_offset_ms(self) -> int:
        """The server's clock minus ours."""
        return self._connection.clock_offset_ms

    @property
    def has_session(self) -> bool:
        """Whether the server is known to have taken a session's token here."""
        return self._connection.has_session

    @property
    def salt(self) -> bytes:
        """What no other connection has: proofs are made for it."""
        return self._connection.salt

    @property
    def leaf(self) -> bytes:
        """SHA-256 of the certificate (DER) that the server has shown here. Empty once the connection is gone."""
        tls = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        return b"" if certificate is None else sha256(certificate).digest()

    # --- the transport's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        pending = self._pending
        for event in self._connection.receive_data(data, self._clock.wall(), self._wheel.now()):
            if event.__class__ is ResponseReceived:
                call = pending.pop(event.stream, None)
                if call is not None:
                    self._wheel.discard(call)
                    if not call.done():  # its task may have been cancelled in this very turn
                        call.set_result(event.value)
                self.answered = True
            else:
                self._handle(event)
                if self.error is not None:
                    return
        if self._connection.queued_bytes:
            self._flush_soon()
        if not self.ready or self._ready_waiters:
            self._update_ready()
        if self.draining and not pending:
            self.close("the server is going away")

    def eof_received(self) -> None:
        self._ended(self._closed_by_peer())

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, TlsError):
            self._ended(ConnectionClosed(exc.failure))
        else:
            self._ended(self._closed_by_peer())
        self._transport = None
        self.gone.set_result(None)

    def _closed_by_peer(self) -> ConnectionClosed:
        if self.error is None:
            self.unanswered_not_run = self.draining
        return ConnectionClosed("the server closed the connection", clean=True)

    def pause_writing(self) -> None:
        self._paused = True
        self.ready = False

    def resume_writing(self) -> None:
        self._paused = False
        self._update_ready()

    # --- what the server says ---------------------------------------------------------------------

    def _handle(self, event: ClientEvent) -> None:
        if isinstance(event, ErrorReceived):
            self.answered = True
            call = self._pending.pop(event.stream, None)
            if call is not None:
                self._wheel.discard(call)
                if not call.done():
                    call.set_exception(CallError.from_wire(event.code, event.message, event.details))
        elif isinstance(event, EventReceived):
            assert self._owner is not None
            self._owner.event_received(self, event)
        elif isinstance(event, Welcomed):
            self._max_streams = event.settings["max_streams"]
            self._set_deadline()
            self._update_ready()
            if not self.welcomed.done():  # whoever waited may have gone
                self.welcomed.set_result(event.settings)
        elif isinstance(event, GoAwayReceived):
            self._go_away(event)
        else:
            self._end_with(cast("ConnectionEnded", event))

    def _go_away(self, event: GoAwayReceived) -> None:
        if self.draining:
            return
        self.draining, self.ready = True, False
        self._wake_all()
        assert self._owner is not None
        self._owner.link_draining(self, event)

    def _end_with(self, event: ConnectionEnded) -> None:
        self._ended(ConnectionClosed(escape_text(event.reason, REASON_SHOWN), code=event.code))
        assert self._transport is not None
        self._transport.close()

    # --- requests ---------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        token: bytes,
        meta: Mapping[str, Any] | None,
        deadline: float,
    ) -> PendingCall:
        """Send a request; await the result for its answer. Call it only while `ready`.

        `deadline` is in the loop's time, infinite for none. Raises as `ClientConnection.request`. Whoever stops
        waiting calls `abandon`.
        """
        connection = self._connection
        stream = connection.request(method, params, token=token, meta=meta, wall=self._clock.wall())
        call = PendingCall(self._loop, self, stream)
        self._pending[stream] = call
        self._wheel.set(call, deadline)
        if connection.in_flight >= self._max_streams:
            self.ready = False
        if connection.queued_bytes >= SENT_AT_ONCE:
            self._flush()
        else:
            self._flush_soon()
        return call

    def abandon(self, call: PendingCall) -> bool:
        """Nobody waits for a call's answer any more: tell the server. False if it had its answer already."""
        self._wheel.discard(call)
        if self._pending.get(call.stream) is not call:
            return False
        del self._pending[call.stream]
        self._connection.cancel(call.stream, self._clock.wall())
        self._flush_soon()
        return True

    async def wait_ready(self) -> None:
        """Return when a request may be sent, or when none can be sent here any more. First come, first served."""
        was_woken = False
        while not self.ready and not self.draining and self.error is None:
            if self._ready_waiters is None:
                self._ready_waiters = deque()
            waiter: asyncio.Future[None] = self._loop.create_future()
            if was_woken:  # somebody else was quicker in this turn: the place in the queue is kept
                self._ready_waiters.appendleft(waiter)
            else:
                self._ready_waiters.append(waiter)
            was_woken = True
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._update_ready()  # it was this one's turn: let the next have it
                raise

    def _update_ready(self) -> None:
        connection = self._connection
        free = self._max_streams - connection.in_flight
        if self._paused or connection.state is not State.OPEN or free <= 0:
            return
        self.ready = True
        waiters = self._ready_waiters
        while waiters and free > 0:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1

    def _wake_all(self) -> None:
        waiters, self._ready_waiters = self._ready_waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    # --- bytes out --------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Gather what is sent in one turn of the loop into one write."""
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_planned = False
        self._flush()

    def _flush(self) -> None:
        data = self._connection.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)

    # --- time -------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        self._wheel.set(self, self._connection.next_deadline())

    def handle_deadline(self, now: float) -> None:
        for event in self._connection.handle_timeout(self._clock.wall(), now):
            assert isinstance(event, ConnectionEnded)
            self._ended(ConnectionClosed(event.reason))
            self.abort()  # nobody is there to take leave of
            return
        self._flush()
        self._set_deadline()

    # --- the end ----------------------------------------------------------------------------------

    def session_ended(self, token: bytes) -> None:
        """A session is over: the limits of a connection without one may hold again."""
        self._connection.session_ended(token)

    def close(self, reason: str) -> None:
        """Send what is queued and close_notify; calls that still wait get ConnectionClosed."""
        self._flush()
        self._ended(ConnectionClosed(reason, clean=True))
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _ended(self, error: ConnectionClosed) -> None:
        """The conversation is over. The first cause counts."""
        if self.error is not None:
            return
        self.error = error
        self.ready = False
        if self._connection.state is not State.CLOSED:
            self._connection.end()
        self._wheel.discard(self)
        pending, self._pending = self._pending, {}
        for call in pending.values():
            self._wheel.discard(call)
            if not call.done():
                call.set_exception(_copy(error))
        if not self.welcomed.done():
            self.welcomed.set_exception(_copy(error))
            self.welcomed.exception()  # whoever waits is told; if nobody does, that is no fault
        self._wake_all()
        owner, self._owner = self._owner, None
        assert owner is not None
        owner.link_lost(self, error)


def _copy(error: ConnectionClosed) -> ConnectionClosed:
    """Each call raises its own: a traceback grows with every raise."""
    return ConnectionClosed(error.reason, clean=error.clean, code=error.code)
