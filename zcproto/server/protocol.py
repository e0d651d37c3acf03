"""Moves the bytes of one connection between its TLS transport, its conversation and its methods.

    data -> connection.receive_data -> for each event -> run the method -> answer
    then once: connection.data_to_send -> transport.write

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

import contextlib
from collections.abc import Iterator
from typing import Any, Final, cast

from zcproto.auth.identity import Channel
from zcproto.auth.schemes import certificate_key
from zcproto.connection.events import (
    CallEnded,
    ConnectionEnded,
    CreditReceived,
    FrameBuffered,
    FramesRead,
    GoAwayReason,
    ItemsReceived,
    KeyWanted,
    RawRequest,
    Request,
    RequestEnded,
    ServerEvent,
    ServerStream,
    SessionJoined,
    SessionLeft,
    TokenUnknown,
)
from zcproto.connection.refusals import TOKEN_ERRORS
from zcproto.connection.server import REPORTED_STEP, ServerConnection
from zcproto.connection.state import State
from zcproto.errors import CallError, CertificateError, Code, TlsError
from zcproto.observe.log import is_on
from zcproto.server.dispatch import SENT_AT_ONCE, Dispatcher
from zcproto.server.eager import EagerWorker
from zcproto.server.state import NO_METHODS, PART_BITS, ServerState, log
from zcproto.server.streams import STREAM_TURN_BYTES, StreamRunner
from zcproto.sessions import EndReason, Session
from zcproto.sessions.session import CERTIFICATE_KEY
from zcproto.tls.server import TlsServerTransport
from zcproto.wire.decoder import LARGE
from zcproto.wire.frame import RESPONSE, SALT_SIZE
from zcproto.wire.message import NO_META, encode_error

WRITE_BUFFER_HARD_FACTOR: Final = 4
"""Answers in progress when a peer stops reading may fill its buffer to this many times the limit."""

TAKEN_AT_LEAST: Final = 16_384
"""Bytes that a slow peer must read in each `write_timeout`; less counts as not reading."""

FRAMES_PER_TURN: Final = 128
TURN_MS: Final = 1
"""A connection that has processed so many frames, or for longer, waits for its next turn of the loop."""

MAX_WASTED: Final = 16
SLOW_DOWN_S: Final = 0.002
"""Seconds for each refused frame, frame without effect, or PING."""

CUT_FRAME: Final = "too many incomplete frames; send fewer large frames at once, or send them faster"


class ServerProtocol(Dispatcher):
    """One connection of a server."""

    __slots__ = (
        "_flush_planned",
        "_is_held_up",
        "_lookup",
        "_paused_since",
        "_slow_until",
        "_suspended",
        "_transport",
        "_unread",
        "deadline_tick",
        "suppress_revoked_event",
    )

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._connection = self._streams = self._calls = self._workers = None
        self._number = 0
        self._uncut = ()
        self._transport: TlsServerTransport | None = None
        self._suspended: Iterator[ServerEvent] | None = None  # until they may go on
        self._is_held_up = False  # until the peer reads
        self._lookup: EagerWorker | None = None
        self._paused_since: float | None = None  # or since the peer last read its least
        self._slow_until: float | None = None
        self._unread = 0  # bytes that waited for the peer then, and those added since
        self._flush_planned = False
        self.suppress_revoked_event = False  # while its own request revokes sessions
        self.deadline_tick = 0

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
        state.connections.add(self)
        counters.connections_opened += 1
        if is_on("debug"):
            log.debug("connection.opened", peer=self.peer, connection=self.id)
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
        self._is_held_up = False
        if self._streams is not None:
            self._streams.is_blocked = False
            self._continue_streams()
        self._continue()

    def _hold_up(self, unread: int) -> None:
        """Read nothing more from a peer that has not read its answers."""
        # The transport of a connection with streams pauses earlier, for their items.
        if self._streams is None or unread > self._state.write_buffer_bytes:
            assert self._transport is not None, "a conversation ends before its transport"
            self._is_held_up = True
            self._transport.pause_reading()

    def _continue(self) -> None:
        """Process the suspended events and read again, unless something must still be awaited."""
        if not self._is_held_up and self._lookup is None and self._slow_until is None:
            suspended, self._suspended = self._suspended, None
            if suspended is not None:
                self._process(suspended, self.wall())
        if not self._is_held_up and self._transport is not None:
            if self._suspended is None and self._slow_until is None:
                self._transport.resume_reading()
            self._set_deadline()

    def _wait_turn(self, events: Iterator[ServerEvent]) -> None:
        """Let the other connections have their turn before these events."""
        if self._connection is not None and self._transport is not None:
            self._suspended = events
            self._transport.pause_reading()
            self._state.call_soon(self._continue)

    def _slow_down(self, connection: ServerConnection) -> None:
        """Process nothing of a peer for a time that grows with its frames that were refused or had no effect."""
        wasted, connection.wasted = connection.wasted, 0
        if self._transport is not None and len({each.user for each in connection.sessions.values()}) <= 1:
            self._slow_until = (self._slow_until or self.now()) + wasted * SLOW_DOWN_S
            self._transport.pause_reading()

    # --- requests ------------------------------------------------------------------------------------

    def _process(self, events: Iterator[ServerEvent] | tuple[RawRequest], wall: int) -> None:
        """Process events until they end or must be suspended, then send what is queued."""
        state, connection = self._state, self._connection
        timed = wall >> PART_BITS != state.timed_part
        checked = timed or state.request_limits.checks_sessions
        find = (NO_METHODS if checked else state.direct_methods).get
        tracing = state.tracing
        frames, others, check_at = 0, 0, 16
        for event in events:
            if event.__class__ is tuple:
                stream, token, session, name, params, meta = event  # type: ignore[misc]  # the only bare tuple
                method = find(name)
                if (
                    method is None
                    or session is None
                    or (meta is not NO_META and meta.idempotency_key is not None)
                    or (tracing is not None and tracing.is_due(meta))
                ):
                    method = state.methods.get(name)
                    if timed:
                        self._run_timed(Request(*event), method, wall)
                    else:
                        self._run(Request(*event), method, wall)
                else:
                    method.calls += 1
                    try:
                        if not method.is_unchecked:
                            bind = method.bind
                            params = bind(params)
                        result = method.function(**params)
                        encode = method.encode
                        if method.is_async:
                            worker = state.tasks.start(result)
                            body = encode(state.tasks.result) if worker is None else None
                        else:
                            body = encode(result)
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException as error:  # a method may raise anything; its caller gets one answer
                        self._answer_exception(Request(*event), error)
                    else:
                        if body is None:
                            assert worker is not None
                            self._hold(Request(*event), worker)
                        elif len(body) >= SENT_AT_ONCE:
                            self._answer_large(Request(*event), body)
                        else:
                            connection.outbox.send(RESPONSE, stream, token, body, wall)  # type: ignore[union-attr]
            elif event.__class__ is ServerStream:
                self._run(event, state.methods.get(event.method), wall)
            elif event.__class__ is FramesRead:
                frames += event.frames - 1
                others += event.frames
            elif self._handle(event):
                self._suspended = cast("Iterator[ServerEvent]", events)
                break
            else:
                others += 1
            frames += 1
            if self._is_held_up:
                is_over = events.__class__ is tuple or self._connection is None
                self._suspended = None if is_over else events  # type: ignore[assignment]
                break
            if frames >= check_at:
                if frames >= FRAMES_PER_TURN or state.clock.wall() - wall > TURN_MS:
                    self._wait_turn(cast("Iterator[ServerEvent]", events))
                    break
                check_at += 16
        state.counters.requests += frames - others
        connection = self._connection
        if connection is not None:
            data = connection.outbox.take()
            if data and self._transport is not None:
                if self._paused_since is not None:
                    self._unread += len(data)
                self._transport.write(data)
                if self._paused_since is not None:
                    self._check_write_buffer()
            if connection.deadline_moved:
                self._set_deadline()

    def _handle(self, event: ServerEvent) -> bool:
        """Process an event other than a request. Return True if those after it must wait."""
        if event.__class__ is CreditReceived:
            if self._streams is not None:
                self._streams.credit_received(event.stream)
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
            self._stop(event)
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

    def _new_runner(self, connection: ServerConnection) -> StreamRunner:
        runner = super()._new_runner(connection)
        runner.is_blocked = self._paused_since is not None
        if self._transport is not None and connection.settings.streams is not None:
            write_bytes = connection.settings.streams.write_bytes
            limit = min(STREAM_TURN_BYTES, write_bytes, self._state.write_buffer_bytes)
            self._transport.set_write_buffer_limits(high=limit)
        return runner

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
            unknown.refusal = self._internal_error("token", error)
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

    # --- sending -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._connection is not None:
            data = self._connection.outbox.take()
            if data:
                self._write(data)

    def _write(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None, "a conversation ends before its transport"
        if self._paused_since is not None:
            self._unread += len(data)
        transport.write(data)
        if self._paused_since is not None:
            self._check_write_buffer()

    def _check_write_buffer(self) -> None:
        assert self._transport is not None
        if not self._has_room(0):
            self.abort("write_buffer_full")
        elif not self._is_held_up:
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
        self._flush()
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
            self._handle(event)
        self._flush()
        if self._slow_until is not None and now >= self._slow_until:
            self._slow_until = None
            self._continue()
        self._set_deadline()

    # --- the end -----------------------------------------------------------------------------------------

    def go_away(self, reason: GoAwayReason) -> None:
        """Send GOAWAY and close as soon as nothing is in flight."""
        connection = self._connection
        if connection is None:
            return
        state = self._state
        connection.settings = state.settings  # refusals from now on have the delay of GOAWAY
        connection.go_away(reason, state.settings.retry_draining_ms, state.clock.wall())
        self._flush()
        if not (connection.in_flight or connection.has_calls):
            self.close(reason)

    def _conversation_ended(self, ended: ConnectionEnded) -> None:
        if ended.code is not None:
            self._state.counters.errors[ended.code] += 1
            name = ended.code.name
            log.info("connection.refused", peer=self.peer, connection=self.id, code=name, reason=ended.reason)
        self._flush()
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
        for session_id in connection.registered_sessions:
            state.clients.remove(self, session_id)
        connection.end()
        self._suspended = None
        if self._calls is not None:
            self._calls.close(reason)
            self._calls = None
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.close()
        if self._lookup is not None:
            self._lookup.cancel()
        workers, self._workers = self._workers, None
        for worker in (workers or {}).values():
            worker.cancel()
