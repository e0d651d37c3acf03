"""The asyncio side of one client connection: TLS transport <-> conversation <-> pending calls.

    request -> conversation.request -> once per turn of the loop: conversation.data_to_send -> transport.write
    data -> conversation.receive_data -> each answer: the pending call

Decides: which call gets which answer, when a call may be sent (streams, back-pressure), how a cancelled or expired
call leaves without affecting others, keepalive, and the error of calls that are pending at the end.

Must not know: retries, sessions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Protocol, cast

from zcproto.client.credentials import DeviceKey
from zcproto.client.endpoints import Endpoint
from zcproto.client.retry import MAX_RETRY_AFTER_MS
from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_calls import ClientCall
from zcproto.connection.client_streams import ClientStream
from zcproto.connection.events import (
    NEVER,
    Accepted,
    CallReceived,
    CallWithdrawn,
    ClientEvent,
    ConnectionEnded,
    CreditRaised,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ItemReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.connection.silence import PING_AFTER, PING_AFTER_TIMEOUT
from zcproto.connection.state import State
from zcproto.errors import CallError, Code, ConnectionClosed, DeadlineExceeded, TlsError
from zcproto.wire.message import Credit, Resume

SENT_AT_ONCE: Final = 65_536
"""Bytes of requests in one turn of the loop that are written before its end, so that back-pressure applies before
more requests are made."""

MIN_READING_PAUSE: Final = 0.05
"""Seconds. Flooding servers are read in batches, not frame by frame."""

REASON_SHOWN: Final = 200
MESSAGE_SHOWN: Final = 1_000
TIMED_OUT: Final = "no answer within the call's timeout"
TOO_LATE: Final = "the deadline has passed"
"""What servers answer at the deadline."""


class WaitingQueue(deque[asyncio.Future[None]]):
    """Callers that wait for their turn, first come, first served. It is true while one waits.

    A caller that was woken keeps its place if another one was faster in this turn of the loop. A caller that is
    cancelled after it was woken passes its turn on.
    """

    __slots__ = ()

    async def wait(self, *, was_woken: bool, pass_on: Callable[[], object]) -> None:
        """Wait to be woken. `pass_on` is called if this caller is cancelled after it was woken."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if was_woken:
            self.appendleft(waiter)
        else:
            self.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                pass_on()
            raise

    def wake(self, count: int) -> int:
        """Wake the next callers, at most `count` of them. Return how many turns are left."""
        while self and count > 0:
            waiter = self.popleft()
            if not waiter.done():  # else it was cancelled
                waiter.set_result(None)
                count -= 1
        return count

    def wake_all(self) -> None:
        self.wake(len(self))


class ConnectionOwner(Protocol):
    """The user of a connection, notified of what concerns the connection as a whole."""

    def event_received(self, connection: ClientProtocol, event: EventReceived) -> None: ...

    def connection_draining(self, connection: ClientProtocol, event: GoAwayReceived) -> None: ...

    def connection_ended(self, connection: ClientProtocol, error: ConnectionClosed) -> None: ...

    def connection_free(self, connection: ClientProtocol, requests: int) -> None:
        """So many more requests may be sent, and no caller of the connection waits for them."""

    @property
    def has_other_address(self) -> bool:
        """Whether another address could take over from a silent server."""

    def connection_silent(self, connection: ClientProtocol) -> None:
        """Requests wait in silence, and a PING was not answered. Called again while that lasts."""

    def connection_heard(self, connection: ClientProtocol) -> None:
        """A byte has arrived on a connection that was silent."""


class CallReceiver(Protocol):
    """The handlers of a session, which run its calls."""

    def call_received(self, connection: ClientProtocol, call: ClientCall) -> None: ...

    def call_withdrawn(self, call: ClientCall) -> None: ...


PendingCall = tuple[int, asyncio.Future[Any]]
"""The stream of a request, and its future answer: a plain one, which costs much less than one of a subclass."""


class PendingStream(asyncio.Future[Any]):
    """The future answer to an OPEN, and the items that come before it. `stream` is its half of the conversation."""

    __slots__ = ("_sender", "_waiter", "connection", "stream")

    def __init__(
        self, connection: ClientProtocol, stream: ClientStream, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(loop=loop)
        self.connection = connection
        self.stream = stream
        self._waiter: asyncio.Future[None] | None = None  # of the task that receives
        self._sender: asyncio.Future[None] | None = None
        self.add_done_callback(self._answered)

    def _answered(self, _: object) -> None:
        mark_retrieved(self)  # the stream may have been left
        self.arrived()
        self.sending_changed()

    def arrived(self) -> None:
        """Wake the task that receives."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def sending_changed(self) -> None:
        """Wake the task that sends."""
        if self._sender is not None and not self._sender.done():
            self._sender.set_result(None)

    async def wait(self) -> None:
        """Wait for an item or the answer."""
        if self.done():
            return
        self._waiter = self.get_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def wait_to_send(self) -> None:
        """Wait until the method wants an item and the connection has room for it, or for the answer."""
        while not self.done():
            if self.connection.is_paused:
                await self.connection.wait_writable()
            elif self.stream.credit.may_send:
                return
            else:
                self._sender = self.get_loop().create_future()
                try:
                    await self._sender
                finally:
                    self._sender = None

    def leave(self) -> None:
        """Cancel the stream on the server, or detach from its run, and drop its items. Nothing after the answer."""
        self.stream.items.clear()
        if self.connection.abandon(self.stream.number):
            self.cancel()


@dataclass(slots=True, eq=False, repr=False)
class ClientProtocol(asyncio.Protocol):
    """One connection to a server.

    `ready`: a request may be sent now; await `wait_ready` otherwise. `is_paused`: the server reads too slowly to
    send more now. `error`: why the connection ended. `proved`: the devices that have proved their keys here.
    `unanswered_not_run`, after the end: requests without an answer certainly did not run, because the server closed
    in order after GOAWAY. `retry_after_ms`: what the server asked for when it began `draining`.
    """

    _owner: ConnectionOwner | None
    _loop: asyncio.AbstractEventLoop
    _wheel: DeadlineWheel
    _clock: Clock
    conversation: ClientConnection
    endpoint: Endpoint
    _transport: asyncio.Transport | None = field(default=None, init=False)
    # Answers and deadlines by stream.
    _pending: dict[int, tuple[asyncio.Future[Any], float]] = field(default_factory=dict, init=False)
    _waiting: WaitingQueue | None = field(default=None, init=False)  # for a request, once a caller has waited
    _flush_planned: bool = field(default=False, init=False)
    _writable: asyncio.Future[None] | None = field(default=None, init=False)  # while answers wait
    _max_streams: int = field(default=0, init=False)
    _calls_due: float = field(default=NEVER, init=False)  # when a deadline of a pending call may have passed
    _had_one_answer: bool = field(default=False, init=False)  # in the last read
    _is_held: bool = field(default=False, init=False)  # until the requests in flight were answered
    is_paused: bool = field(default=False, init=False)
    deadline_tick: int = field(default=0, init=False)
    ready: bool = field(default=False, init=False)
    draining: bool = field(default=False, init=False)
    retry_after_ms: int = field(default=0, init=False)
    proved: set[DeviceKey] = field(default_factory=set, init=False)
    unanswered_not_run: bool = field(default=False, init=False)
    error: ConnectionClosed | None = field(default=None, init=False)
    welcomed: asyncio.Future[dict[str, Any]] = field(init=False)
    closed: asyncio.Future[None] = field(init=False)
    _now: Callable[[], float] = field(init=False)
    _create_future: Callable[[], asyncio.Future[Any]] = field(init=False)

    def __post_init__(self) -> None:
        # CPython does not specialise the lookup of uvloop's methods.
        self._now, self._create_future = self._loop.time, self._loop.create_future
        self.welcomed = self._loop.create_future()
        self.closed = self._loop.create_future()

    @property
    def salt(self) -> bytes:
        """The connection's unique salt, which a device signs."""
        return self.conversation.salt

    @property
    def leaf(self) -> bytes:
        """SHA-256 of the server's certificate (DER). Empty after the connection is closed."""
        tls = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        return b"" if certificate is None else sha256(certificate).digest()

    # --- called by the transport ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        wall, now = self._clock.wall(), self._now()
        answers, rest = self.conversation.receive_answers(data, wall, now)
        pending = self._pending
        for stream, _, value, _ in answers:
            call = pending.pop(stream, None)
            if call is not None:
                try:
                    call[0].set_result(value)
                except asyncio.InvalidStateError:  # its task was cancelled in this turn
                    continue
        if rest and not self._receive_others(rest, wall, now):
            return
        self._had_one_answer = len(answers) == 1
        if not self.ready or self._waiting:
            self.update_ready()
            self._close_if_drained()

    def _receive_others(self, data: bytes, wall: int, now: float) -> bool:
        """Process the frames behind the first answers. Return False if the connection has ended."""
        pending = self._pending
        for event in self.conversation.receive_data(data, wall, now):
            if event.__class__ is ResponseReceived:
                call = pending.pop(event.stream, None)
                if call is not None and not call[0].done():
                    call[0].set_result(event.value)
            elif event.__class__ is ItemReceived or event.__class__ is Accepted:
                call = pending.get(event.stream)
                if call is not None:
                    call[0].arrived()  # type: ignore[attr-defined]  # only streams have these
            else:
                self._handle(event)
                if self.error is not None:
                    return False
        if self.conversation.queued_bytes:
            self._flush_soon()
        delay = self.conversation.reading_delay(now)
        if delay:
            self._pause_reading(max(delay, MIN_READING_PAUSE))
        return True

    def _close_if_drained(self) -> None:
        """Close if the server is going away and nothing is in flight."""
        if self.draining and not self._pending and not self.conversation.running_calls:
            self.close("the server is going away")

    def _pause_reading(self, delay: float) -> None:
        """Read nothing for a time: the server floods this connection."""
        transport = self._transport
        assert transport is not None
        transport.pause_reading()
        self._loop.call_later(delay, transport.resume_reading)

    def eof_received(self) -> None:
        self._ended(self._closed_by_peer())

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, TlsError):
            self._ended(ConnectionClosed(exc.failure))
        else:
            self._ended(self._closed_by_peer())
        self._transport = None
        self.closed.set_result(None)

    def _closed_by_peer(self) -> ConnectionClosed:
        if self.error is None:
            self.unanswered_not_run = self.draining
        return ConnectionClosed("the server closed the connection", clean=True)

    def pause_writing(self) -> None:
        self.is_paused = True
        self.ready = False
        self.conversation.is_output_blocked = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self.conversation.unblock_output(self._clock.wall())
        self._flush_soon()
        self.update_ready()
        self._wake_answers()

    async def wait_writable(self) -> None:
        """Wait until the server reads, or the connection has ended."""
        while self.is_paused and self.error is None:
            if self._writable is None:
                self._writable = self._loop.create_future()
            await asyncio.wait([self._writable])

    def _wake_answers(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.set_result(None)

    # --- messages of the server -------------------------------------------------------------------

    def _handle(self, event: ClientEvent) -> None:
        if isinstance(event, ErrorReceived):
            call = self._pending.pop(event.stream, None)
            if call is not None and not call[0].done():
                message = escape_text(event.message, MESSAGE_SHOWN)
                call[0].set_exception(CallError.from_wire(event.code, message, event.details))
        elif isinstance(event, EventReceived):
            assert self._owner is not None
            if event.name == "session.revoked":
                self.cancel_calls(event.token)
            self._owner.event_received(self, event)
        elif isinstance(event, CallReceived):
            event.call.session.receiver.call_received(self, event.call)
        elif isinstance(event, CallWithdrawn):
            event.call.session.receiver.call_withdrawn(event.call)
        elif isinstance(event, Welcomed):
            self._max_streams = event.settings["max_streams"]
            if self._owner is not None and self._owner.has_other_address:
                self.conversation.watch_silence()
            self._set_deadline()
            self.update_ready()
            if not self.welcomed.done():  # the attempt to connect may have been cancelled
                self.welcomed.set_result(event.settings)
        elif isinstance(event, GoAwayReceived):
            self._go_away(event)
        elif isinstance(event, CreditRaised):
            call = self._pending.get(event.stream)
            if call is not None and isinstance(call[0], PendingStream):
                call[0].sending_changed()
        else:
            assert isinstance(event, ConnectionEnded)
            self._ended(ConnectionClosed(escape_text(event.reason, REASON_SHOWN), code=event.code))
            assert self._transport is not None
            self._transport.close()

    def _go_away(self, event: GoAwayReceived) -> None:
        if self.draining:
            return
        self.draining, self.ready = True, False
        self.retry_after_ms = min(event.retry_after_ms, MAX_RETRY_AFTER_MS)
        self._wake_all()
        assert self._owner is not None
        self._owner.connection_draining(self, event)

    # --- requests ---------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        token: bytes,
        meta: Mapping[str, Any] | None,
        deadline: float,
    ) -> PendingCall:
        """Send a request. Return its stream and its future answer. Only while `ready`.

        `deadline` is in the loop's time, or infinite. A caller that stops waiting must call `abandon`. Raises like
        `ClientConnection.request`.
        """
        conversation = self.conversation
        stream = conversation.request(method, params, self._clock.wall(), token, meta)
        call = self._create_future()
        self._add_pending(call, stream, deadline)
        return stream, call

    def show(self, token: bytes, deadline: float) -> PendingCall:
        """Show a token, also while the server allows no other requests. Raises like `ClientConnection.show`."""
        return self._await_answer(self.conversation.show(token, self._clock.wall()), deadline)

    def open_stream(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        token: bytes,
        meta: Mapping[str, Any] | None,
        window: Credit,
        deadline: float,
        resume: Resume | None,
    ) -> PendingStream:
        """Open a stream. Only while `ready`. Raises like `ClientConnection.open_stream`."""
        stream = self.conversation.open_stream(
            method, params, token=token, meta=meta, window=window, wall=self._clock.wall(), resume=resume
        )
        pending = PendingStream(self, stream, self._loop)
        self._add_pending(pending, stream.number, deadline)
        return pending

    def handle(
        self, methods: frozenset[str], limit: int, receiver: CallReceiver, token: bytes, deadline: float
    ) -> PendingCall:
        """Let the server call these methods. Only while `ready`. Raises like `ClientConnection.handle`."""
        stream = self.conversation.handle(methods, limit, receiver, token=token, wall=self._clock.wall())
        return self._await_answer(stream, deadline)

    def _await_answer(self, stream: int, deadline: float) -> PendingCall:
        call = self._create_future()
        self._add_pending(call, stream, deadline)
        return stream, call

    def take_item(self, stream: ClientStream) -> Any:
        """Return the next item of a stream, and send the credit that is due.

        Raises IndexError if none waits, InternalError if it cannot be decoded.
        """
        try:
            return self.conversation.take_item(stream, self._clock.wall())
        finally:
            if self.conversation.queued_bytes:
                self._flush_soon()

    def send_taken(self, stream: ClientStream) -> None:
        """Report which items of a durable stream the application does not need any more."""
        self.conversation.send_credit(stream, self._clock.wall())
        self._flush_queued()

    def send_item(self, stream: ClientStream, item: Any) -> None:
        """Send an item after `PendingStream.wait_to_send`. Raises InvalidArgument if it cannot be sent."""
        self.conversation.send_item(stream, item, self._clock.wall())
        self._flush_queued()

    def end_items(self, stream: ClientStream) -> None:
        """Send no more items. Idempotent."""
        self.conversation.end_items(stream, self._clock.wall())
        self._flush_queued()

    def _add_pending(self, call: asyncio.Future[Any], stream: int, deadline: float) -> None:
        pending = self._pending
        pending[stream] = call, deadline
        if deadline < self._calls_due or self._calls_due == NEVER:
            self._check_calls_by(deadline)
        conversation = self.conversation
        if len(conversation.in_flight) >= self._max_streams:
            self.ready = False
        if self._had_one_answer and len(pending) == 1 and not self._flush_planned:
            self._flush()  # a caller that makes one call after the other
        elif not self._flush_planned or conversation.queued_bytes >= SENT_AT_ONCE:
            self._flush_queued()

    def _flush_queued(self) -> None:
        """Send what is queued: at the end of this turn, or at once if it is much."""
        if self.conversation.queued_bytes >= SENT_AT_ONCE:
            self._flush()
        else:
            self._flush_soon()

    def abandon(self, stream: int) -> bool:
        """Cancel a call on the server, or leave a durable stream. Return False if it was answered already."""
        call, _ = self._pending.pop(stream, (None, NEVER))
        if call is None:
            return False
        if isinstance(call, PendingStream) and call.stream.resume is not None:
            self.conversation.detach(call.stream, self._clock.wall())
        else:
            self.conversation.cancel(stream, self._clock.wall())
        self._flush_soon()
        return True

    def cancel_stream(self, stream: ClientStream) -> None:
        """Cancel a stream on the server, and go on waiting for its answer."""
        self.conversation.cancel(stream.number, self._clock.wall())
        self._flush_soon()

    # --- calls of the server ------------------------------------------------------------------------

    def answer_call(self, call: ClientCall, result: Any) -> None:
        """Answer a call of the server, unless it was withdrawn."""
        self.conversation.answer_call(call, result, self._clock.wall())
        self._flush_soon()

    def fail_call(
        self, call: ClientCall, code: Code, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """Answer a call of the server with an error, unless it was withdrawn."""
        self.conversation.fail_call(call, code, message, self._clock.wall(), details)
        self._flush_soon()

    def release_call(self, call: ClientCall) -> None:
        """Record that the handler of a call has ended."""
        self.conversation.release_call(call)
        if self.error is None:
            self._close_if_drained()

    def cancel_calls(self, token: bytes) -> None:
        """Cancel the handlers of a session that has ended."""
        for call in self.conversation.cancel_calls(token, self._clock.wall()):
            call.session.receiver.call_withdrawn(call)
        self._flush_soon()

    # --- readiness --------------------------------------------------------------------------------

    @property
    def free_streams(self) -> int:
        """How many more requests the server allows in flight."""
        return self._max_streams - len(self.conversation.in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether no request and no call of the server is in flight."""
        return not (self.conversation.in_flight or self.conversation.running_calls)

    async def wait_ready(self) -> None:
        """Wait, in order of arrival, until a request may be sent or the connection takes no more requests."""
        was_woken = False
        while not self.ready and not self.draining and self.error is None:
            if self._waiting is None:
                self._waiting = WaitingQueue()
            await self._waiting.wait(was_woken=was_woken, pass_on=self.update_ready)
            was_woken = True

    def hold(self) -> None:
        """Take no requests until those in flight, which show sessions, were answered."""
        self._is_held = bool(self.conversation.in_flight)
        self.ready = self.ready and not self._is_held

    def update_ready(self) -> None:
        """Let as many callers of `wait_ready` go on as there is room for."""
        conversation = self.conversation
        if self._is_held and conversation.in_flight:
            return
        self._is_held = False
        free = self.free_streams
        if self.is_paused or conversation.state is not State.OPEN or free <= 0:
            return
        self.ready = True
        if self._waiting:
            free = self._waiting.wake(free)
        if free > 0 and self._owner is not None:
            self._owner.connection_free(self, free)

    def _wake_all(self) -> None:
        if self._waiting:
            self._waiting.wake_all()

    # --- sending and deadlines --------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Send all frames of this turn of the loop in one write."""
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_planned = False
        self._flush()

    def _flush(self) -> None:
        data = self.conversation.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)

    def _set_deadline(self) -> None:
        self._wheel.set(self, min(self._calls_due, self.conversation.next_deadline()))

    def _check_calls_by(self, deadline: float) -> None:
        """Check the calls at their first deadline, and earlier to notice a silent server."""
        if self.conversation.silence is not None:
            deadline = min(deadline, self.conversation.first_silence_check(self._now()))
        if deadline < self._calls_due:
            self._calls_due = deadline
            self._set_deadline()

    def _check_calls(self, now: float) -> None:
        """Cancel the calls whose deadlines have passed, and find out whether the server is silent."""
        after = PING_AFTER
        for stream, (call, deadline) in [*self._pending.items()]:
            if deadline <= now:
                after = PING_AFTER_TIMEOUT
                self.abandon(stream)
                if not call.done():
                    call.set_exception(DeadlineExceeded(TIMED_OUT))
        self._calls_due = NEVER
        check_at = self._check_silence(now, after)
        first = min((deadline for _, deadline in self._pending.values()), default=NEVER)
        self._calls_due = min(self._calls_due, first, check_at)

    def _check_silence(self, now: float, after: float) -> float:
        """Send a PING if that is due, and report a silent server. Return when to check again."""
        owner, conversation = self._owner, self.conversation
        if owner is None or not owner.has_other_address:
            return NEVER
        was_silent = conversation.silence is not None and conversation.silence.is_late
        check_at = conversation.check_silence(self._clock.wall(), now, self._unsent, after=after)
        if conversation.is_silent:
            owner.connection_silent(self)
        elif was_silent:
            owner.connection_heard(self)
        return check_at

    def probe(self) -> None:
        """Send a PING now, and report the connection as silent if no byte arrives in time."""
        self._calls_due = min(self._calls_due, self._check_silence(self._now(), 0.0))
        self._flush_soon()
        self._set_deadline()

    @property
    def _unsent(self) -> int:
        """Bytes that wait in the transport."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def handle_deadline(self, now: float) -> None:
        if now >= self._calls_due:
            self._check_calls(now)
            if self.error is not None:
                return
        for event in self.conversation.handle_timeout(self._clock.wall(), now, self._unsent):
            assert isinstance(event, ConnectionEnded)
            self._ended(ConnectionClosed(event.reason))
            self.abort()  # the peer does not answer: do not wait for its close
            return
        self._flush()
        self._set_deadline()

    # --- the end ----------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """Send queued data and close_notify. Pending calls raise ConnectionClosed."""
        self._flush()
        self._ended(ConnectionClosed(reason, clean=True))
        if self._transport is not None:
            self._transport.close()

    def lose(self, reason: str) -> None:
        """Reset a connection that may still work. Pending calls raise ConnectionClosed, as after a loss."""
        self._ended(ConnectionClosed(reason))
        self.abort()

    def abort(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _ended(self, error: ConnectionClosed) -> None:
        """End the conversation. Only the first cause is kept."""
        if self.error is not None:
            return
        self.error = error
        self.ready = False
        if self.conversation.state is not State.CLOSED:
            self.conversation.end()
        self._wheel.discard(self)
        pending, self._pending = self._pending, {}
        for call, _ in pending.values():
            if not call.done():
                call.set_exception(_copy(error))
        if not self.welcomed.done():
            self.welcomed.set_exception(_copy(error))
            self.welcomed.exception()  # mark it as retrieved: waiting is optional
        self._wake_all()
        self._wake_answers()
        for running in self.conversation.end_calls():
            running.session.receiver.call_withdrawn(running)
        owner, self._owner = self._owner, None
        assert owner is not None
        owner.connection_ended(self, error)


def _copy(error: ConnectionClosed) -> ConnectionClosed:
    """Return a copy to raise: every raise extends the traceback of an error."""
    return ConnectionClosed(error.reason, clean=error.clean, code=error.code)


def mark_retrieved(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging the error of a future that nothing may await."""
    if not future.cancelled():
        future.exception()


async def join(task: asyncio.Task[None]) -> None:
    """Await a task that is shared with other callers: cancelling one of them does not cancel it."""
    await asyncio.wait([task])
    if task.cancelled():
        raise ConnectionClosed("this client is closed; create a new one", clean=True)
    task.result()
