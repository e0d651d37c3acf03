"""The pump of one connection: TLS transport <-> conversation <-> methods.

    data -> connection.receive_data -> for each event -> run the method -> answer
    then once: connection.data_to_send -> transport.write

What it decides: how methods are run, back-pressure (a peer that does not read is not read from, nor are its
requests run; so it is while a token is looked up), and how a connection ends. What is allowed on the wire is
the connection's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, cast

from zcproto.app.app import RESERVED_PREFIXES
from zcproto.app.context import Context, DetachedContext
from zcproto.auth.certificate import certificate_key
from zcproto.auth.identity import NO_CHANNEL, Channel
from zcproto.connection.events import (
    ConnectionEnded,
    GoAwayReason,
    KeyWanted,
    Request,
    RequestEnded,
    ServerEvent,
    SessionJoined,
    TokenUnknown,
)
from zcproto.connection.server import NEEDS_SESSION, TOKEN_ERRORS, ServerConnection
from zcproto.connection.state import State
from zcproto.errors import CallError, Cancelled, CertificateError, Code, TlsError
from zcproto.observe.log import is_on
from zcproto.server.eager import Worker
from zcproto.server.idempotency import Answer, Waiting, request_digest
from zcproto.server.read_timing import PART_BITS
from zcproto.server.state import log
from zcproto.sessions import EndReason, Session
from zcproto.sessions.session import CERTIFICATE_KEY
from zcproto.wire.frame import SALT_SIZE
from zcproto.wire.message import NO_META, MessageError, encode_body, encode_error

if TYPE_CHECKING:
    from zcproto.app.app import Method
    from zcproto.server.state import ServerState
    from zcproto.tls.server import TlsServerTransport

SENT_AT_ONCE: Final = 4_096
"""An answer of this size is not gathered with others: back-pressure must be felt before the next is made."""

WRITE_BUFFER_HARD_FACTOR: Final = 4
"""Answers that were under way when a peer stopped reading may fill its buffer to so many times the limit."""

TAKEN_AT_LEAST: Final = 16_384
"""Bytes that a peer which lets answers pile up must take in each `write_timeout`: a drip is no reading."""

UNIMPLEMENTED: Final = encode_error(Code.UNIMPLEMENTED, "unknown method: server.info lists those there are")
OPERATORS_ONLY: Final = encode_error(Code.PERMISSION_DENIED, "this method is for operators")
KEY_NEEDS_SESSION: Final = encode_error(
    Code.INVALID_ARGUMENT, "meta.idempotency_key needs a session: a key belongs to its user"
)


class ServerProtocol(asyncio.Protocol):
    """One connection of a server."""

    __slots__ = (
        "_connection",
        "_flush_planned",
        "_looking_up",
        "_number",
        "_paused_since",
        "_state",
        "_suspended",
        "_transport",
        "_unread",
        "_workers",
        "deadline_tick",
        "peer",
        "suppress_revoked_event",
    )

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._transport: TlsServerTransport | None = None
        self._connection: ServerConnection | None = None
        self._suspended: Iterator[ServerEvent] | None = None  # until the peer reads, or a token was looked up
        self._looking_up: Worker | None = None
        self._paused_since: float | None = None  # or since the peer last took its least
        self._unread = 0  # what waited for the peer then, with what was added since
        self._flush_planned = False
        self._workers: dict[Request, Worker | Waiting] | None = None
        self.suppress_revoked_event = (
            False  # its own request is ending sessions: it is answered, not told by event
        )
        self.peer = ""
        self._number = 0
        self.deadline_tick = 0

    @property
    def id(self) -> str:
        """What the connection is called in the log. It has no number before it is first told of."""
        if not self._number:
            self._number = self._state.number_connection()
        return f"{self._state.run}-{self._number}"

    def now(self) -> float:
        return self._state.clock.now()

    def wall(self) -> int:
        return self._state.clock.wall()

    def peer_certificate(self) -> bytes | None:
        """The client's certificate, read from the connection: nothing is kept here. None without one."""
        return None if self._transport is None else self._transport.peer_certificate()

    def channel(self) -> Channel:
        """What proofs of the peer's are tied to."""
        if self._connection is None or self._transport is None:
            return NO_CHANNEL
        return Channel(self.peer_certificate, self._connection.salt, self._transport.leaves)

    # --- the transport's calls ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        state = self._state
        self._transport = cast("TlsServerTransport", transport)
        self.peer = self._transport.peer
        self._transport.set_write_buffer_limits(high=state.write_buffer_bytes)
        wall, now = state.clock.wall(), state.clock.now()
        self._connection = ServerConnection(
            state.settings,
            state.registry,
            salt=state.entropy(SALT_SIZE),
            wall=wall,
            now=now,
            admits=self._admits if state.binding.is_enabled else None,
            refused=state.counters.refused,
        )
        state.connections.add(self)
        state.counters.connections_opened += 1
        if is_on("debug"):
            log.debug("connection.opened", peer=self.peer, connection=self.id)
        if state.announcement is not None:
            self._connection.announce(state.announcement, wall)
            state.counters.events += 1
        if state.draining:
            self._connection.go_away(GoAwayReason.DRAINING, state.settings.retry_draining_ms, wall)
        self._flush()
        self._set_deadline()
        if state.draining:
            self.close(GoAwayReason.DRAINING)

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
        if self._transport is not None:
            self._unread = self._transport.get_write_buffer_size()
            self._transport.pause_reading()
        self._set_deadline()

    def resume_writing(self) -> None:
        self._paused_since = None
        self._go_on()

    def _go_on(self) -> None:
        """Take what was suspended, then what arrives, if there is nothing any more that keeps from it."""
        if self._paused_since is None and self._looking_up is None:
            suspended, self._suspended = self._suspended, None
            if suspended is not None:
                self._process(suspended, self.wall())
        if self._paused_since is None and self._transport is not None:
            if self._looking_up is None:
                self._transport.resume_reading()
            self._set_deadline()

    # --- requests ------------------------------------------------------------------------------------

    def _process(self, events: Iterator[ServerEvent], wall: int) -> None:
        """Take events until there are none, or the peer must read first; then send what there is to send."""
        state = self._state
        methods = state.methods
        timed = wall >> PART_BITS != state.reads.part
        requests = 0
        for event in events:
            if event.__class__ is tuple:
                requests += 1
                stream, token, session, name, params, meta = event  # type: ignore[misc]  # the only bare tuple
                method = methods.get(name)
                if (
                    method is None
                    or not method.takes_params_as_they_are
                    or not (method.public if session is None else method.unrestricted)
                    or (meta is not NO_META and meta.idempotency_key is not None)
                    or timed
                ):
                    if timed:
                        self._run_timed(Request(*event), method, wall)
                    else:
                        self._run(Request(*event), method)
                else:
                    method.calls += 1
                    try:
                        result = method.function(**params)
                        worker = state.tasks.start(result) if method.is_async else None
                        if worker is None:
                            body = encode_body(state.tasks.result if method.is_async else result)
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException as error:  # whatever a method raises, its caller gets one answer
                        self._answer_exception(Request(*event), error)
                    else:
                        if worker is not None:
                            self._hold(Request(*event), worker)
                        elif len(body) >= SENT_AT_ONCE:
                            self._answer_large(Request(*event), body)
                        elif self._connection is not None:
                            self._connection.respond_at_once(stream, token, body, wall)
                if self._paused_since is not None:
                    self._suspended = events
                    break
            elif event.__class__ is SessionJoined:
                state.session_connections.join(event.session_id, self)
            elif event.__class__ is TokenUnknown:
                if self._look_up(event):
                    self._suspended = events
                    break
            elif event.__class__ is RequestEnded:
                self._stop(event)
            elif event.__class__ is KeyWanted:
                self._prove_by_certificate(event.key)
            else:
                self._conversation_ended(cast("ConnectionEnded", event))
                break
        state.counters.requests += requests
        connection = self._connection
        if connection is None:
            return
        data = connection.data_to_send()
        if data and self._transport is not None:
            if self._paused_since is None:
                self._transport.write(data)
                if self._paused_since is not None:
                    self._check_write_buffer()
            else:
                self._write(data)
        if connection.deadline_moved:
            self._set_deadline()

    def _run(self, request: Request, method: Method | None) -> None:
        """Run a request's method as far as it goes without waiting, whatever the method and the request ask for."""
        state = self._state
        refusal = self._refusal(request, method)
        if refusal is not None:
            self._fail(request, *refusal)
            return
        assert method is not None
        method.calls += 1
        if request.meta.idempotency_key is not None and not request.method.startswith(RESERVED_PREFIXES):
            self._run_once(request, method)  # never the protocol's own: an answer of theirs may hold tokens
            return
        try:
            arguments = method.bind(request.params)
            if method.context_name is not None:
                arguments[method.context_name] = Context(self, request)
            result = method.function(**arguments)
            if method.is_async or (method.may_wait and isinstance(result, CoroutineType)):
                worker = state.tasks.start(result)
                if worker is not None:
                    self._hold(request, worker)
                    return
                result = state.tasks.result
            body = encode_body(result)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a method raises, its caller gets one answer
            self._answer_exception(request, error)
        else:
            self._answer_with(request, body)

    def _run_timed(self, request: Request, method: Method | None, wall: int) -> None:
        """As `_run`, and note how long that took."""
        state = self._state
        state.reads.timed(wall)
        began = state.clock.now()
        self._run(request, method)
        if method is not None:
            method.durations.add(state.clock.now() - began)

    def _run_once(self, request: Request, method: Method) -> None:
        """Run a request with an idempotency key, unless it was run: then answer as it was answered."""
        session, key, state = request.session, request.meta.idempotency_key, self._state
        assert key is not None
        if session is None:
            self._fail(request, Code.INVALID_ARGUMENT, KEY_NEEDS_SESSION)
            return
        try:
            arguments = method.bind(request.params)
            if method.context_name is not None:
                arguments[method.context_name] = DetachedContext(self, request)
        except Exception as error:
            self._answer_exception(request, error)
            return

        async def execute() -> bytes:
            result = method.function(**arguments)
            return self._encode_answer(await result if method.is_async else result)

        def failed(error: BaseException) -> Answer:
            return Answer(*self._error_of(request, error))

        began = self.now()

        def later(answer: Answer) -> None:
            method.waits.add(self.now() - began)
            if self._workers is not None:
                self._workers.pop(request, None)
            self._answer_as(request, answer)
            self._flush_soon()

        digest = request_digest(request.method, request.params)
        outcome = state.idempotency.submit(session.user, key, digest, execute, failed, later)
        if isinstance(outcome, Answer):
            self._answer_as(request, outcome)
        else:
            self._hold(request, outcome)

    def _refusal(self, request: Request, method: Method | None) -> tuple[Code, bytes] | None:
        """Why a caller may not have a method; None if it may."""
        if request.session is None and (method is None or not method.public):
            return Code.UNAUTHENTICATED, NEEDS_SESSION
        if method is None:
            return Code.UNIMPLEMENTED, UNIMPLEMENTED
        if method.operator and (request.session is None or not request.session.operator):
            return Code.PERMISSION_DENIED, OPERATORS_ONLY
        return None

    def _hold(self, request: Request, worker: Worker | Waiting) -> None:
        connection = self._connection
        if connection is None:  # the method ended its own connection before it began to wait
            worker.cancel()
            return
        now = self.now()
        connection.hold(request, now)
        if self._workers is None:
            self._workers = {}
        self._workers[request] = worker
        if isinstance(worker, Waiting):
            return
        method = self._state.methods[request.method]

        def done(result: Any, error: BaseException | None) -> None:
            method.waits.add(self.now() - now)
            if self._workers is not None:
                self._workers.pop(request, None)
            if error is None:
                self._answer(request, result)
            else:
                self._answer_exception(request, error)
            self._flush_soon()

        worker.done = done

    def _stop(self, ended: RequestEnded) -> None:
        self._state.counters.count_error(ended.code)
        assert self._workers is not None, "who is in flight has a worker"
        worker = self._workers[ended.request]
        if isinstance(worker, Worker):
            del self._workers[ended.request]
            worker.cancel()
        # What is run once goes on, and its request lingers until it has ended.

    @property
    def in_flight(self) -> int:
        """Requests that wait for their methods."""
        return 0 if self._workers is None else len(self._workers)

    @property
    def reads_too_slowly(self) -> bool:
        """Whether the peer must read before it is read from."""
        return self._paused_since is not None

    def has_ended(self, request: Request) -> bool:
        """Whether a request has its answer already, or can never be answered."""
        connection = self._connection
        return connection is None or (request.held and not connection.is_held(request))

    # --- answers -------------------------------------------------------------------------------------

    def _answer(self, request: Request, result: Any) -> None:
        """Answer in a later turn."""
        try:
            body = encode_body(result)
        except MessageError as error:
            self._answer_fault(request, error)
        else:
            self._answer_with(request, body)

    def _answer_with(self, request: Request, body: bytes) -> None:
        if len(body) < SENT_AT_ONCE:
            if self._connection is not None:
                self._connection.respond(request, body, self.wall())
        else:
            self._answer_large(request, body)

    def _answer_as(self, request: Request, answer: Answer) -> None:
        """Give an answer that may be another request's too."""
        if answer.code:
            self._fail(request, Code(answer.code), answer.body)
        else:
            self._answer_with(request, answer.body)

    def _encode_answer(self, result: Any) -> bytes:
        body = encode_body(result)
        if len(body) > self._state.settings.max_body:
            raise MessageError(f"the answer has {len(body)} bytes")
        return body

    def _answer_large(self, request: Request, body: bytes) -> None:
        """Answer, and send at once: if the peer does not read, the next request is not even run."""
        if self._connection is None:
            return
        if len(body) > self._connection.max_body:
            self._answer_fault(request, MessageError(f"the answer has {len(body)} bytes"))
        else:
            self._connection.respond(request, body, self.wall())
            self._flush()

    def _answer_exception(self, request: Request, error: BaseException) -> None:
        self._fail(request, *self._error_of(request, error))

    def _answer_fault(self, request: Request, error: BaseException) -> None:
        self._fail(request, *self._fault_of(request, error))

    def _error_of(self, request: Request, error: BaseException) -> tuple[Code, bytes]:
        """What an exception is answered with."""
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("the server cancelled it")
        if not isinstance(error, CallError):
            return self._fault_of(request, error)
        details = error.details
        if error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED) and not details:
            details = {"retry_after_ms": self._state.settings.retry_draining_ms}
        try:
            return error.code, encode_error(error.code, error.message, details)
        except MessageError as unsendable:
            return self._fault_of(request, unsendable)

    def _fault_of(self, request: Request, error: BaseException) -> tuple[Code, bytes]:
        """A fault of ours: the peer gets an id to ask about, the log gets the rest."""
        incident = self._state.incident(request.method, error, peer=self.peer, connection=self.id)
        body = encode_error(Code.INTERNAL, f"internal error, incident {incident}", {"incident": incident})
        return Code.INTERNAL, body

    def _fail(self, request: Request, code: Code, body: bytes) -> None:
        if self._connection is not None and self._connection.fail(request, body, self.wall()):
            self._state.counters.count_error(code)

    # --- sessions ------------------------------------------------------------------------------------

    def _admits(self, session: Session) -> bool:
        """Whether a session may be used by this peer, for what it is beside its token."""
        state = self._state
        record = state.registry.record(session.raw_id)
        if record is not None and state.binding.admits(session.user, record.address, self.peer):
            return True
        log.info("session.not_admitted", peer=self.peer, connection=self.id, session=session.id)
        return False

    def join(self, session: Session, token: bytes) -> None:
        """A session was opened or refreshed by a request of this connection."""
        if self._connection is not None:
            state = self._state
            self._connection.join(session, token, state.clock.wall(), state.clock.now())
            state.session_connections.join(session.id, self)

    def _prove_by_certificate(self, key: str) -> None:
        """If a session is bound to a certificate's key: TLS has seen whether this connection's client has it."""
        certificate = self.peer_certificate() if key.startswith(CERTIFICATE_KEY) else None
        if certificate is not None:
            with contextlib.suppress(CertificateError):  # one that cannot be read has opened no session
                if certificate_key(certificate) == key:
                    self.prove(key)

    def has_proved(self, key: str) -> bool:
        """Whether the peer has proved a key, by its certificate or otherwise."""
        self._prove_by_certificate(key)
        return self._connection is not None and self._connection.has_proved(key)

    def prove(self, key: str) -> None:
        """The peer has proved a key: sessions that are bound to it may be used on this connection."""
        if self._connection is not None:
            self._connection.prove(key)

    def disprove(self, key: str) -> None:
        """A key is worth nothing any more."""
        if self._connection is not None:
            self._connection.disprove(key)

    def _look_up(self, unknown: TokenUnknown) -> bool:
        """Find out whether a token is good. True: that takes a while, for which this connection waits."""
        worker = self._state.tasks.start(self._find(unknown))
        if worker is None:
            return False
        assert self._transport is not None, "a conversation ends before its transport"
        self._transport.pause_reading()
        self._looking_up = worker

        def done(result: None, error: BaseException | None) -> None:
            self._looking_up = None
            if self._connection is not None:
                self._go_on()

        worker.done = done
        return True

    async def _find(self, unknown: TokenUnknown) -> None:
        unknown.refusal = TOKEN_ERRORS[Code.UNAVAILABLE]  # should this be cancelled
        try:
            await self._state.sessions.look_up(unknown.token, self.peer, unknown.code)
        except CallError as error:
            unknown.refusal = encode_error(error.code, error.message, error.details)
        except Exception as error:
            incident = self._state.incident("token", error, peer=self.peer, connection=self.id)
            unknown.refusal = encode_error(
                Code.INTERNAL, f"internal error, incident {incident}", {"incident": incident}
            )
        else:
            unknown.refusal = None

    def session_ended(self, session_id: str, code: Code, reason: EndReason) -> None:
        """A session that was used here ended: say so, unless it simply expired or this peer asked for it."""
        if self._connection is None:
            return
        if code is Code.TOKEN_EXPIRED or self.suppress_revoked_event:
            self._connection.leave(session_id, self.now())
        else:
            self._connection.session_revoked(session_id, reason, self.wall(), self.now())
            self._state.counters.events += 1
        self._flush_soon()

    def send_event(self, session_id: str, name: str, data: Any) -> bool:
        """Send an event that speaks of a session."""
        if self._connection is None:
            return False
        sent = self._connection.send_event(session_id, name, data, self.wall())
        self._state.counters.events += sent
        self._flush_soon()
        return sent

    def announce(self, body: bytes) -> None:
        """Send an event that speaks of the server."""
        if self._connection is not None:
            self._connection.announce(body, self.wall())
            self._state.counters.events += 1
            self._flush_soon()

    # --- bytes out -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._connection is not None:
            data = self._connection.data_to_send()
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
        limit = WRITE_BUFFER_HARD_FACTOR * self._state.write_buffer_bytes
        if self._transport.get_write_buffer_size() > limit:
            self.abort("write_buffer_full")

    def _flush_soon(self) -> None:
        """Gather what several methods answer in one turn of the loop into one write."""
        if not self._flush_planned and self._connection is not None:
            self._flush_planned = True
            self._state.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_planned = False
        self._flush()
        connection = self._connection
        if connection is not None:
            if connection.deadline_moved:
                self._set_deadline()
            if connection.state is State.DRAINING and not connection.in_flight:
                self.close(GoAwayReason.DRAINING)

    # --- time --------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        if self._connection is None:
            return
        deadline = self._connection.next_deadline()
        if self._paused_since is not None:
            deadline = min(deadline, self._paused_since + self._state.write_timeout)
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
        self._process(iter(self._connection.handle_timeout(wall, now)), wall)
        self._set_deadline()

    # --- the end -----------------------------------------------------------------------------------------

    def go_away(self, reason: GoAwayReason) -> None:
        """Announce the end, and close as soon as nothing is in flight."""
        connection = self._connection
        if connection is None:
            return
        state = self._state
        connection.go_away(reason, state.settings.retry_draining_ms, state.clock.wall())
        self._flush()
        if not connection.in_flight:
            self.close(reason)

    def cancel_all(self) -> None:
        """Answer what is in flight with CANCELLED: it may have run, and the caller must not think otherwise."""
        for request, worker in list((self._workers or {}).items()):
            self._answer_exception(request, Cancelled("the server stopped before it was done"))
            worker.cancel()
        self._flush()

    def _conversation_ended(self, ended: ConnectionEnded) -> None:
        if ended.code is not None:
            self._state.counters.count_error(ended.code)
            name = ended.code.name
            log.info("connection.refused", peer=self.peer, connection=self.id, code=name, reason=ended.reason)
        self._flush()
        self.close(ended.code.name.lower() if ended.code is not None else ended.reason)

    def close(self, reason: str) -> None:
        """Close after what is queued."""
        transport = self._transport
        self._ended(reason)
        if transport is not None:
            transport.close()

    def abort(self, reason: str) -> None:
        """Reset the connection: its peer does not read."""
        transport = self._transport
        log.info("connection.aborted", peer=self.peer, connection=self.id, reason=reason)
        self._ended(reason)
        if transport is not None:
            transport.abort()

    def _ended(self, reason: str) -> None:
        """Let go of everything; only once. Nothing may keep a closed connection alive."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        state = self._state
        state.wheel.discard(self)
        state.connection_ended(self)
        state.counters.count_end(reason)
        if is_on("debug"):
            log.debug("connection.ended", peer=self.peer, connection=self.id, reason=reason)
        state.counters.dropped_stale += connection.dropped_stale
        for session_id in connection.session_ids:
            state.session_connections.leave(session_id, self)
        connection.end()
        self._suspended = None
        if self._looking_up is not None:
            self._looking_up.cancel()
        workers, self._workers = self._workers, None
        for worker in (workers or {}).values():
            worker.cancel()
