"""Moves the bytes of one connection between its TLS transport, its conversation and its methods.

    data -> connection.receive_data -> dispatcher.run -> answers in the outbox
    then once: outbox.take -> transport.write

Decides: back-pressure, and how a connection ends. `ServerConnection` decides what is allowed on the wire.

Rules:
- A peer that does not read is not read from, and its requests are not run. The same holds during a token lookup.
- Items alone do not stop reading: they wait in their methods.
- After MAX_WASTED frames that were refused, had no effect, or were PINGs, nothing of a peer is processed for a time
  that grows with their number: a peer that ignores `retry_after_ms` must not cost more than one that is served.
  Connections that several users share are not slowed down.
- A connection that sends many frames at once gets a slice of each turn of the loop.
- What a read causes is sent in one write.
- A closed connection keeps no references.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, cast

from zcproto.app.context import ConnectedClient, Context
from zcproto.auth.identity import Channel
from zcproto.auth.schemes import certificate_key
from zcproto.common.network import network_of
from zcproto.connection.events import (
    CallEnded,
    ConnectionEnded,
    CreditReceived,
    DurableStream,
    FrameBuffered,
    GoAwayReason,
    ItemsReceived,
    KeyWanted,
    RawRequest,
    Request,
    RequestEnded,
    ServerEvent,
    SessionJoined,
    SessionLeft,
    TokenUnknown,
)
from zcproto.connection.refusals import TOKEN_ERRORS
from zcproto.connection.server import REPORTED_STEP, ServerConnection
from zcproto.connection.server_calls import CallToClient, no_handler
from zcproto.connection.state import State
from zcproto.errors import CallError, CertificateError, Code, TlsError, Unimplemented
from zcproto.observe.log import is_on
from zcproto.server.calls import CallRunner
from zcproto.server.clients import Answered, Registering
from zcproto.server.dispatch import Dispatcher
from zcproto.server.eager import EagerWorker
from zcproto.server.state import ServerState, log
from zcproto.server.streams import STREAM_TURN_BYTES, StreamRunner
from zcproto.sessions import EndReason, Session
from zcproto.sessions.session import CERTIFICATE_KEY
from zcproto.tls.server import TlsServerTransport
from zcproto.wire.decoder import LARGE
from zcproto.wire.frame import SALT_SIZE
from zcproto.wire.message import encode_error

WRITE_BUFFER_HARD_FACTOR: Final = 4
"""Answers in progress when a peer stops reading may fill its buffer to this many times the limit."""

TAKEN_AT_LEAST: Final = 16_384
"""Bytes that a slow peer must read in each `write_timeout`; less counts as not reading."""

MAX_WASTED: Final = 16
SLOW_DOWN_S: Final = 0.002
"""Seconds for each refused frame, frame without effect, or PING."""

CUT_FRAME: Final = "too many incomplete frames; send fewer large frames at once, or send them faster"


class ServerProtocol(asyncio.Protocol):
    """One connection of a server."""

    __slots__ = (
        "_calls",
        "_connection",
        "_dispatcher",
        "_flush_planned",
        "_lookup",
        "_number",
        "_paused_since",
        "_slow_until",
        "_state",
        "_suspended",
        "_transport",
        "_uncut",
        "_unread",
        "deadline_tick",
        "is_held_up",
        "peer",
        "suppress_revoked_event",
    )

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._connection: ServerConnection | None = None
        self._dispatcher: Dispatcher | None = None
        self._calls: CallRunner | None = None
        self._number = 0
        self._uncut: tuple[tuple[str, Code], ...] = ()  # sessions that its own request has ended
        self._transport: TlsServerTransport | None = None
        self._suspended: Iterator[ServerEvent] | None = None  # until they may go on
        self.is_held_up = False  # until the peer reads
        self._lookup: EagerWorker | None = None
        self._paused_since: float | None = None  # or since the peer last read its least
        self._slow_until: float | None = None
        self._unread = 0  # bytes that waited for the peer then, and those added since
        self._flush_planned = False
        self.suppress_revoked_event = False  # while its own request revokes sessions
        self.deadline_tick = 0

    @property
    def id(self) -> str:
        """The id of the connection in the log; its number is assigned on the first use."""
        if not self._number:
            self._number = next(self._state.numbers)
        return f"{self._state.run}-{self._number}"

    def now(self) -> float:
        return self._state.clock.now()

    def wall(self) -> int:
        return self._state.clock.wall()

    def lifespan_value(self, method: str) -> Any:
        return self._state.lifespan_value(method)

    async def run_in_thread(
        self, context: Context, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Any:
        """Run a method that blocks, and return its result."""
        session = context.session
        owner = f"address {network_of(self.peer)}" if session is None else f"user {session.user}"
        return await self._state.threads.run(owner, partial(function, **arguments))

    @property
    def stopping(self) -> asyncio.Event:
        return self._state.stopping

    def peer_certificate(self) -> bytes | None:
        """Return the client's certificate in DER form; None without one."""
        return None if self._transport is None else self._transport.peer_certificate()

    def channel(self, context: Any = None) -> Channel:
        """Return what proofs of the peer are bound to, for a login with its context."""
        if self._connection is None or self._transport is None:
            return Channel(context=context)
        return Channel(self.peer_certificate, self._connection.salt, self._transport.leaves, context)

    # --- called by the transport ---------------------------------------------------------------------

    def connection_made(self, transport: TlsServerTransport) -> None:  # type: ignore[override]
        state = self._state
        settings, counters = state.settings, state.counters
        self._transport = transport
        self.peer = transport.peer
        transport.set_write_buffer_limits(state.write_buffer_bytes)
        wall, now = state.clock.wall(), state.clock.now()
        connection = self._connection = ServerConnection(
            settings, state.registry, state.entropy(SALT_SIZE), wall, now, counters, self
        )
        self._dispatcher = Dispatcher(state, connection, self)
        state.connections.add(self)
        counters.connections_opened += 1
        if is_on("debug"):
            group = transport.get_extra_info("tls_group")
            log.debug("connection.opened", peer=self.peer, connection=self.id, group=group)
        if state.announcement is not None:
            connection.announce(state.announcement, wall)
            counters.events += 1
        if state.draining:
            self.go_away(GoAwayReason.DRAINING)
            return
        transport.write(connection.outbox.take())
        state.wheel.set(self, now + settings.first_timeout_s)

    def data_received(self, data: bytes) -> None:
        connection = self._connection
        if connection is not None:
            clock = self._state.clock
            wall = clock.wall()
            self._process(connection.receive_data(data, wall, clock.now()), wall)

    def eof_received(self) -> None:
        self._ended("closed_by_peer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(exc.failure if isinstance(exc, TlsError) else "closed_by_peer")
        self._transport = None

    def pause_writing(self) -> None:
        self._state.counters.write_pauses += 1
        self._paused_since = self.now()
        if self._streams is not None:
            self._streams.is_blocked = True
        if self._transport is not None:
            self._unread = self._transport.get_write_buffer_size()
            self._hold_up(self._unread)
        self._set_deadline()

    def resume_writing(self) -> None:
        self._paused_since = None
        self.is_held_up = False
        if self._streams is not None:
            self._streams.is_blocked = False
            self._continue_streams()
        self._continue()

    def _hold_up(self, unread: int) -> None:
        """Read nothing more from a peer that has not read its answers."""
        # The transport of a connection with streams pauses earlier, for their items.
        if self._streams is None or unread > self._state.write_buffer_bytes:
            assert self._transport is not None, "a conversation ends before its transport"
            self.is_held_up = True
            self._transport.pause_reading()

    def _continue(self) -> None:
        """Process the suspended events and read again, unless something must still be awaited."""
        if not self.is_held_up and self._lookup is None and self._slow_until is None:
            suspended, self._suspended = self._suspended, None
            if suspended is not None:
                self._process(suspended, self.wall())
        if not self.is_held_up and self._transport is not None:
            if self._suspended is None and self._slow_until is None:
                self._transport.resume_reading()
            self._set_deadline()

    def wait_turn(self, events: Iterable[ServerEvent]) -> None:
        """Let the other connections have their turn before these events."""
        if self._connection is not None and self._transport is not None:
            self.suspend(events)
            self._transport.pause_reading()
            self._state.call_soon(self._continue)

    def suspend(self, events: Iterable[ServerEvent]) -> None:
        """Keep the events that may not be processed yet. A tuple has no more; without a connection none count."""
        is_over = events.__class__ is tuple or self._connection is None
        self._suspended = None if is_over else cast("Iterator[ServerEvent]", events)

    def _slow_down(self, connection: ServerConnection) -> None:
        """Process nothing of a peer for a time that grows with its frames that were refused or had no effect."""
        wasted, connection.wasted = connection.wasted, 0
        if self._transport is not None and len({each.user for each in connection.sessions.values()}) <= 1:
            self._slow_until = (self._slow_until or self.now()) + wasted * SLOW_DOWN_S
            self._transport.pause_reading()

    # --- requests ------------------------------------------------------------------------------------

    def _process(self, events: Iterator[ServerEvent] | tuple[RawRequest], wall: int) -> None:
        """Process events until they end or must be suspended, then send what is queued."""
        self._dispatcher.run(events, wall)  # type: ignore[union-attr]  # its connection has not ended
        connection = self._connection
        if connection is not None:
            data = connection.outbox.take()
            if data:
                is_read = self._paused_since is None
                self._transport.write(data)  # type: ignore[union-attr]  # a conversation ends before its transport
                if self._paused_since is not None:
                    self._check_write_buffer(0 if is_read else len(data))
            if connection.deadline_moved:
                self._set_deadline()

    def handle(self, event: ServerEvent) -> bool:
        """Process an event other than a request. Return True if those after it must wait."""
        if event.__class__ is CreditReceived:
            if self._streams is not None:
                self._streams.credit_received(event.stream)
                if event.stream.__class__ is DurableStream and self._state.runs is not None:
                    self._state.runs.credit_received(event.stream)
        elif event.__class__ is ItemsReceived:
            if self._streams is not None:
                self._streams.items_received(event.stream)
        elif event.__class__ is CallEnded:
            self._settle(event)
        elif event.__class__ is SessionJoined:
            self._state.session_connections.join(event.session_id, self)
            if self._calls is not None:
                self._state.clients.resume(self, event.session_id)
        elif event.__class__ is SessionLeft:
            self._state.session_connections.leave(event.session_id, self)
            self._suspend_calls(event.session_id)
        elif event.__class__ is TokenUnknown:
            return self._look_up(event)
        elif event.__class__ is RequestEnded:
            if self._dispatcher is not None:
                self._dispatcher.stop(event)
        elif event.__class__ is FrameBuffered:
            self._frame_buffered(event)
        elif event.__class__ is KeyWanted:
            self._prove_by_certificate(event.key)
        else:
            self._conversation_ended(cast("ConnectionEnded", event))
        return False

    @property
    def is_slow_reader(self) -> bool:
        """Whether the peer must read before this connection continues."""
        return self._paused_since is not None

    def _frame_buffered(self, frame: FrameBuffered) -> None:
        """Count the bytes of an incomplete frame, and close the connections that exceed the bounds."""
        if frame.size >= LARGE:
            self._state.counters.large_bytes += REPORTED_STEP
        owner = f"user {frame.user}" if frame.user else f"address {self.peer}"
        for connection in self._state.partial_frames.hold(self, owner, frame.size, frame.began, self.now()):
            connection.cut_frame()

    def cut_frame(self) -> None:
        """Close the connection because its incomplete frame exceeds the bounds."""
        if self._connection is not None:
            details = {"retry_after_ms": self._state.settings.retry_draining_ms}
            self._conversation_ended(
                self._connection.end_with(Code.RESOURCE_EXHAUSTED, CUT_FRAME, self.wall(), details)
            )

    @property
    def _streams(self) -> StreamRunner | None:
        return None if self._dispatcher is None else self._dispatcher.streams

    def begin_streams(self) -> bool:
        """Let the transport pause early, for the items of streams. Return whether the peer does not read."""
        assert self._transport is not None, "a conversation ends before its transport"
        streams = self._state.settings.streams
        assert streams is not None, "announced"
        limit = min(STREAM_TURN_BYTES, streams.write_bytes, self._state.write_buffer_bytes)
        self._transport.set_write_buffer_limits(high=limit)
        return self._paused_since is not None

    # --- sessions ------------------------------------------------------------------------------------

    def admits(self, session: Session) -> bool:
        """Return whether a session may be used from this peer's address."""
        state = self._state
        if not state.binding.is_enabled:
            return True
        record = state.registry.record(session.raw_id)
        if record is not None and state.binding.admits(record, self.peer):
            return True
        log.info("session.not_admitted", peer=self.peer, connection=self.id, session=session.id)
        return False

    def join(self, session: Session, token: bytes) -> None:
        """Attach a session that a request of this connection opened or refreshed."""
        if self._connection is not None:
            state, clock, session_id = self._state, self._state.clock, session.id
            self._connection.join(session, token, clock.wall(), clock.now())
            state.session_connections.join(session_id, self)
            if self._calls is not None:
                state.clients.resume(self, session_id)

    def _prove_by_certificate(self, key: str) -> None:
        """Record a proof of the key if the client's certificate has it."""
        certificate = self.peer_certificate() if key.startswith(CERTIFICATE_KEY) else None
        if certificate is not None:
            with contextlib.suppress(CertificateError):  # an unreadable one cannot have opened a session
                if certificate_key(certificate) == key:
                    self.prove(key)

    def has_proved(self, key: str) -> bool:
        """Return whether the peer has proved a key, by its certificate or otherwise."""
        self._prove_by_certificate(key)
        return self._connection is not None and self._connection.tokens.has_proved(key)

    def prove(self, key: str) -> None:
        """Record that the peer proved a key: this connection may use the sessions bound to it."""
        if self._connection is not None:
            self._connection.tokens.prove(key)

    def disprove(self, key: str) -> None:
        """Discard the proof of a key."""
        if self._connection is not None:
            self._connection.tokens.disprove(key)

    def _look_up(self, unknown: TokenUnknown) -> bool:
        """Start a token lookup. Return True if it is pending; this connection waits for it."""
        worker = self._state.tasks.start(self._find(unknown))
        if worker is None:
            return False
        assert self._transport is not None, "a conversation ends before its transport"
        self._transport.pause_reading()
        self._lookup = worker

        def done(result: None, error: BaseException | None) -> None:
            self._lookup = None
            if self._connection is not None:
                self._continue()

        worker.done = done
        return True

    async def _find(self, unknown: TokenUnknown) -> None:
        unknown.refusal = TOKEN_ERRORS[Code.UNAVAILABLE]  # if this is cancelled
        try:
            await self._state.sessions.look_up(unknown.token, self.peer, unknown.code)
        except CallError as error:
            unknown.refusal = encode_error(error.code, error.message, error.details)
        except Exception as error:
            unknown.refusal = self._state.internal_error("token", error, peer=self.peer, connection=self.id)
        else:
            unknown.refusal = None

    def session_ended(self, session_id: str, code: Code, reason: EndReason) -> None:
        """Send `session.revoked` for a session used here, unless it expired or this peer ended it."""
        if self._connection is None:
            return
        if code is Code.TOKEN_EXPIRED or self.suppress_revoked_event:
            self._connection.leave(session_id, self.now())
        else:
            self._connection.session_revoked(session_id, reason, self.wall(), self.now())
            self._state.counters.events += 1
        self._uncut += ((session_id, code),)
        if not self.suppress_revoked_event:
            self._cut_streams()
        self._end_calls(session_id, reason)
        self.flush_soon()

    def session_rotated(self, session_id: str, token_digest: bytes) -> None:
        """Suspend a session that another token has replaced, unless this peer has shown that."""
        connection = self._connection
        if connection is not None and connection.suspend(session_id, token_digest, self.wall(), self.now()):
            self._suspend_calls(session_id, is_refreshed=True)
            self.flush_soon()

    def session_used_since(self, session_id: str) -> int | None:
        """Return when this connection began to use a session, in wall time; None if it does not use it."""
        known = None if self._connection is None else self._connection.sessions.get(session_id)
        return None if known is None else known.since

    def send_event(self, session_id: str, name: str, data: Any) -> bool:
        """Send an event about a session. Return False if it cannot be delivered."""
        if self._connection is None:
            return False
        sent = self._connection.send_event(session_id, name, data, self.wall())
        self._state.counters.events += sent
        self.flush_soon()
        return sent

    def announce(self, body: bytes) -> None:
        """Send an event about the server."""
        if self._connection is not None:
            self._connection.announce(body, self.wall())
            self._state.counters.events += 1
            self.flush_soon()

    def cut_streams_soon(self) -> None:
        """Cut the streams of the sessions that this peer has ended, after its request has been answered."""
        if self._uncut:
            self._state.call_soon(self._cut_streams)

    def _cut_streams(self) -> None:
        uncut, self._uncut = self._uncut, ()
        if self._connection is not None and self._dispatcher is not None:
            for session_id, code in uncut:
                for ended in self._connection.cut_streams(session_id, code, self.wall()):
                    self._dispatcher.stop(ended)
            self.flush_soon()

    def cut_denied_streams(self) -> None:
        """Cut the streams whose sessions may no longer call their methods."""
        if self._dispatcher is not None:
            self._dispatcher.cut_denied_streams()
            self.flush_soon()

    # --- calls to the client -------------------------------------------------------------------------

    def register(self, session: Session, methods: frozenset[str], most: int) -> None:
        """Let methods of the server call these methods of the client. Raises ResourceExhausted at a limit."""
        connection = self._connection
        if connection is None:  # the method has ended its own connection
            return
        if not connection.settings.max_calls:
            raise Unimplemented("this server makes no calls; its operator has set calls.max = 0")
        self._state.clients.add(self, session, methods)
        connection.register(session.id, methods, most)
        if self._calls is None:
            self._calls = CallRunner(self._state, connection, self.flush, self.flush_soon)
        if connection.is_suspended(session.id):  # since this request was accepted
            self._state.clients.suspend(self, session.id)

    def unregister(self, session_id: str) -> None:
        """Drop the registration of a session."""
        self._state.clients.remove(self, session_id)
        if self._calls is not None:
            self._calls.session_ended(session_id, is_kept=False)

    def _end_calls(self, session_id: str, reason: EndReason) -> None:
        """Fail the calls of a session. A registration is kept if the session can still be refreshed."""
        if self._calls is None:
            return
        if reason in (EndReason.EXPIRED, EndReason.IDLE):
            self._suspend_calls(session_id)
        else:
            self.unregister(session_id)

    def _suspend_calls(self, session_id: str, *, is_refreshed: bool = False) -> None:
        """Fail the calls of a session; keep its registration until its newest token is shown here."""
        if self._calls is not None:
            self._state.clients.suspend(self, session_id)
            self._calls.session_ended(session_id, is_kept=True, is_refreshed=is_refreshed)

    @property
    def is_draining(self) -> bool:
        """Whether the client was asked to leave, or the conversation has ended."""
        return self._connection is None or self._connection.state is not State.OPEN

    async def call_client(self, user: str, session_id: str, call: CallToClient) -> Any:
        """Call a method of a session's client and return its result.

        The client may have registered the method on another of its connections only: the newest one is called then.
        """
        clients = self._state.clients
        connection: Registering = self
        if not clients.handles(self, session_id, call.method):
            connection = clients.handling(user, session_id, call.method) or self
        return await self._state.trace_call(call, connection.peer, partial(connection.call_here, session_id))

    async def find_clients(self, user: str | None, handles: str | None) -> list[ConnectedClient]:
        """Return clients of all processes that handle calls."""
        return await self._state.find_clients(user, handles)

    async def call_here(self, session_id: str, call: CallToClient) -> Any:
        """Call a method that the client has registered on this connection, and return its result."""
        if self._calls is None:
            self._state.clients.count("unavailable")
            raise no_handler(call.method)
        return await self._calls.call(session_id, call, self._has_room)

    async def ask(
        self, user: str, call: CallToClient, *, caller: Session | None = None, bound: bool = False
    ) -> Any:
        """Make a pending call."""
        return await self._state.ask(user, call, caller=caller, peer=self.peer, bound=bound)

    def offer(self, session_id: str, method: str, body: bytes, answered: Answered) -> Callable[[], None]:
        """Offer a pending call on this connection. Raises Unavailable, ResourceExhausted."""
        if self._calls is None:
            raise no_handler(method)
        return self._calls.offer(session_id, method, body, answered, self._has_room)

    def _settle(self, ended: CallEnded) -> None:
        """Pass an answer to the method that waits for it."""
        if self._calls is not None:
            self._calls.settle(ended.call, ended.value, ended.error)

    # --- sending -------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self._connection is not None:
            data = self._connection.outbox.take()
            if data:
                self._write(data)

    def _write(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None, "a conversation ends before its transport"
        is_read = self._paused_since is None
        transport.write(data)
        if self._paused_since is not None:
            self._check_write_buffer(0 if is_read else len(data))

    def _check_write_buffer(self, added: int) -> None:
        """Stop reading, or end the connection, while the peer does not read. `added` are bytes since it stopped."""
        assert self._transport is not None
        self._unread += added
        if not self._has_room(0):
            self.abort("write_buffer_full")
        elif not self.is_held_up:
            self._hold_up(self._transport.get_write_buffer_size())

    def _has_room(self, size: int) -> bool:
        assert self._transport is not None
        limit = WRITE_BUFFER_HARD_FACTOR * self._state.write_buffer_bytes
        return self._transport.get_write_buffer_size() + size <= limit

    def flush_soon(self) -> None:
        """Send the answers of one turn of the loop in one write."""
        if not self._flush_planned and self._connection is not None:
            self._flush_planned = True
            self._state.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_planned = False
        self.flush()
        self._continue_streams()
        connection = self._connection
        if connection is not None:
            if connection.deadline_moved:
                self._set_deadline()
            if connection.state is State.DRAINING and not (connection.in_flight or connection.has_calls):
                self.close(GoAwayReason.DRAINING)

    def _continue_streams(self) -> None:
        """Let streams send what there is room for."""
        if self._streams is not None:
            assert self._transport is not None, "a conversation ends before its transport"
            self._streams.flushed(self._transport.get_write_buffer_size())

    def has_ended(self, request: Request) -> bool:
        """Return whether a request has been answered or can no longer be answered."""
        connection = self._connection
        return connection is None or (request.held and not connection.is_held(request))

    def cancel_all(self) -> None:
        """Answer every request in flight with CANCELLED, as it may have run, and cancel its method."""
        if self._dispatcher is not None:
            self._dispatcher.cancel_all()

    @property
    def in_flight(self) -> int:
        """Requests whose methods wait."""
        return 0 if self._dispatcher is None else self._dispatcher.in_flight

    @property
    def streams_open(self) -> int:
        """Streams that have not been answered."""
        return 0 if self._streams is None else self._streams.running

    # --- time --------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        connection = self._connection
        if connection is None:
            return
        if connection.wasted >= MAX_WASTED:
            self._slow_down(connection)
        deadline = connection.next_deadline()
        if self._paused_since is not None:
            deadline = min(deadline, self._paused_since + self._state.write_timeout)
        if self._slow_until is not None:
            deadline = min(deadline, self._slow_until)
        self._state.wheel.set(self, deadline)

    def handle_deadline(self, now: float) -> None:
        if self._connection is None:
            return
        if self._paused_since is not None and now >= self._paused_since + self._state.write_timeout:
            assert self._transport is not None, "a conversation ends before its transport"
            unread = self._transport.get_write_buffer_size()
            if unread > self._unread - TAKEN_AT_LEAST:
                self.abort("write_timeout")
                return
            self._paused_since, self._unread = now, unread
        wall = self.wall()
        unsent = 0 if self._transport is None else self._transport.get_write_buffer_size()
        for event in self._connection.handle_timeout(wall, now, unsent):
            self.handle(event)
        self.flush()
        if self._slow_until is not None and now >= self._slow_until:
            self._slow_until = None
            self._continue()
        self._set_deadline()

    # --- the end -----------------------------------------------------------------------------------------

    def leave_runs(self) -> None:
        """End the attachments to runs, which their client reads elsewhere from now on."""
        if self._dispatcher is not None:
            self._dispatcher.leave_runs()

    def go_away(self, reason: GoAwayReason) -> None:
        """Send GOAWAY and close as soon as nothing is in flight."""
        connection = self._connection
        if connection is None:
            return
        state = self._state
        connection.settings = state.settings  # refusals from now on have the delay of GOAWAY
        connection.go_away(reason, state.settings.retry_draining_ms, state.clock.wall())
        self.flush()
        if not (connection.in_flight or connection.has_calls):
            self.close(reason)

    def _conversation_ended(self, ended: ConnectionEnded) -> None:
        if ended.code is not None:
            self._state.counters.errors[ended.code] += 1
            name = ended.code.name
            log.info("connection.refused", peer=self.peer, connection=self.id, code=name, reason=ended.reason)
        self.flush()
        self.close(ended.code.name.lower() if ended.code is not None else ended.reason)

    def close(self, reason: str) -> None:
        """Close after sending what is queued."""
        self._ended(reason)
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Reset the connection of a peer that does not read."""
        log.info("connection.aborted", peer=self.peer, connection=self.id, reason=reason)
        self._ended(reason)
        if self._transport is not None:
            self._transport.abort()

    def _ended(self, reason: str) -> None:
        """Release all references. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        state = self._state
        state.wheel.discard(self)
        state.connection_ended(self)
        state.counters.connections_ended[reason] += 1
        if is_on("debug"):
            log.debug("connection.ended", peer=self.peer, connection=self.id, reason=reason)
        for session_id in connection.sessions:
            state.session_connections.leave(session_id, self)
        connection.end()
        self._suspended = None
        if self._calls is not None:
            for session_id in connection.registered_sessions:
                state.clients.remove(self, session_id)
            self._calls.close(reason)
            self._calls = None
        dispatcher, self._dispatcher = self._dispatcher, None
        if self._lookup is not None:
            self._lookup.cancel()
        if dispatcher is not None:
            dispatcher.close()


class TracedProtocol(ServerProtocol):
    """One connection of a server that records traces: it processes each read within one that is not recorded."""

    __slots__ = ()

    def _process(self, events: Iterator[ServerEvent] | tuple[RawRequest], wall: int) -> None:
        tracing = self._state.tracing
        if tracing is None:  # the server has not started
            ServerProtocol._process(self, events, wall)
        else:
            tracing.read_context.copy().run(ServerProtocol._process, self, events, wall)
