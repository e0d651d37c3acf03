"""Runs the methods of one connection's requests and answers them.

    request -> access -> parameters -> method -> answer

Decides: who may call a method, and which answer an exception becomes. Calls with a session of a method without
checked parameters are inlined in `ServerProtocol._process`, unless requests with a session are limited.

Rules:
- A method runs in the turn of the loop in which its request arrives, until it first waits.
- Every request gets one answer, whatever its method raises.
- An exception that is not a CallError is an internal error: the peer gets an incident id, the log the traceback.
- A large answer is sent before the next request is run, so that back-pressure takes effect.

It must not know: TLS, what is allowed on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from types import CoroutineType
from typing import Any, Final, cast

from zcproto.app.app import RESERVED_PREFIXES, UNLIMITED, Method
from zcproto.app.context import Context, DetachedContext
from zcproto.common.network import network_of
from zcproto.connection.events import CallEnded, Request, RequestEnded, ServerStream
from zcproto.connection.refusals import NEEDS_SESSION, TOO_MUCH_HELD
from zcproto.connection.server import ServerConnection
from zcproto.connection.state import State
from zcproto.errors import (
    Aborted,
    CallError,
    Cancelled,
    Code,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    ZcprotoError,
)
from zcproto.server.calls import CallRunner
from zcproto.server.clients import Registering
from zcproto.server.eager import EagerWorker
from zcproto.server.idempotency import Answer, Waiting, request_digest
from zcproto.server.state import PART_BITS, ServerState, log
from zcproto.server.streams import StreamRunner, StreamWorker
from zcproto.sessions import EndReason, Session
from zcproto.wire.decoder import LARGE
from zcproto.wire.message import MessageError, encode_error

SENT_AT_ONCE: Final = 4_096
"""An answer of this size is sent at once: back-pressure must take effect before the next one is made."""

UNIMPLEMENTED: Final = encode_error(Code.UNIMPLEMENTED, "unknown method; call server.info to list methods")
NOT_PERMITTED: Final = encode_error(
    Code.PERMISSION_DENIED,
    "the roles of this session do not allow this method; call server.info to list those that they allow",
)
LOGGED_CUTS: Final = frozenset({"slow", "stale", "token_rotated", "wrong_token", "denied", "memory"})
"""Reasons that an operator should know: a fault of the client or of the network, and what a reload has ended."""

TOO_MANY_ITEMS: Final = "too many items of this user wait for their methods; try again"
KEY_NEEDS_SESSION: Final = encode_error(
    Code.INVALID_ARGUMENT, "meta.idempotency_key needs a session; call session.open first"
)


class Dispatcher(asyncio.Protocol):
    """Runs requests and answers them. Base of `ServerProtocol`, which moves the bytes.

    Not an object of its own: it would cost every connection memory. Its fields are those of `ServerProtocol`.
    """

    __slots__ = ("_calls", "_connection", "_number", "_state", "_streams", "_uncut", "_workers", "peer")

    peer: str
    _calls: CallRunner | None
    _connection: ServerConnection | None
    _number: int
    _state: ServerState
    _streams: StreamRunner | None
    _uncut: tuple[tuple[str, Code], ...]  # sessions that its own request has ended
    _workers: dict[Request, EagerWorker | Waiting] | None

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
        """Return the state of a method's application. Raises RuntimeError if it has no lifespan."""
        owner = self._state.methods[method].owner
        if owner is None:
            raise RuntimeError("this application has no lifespan; pass one: App(lifespan=...)")
        return self._state.lifespan_values[owner]

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

    def _flush(self) -> None:
        """Send what is queued."""
        raise NotImplementedError

    def flush_soon(self) -> None:
        """Send what is queued at the end of this turn of the loop."""
        raise NotImplementedError

    def _has_room(self, size: int) -> bool:
        """Return whether the peer reads fast enough for a frame of this size."""
        raise NotImplementedError

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
            self._calls = CallRunner(self._state, connection, self._flush, self.flush_soon)
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

    async def call_client(
        self,
        user: str,
        session_id: str,
        method: str,
        params: Mapping[str, Any],
        timeout: float,  # noqa: ASYNC109  it is sent
        traceparent: str | None,
    ) -> Any:
        """Call a method of a session's client and return its result.

        The client may have registered the method on another of its connections only: the newest one is called then.
        """
        clients = self._state.clients
        connection: Registering = self
        if not clients.handles(self, session_id, method):
            connection = clients.handling(user, session_id, method) or self
        return await connection.call_here(session_id, method, params, timeout, traceparent)

    async def call_here(
        self,
        session_id: str,
        method: str,
        params: Mapping[str, Any],
        timeout: float,  # noqa: ASYNC109  it is sent
        traceparent: str | None,
    ) -> Any:
        """Call a method that the client has registered on this connection, and return its result."""

        async def call(traceparent: str | None) -> Any:
            if self._calls is None:
                self._state.clients.count("unavailable")
                raise Unavailable("the client handles no methods on this connection")
            return await self._calls.call(session_id, method, params, timeout, traceparent, self._has_room)

        tracing = self._state.tracing
        if tracing is None:
            return await call(traceparent)
        return await tracing.call_client(method, self.peer, traceparent, call)

    def _settle(self, ended: CallEnded) -> None:
        """Pass an answer to the method that waits for it."""
        if self._calls is not None:
            self._calls.settle(ended.call, ended.value, ended.error)

    # --- methods -------------------------------------------------------------------------------------

    def _run(self, request: Request, method: Method | None, wall: int) -> None:
        """Run a request's method until it returns or waits. `wall` is when the request was read."""
        state = self._state
        if method is None or not method.is_open:
            limits, session = state.request_limits, request.session
            if (session is None or limits.checks_sessions) and not request.method.startswith(UNLIMITED):
                user = None if session is None else session.user
                excess = limits.check(user, self.peer, state.clock.now())
                if excess is not None:
                    log.info("request.limited", peer=self.peer, user=user, what=request.method)
                    self._answer_exception(request, excess)
                    return
            if session is None and (method is None or not method.public):
                self._fail(request, Code.UNAUTHENTICATED, NEEDS_SESSION)
                return
            if method is None:
                self._fail(request, Code.UNIMPLEMENTED, UNIMPLEMENTED)
                return
            if method.access is not None and not method.may_be_called_by(session):
                self._log_denied(request, method)
                self._fail(request, Code.PERMISSION_DENIED, NOT_PERMITTED)
                return
            if method.shape != "unary" and not isinstance(request, ServerStream):
                error = FailedPrecondition("this method is a stream: open it as one", {"shape": method.shape})
                self._answer_exception(request, error)
                return
        method.calls += 1
        tracing = state.tracing
        if tracing is None:
            self._run_allowed(request, method, wall)
            return
        method, entered = tracing.enter(request, method)
        try:
            self._run_allowed(request, method, wall)
        finally:
            tracing.leave(entered)

    def _run_allowed(self, request: Request, method: Method, wall: int) -> None:
        """Run a request's method: its caller may call it."""
        state = self._state
        if request.meta.idempotency_key is not None and not request.method.startswith(RESERVED_PREFIXES):
            self._run_once(request, method)  # never the protocol's methods: their answers may hold tokens
            return
        if method.shape != "unary":
            self._run_stream(cast("ServerStream", request), method)
            return
        try:
            arguments = method.bind(request.params)
            if method.context_name is not None:
                arguments[method.context_name] = Context(self, request)  # type: ignore[arg-type]  # ServerProtocol is one
            result = method.function(**arguments)
            if method.is_async or (method.may_wait and isinstance(result, CoroutineType)):
                worker = state.tasks.start(result)
                if worker is not None:
                    self._hold(request, worker)
                    return
                result = state.tasks.result
            body = method.encode(result)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._answer_exception(request, error)
        else:
            self._answer_body(request, body, wall)

    def _run_stream(self, stream: ServerStream, method: Method) -> None:
        """Start a method that sends or takes items."""
        connection = self._connection
        assert connection is not None, "its conversation has just yielded the stream"
        try:
            arguments = method.bind(stream.params)
        except Exception as error:
            self._answer_exception(stream, error)
            return
        context = None
        if method.context_name is not None:
            context = arguments[method.context_name] = Context(self, stream)  # type: ignore[arg-type]  # ServerProtocol is one
        if self._streams is None:
            self._streams = self._new_runner(connection)
        items = None
        if method.items is not None:
            name, type_ = method.items
            items = arguments[name] = self._streams.take_items(stream, type_.check)
            if items is None:
                self._answer_exception(stream, ResourceExhausted(TOO_MANY_ITEMS))
                return
        self._state.traffic_begins()
        connection.hold(stream, self.now())
        if method.shape == "client":
            work = method.function(**arguments)
        elif method.middleware:
            produce = partial(self._streams.produce, stream, encode=method.encode_item)
            work = method.function(**arguments, produce=produce)
        else:
            work = self._streams.produce(stream, method.function(**arguments), context, method.encode_item)
        self._streams.start(stream, work, items)

    def _new_runner(self, connection: ServerConnection) -> StreamRunner:
        """Return what runs the streams of this connection."""
        return StreamRunner(self._state, connection, self)

    def _run_timed(self, request: Request, method: Method | None, wall: int) -> None:
        """Run a request's method and record its duration."""
        state = self._state
        state.timed_part = wall >> PART_BITS
        state.traffic_begins()
        began = state.clock.now()
        self._run(request, method, wall)
        if method is not None:
            method.durations.add(state.clock.now() - began)

    def _run_once(self, request: Request, method: Method) -> None:
        """Run a request with an idempotency key, or repeat the answer if it has been run."""
        session, key, state = request.session, request.meta.idempotency_key, self._state
        assert key is not None
        if session is None:
            self._fail(request, Code.INVALID_ARGUMENT, KEY_NEEDS_SESSION)
            return
        try:
            arguments = method.bind(request.params)
            if method.context_name is not None:
                arguments[method.context_name] = DetachedContext(self, request)  # type: ignore[arg-type]  # likewise
        except Exception as error:
            self._answer_exception(request, error)
            return

        async def execute() -> bytes:
            result = method.function(**arguments)
            body = method.encode(await result if method.is_async else result)
            if len(body) > state.settings.max_body:
                raise MessageError(f"the answer has {len(body)} bytes")
            return body

        began, error_answer = self.now(), partial(self._error_answer, request)

        def later(answer: Answer) -> None:
            method.waits.add(self.now() - began)
            if self._workers is not None:
                self._workers.pop(request, None)
            self._answer(request, answer)
            self.flush_soon()

        digest = request_digest(request.method, request.params)
        outcome = state.idempotency.submit(session.user, key, digest, execute, error_answer, later)
        if isinstance(outcome, Answer):
            self._answer(request, outcome)
        else:
            self._hold(request, outcome)

    def _hold(self, request: Request, worker: EagerWorker | Waiting) -> None:
        """Keep a request whose method waits."""
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
        limits = self._state.request_limits if self._state.request_limits.counts_running else None
        user, peer = None if request.session is None else request.session.user, self.peer
        if limits is not None:
            limits.begin(user, peer)

        def done(result: Any, error: BaseException | None) -> None:
            if limits is not None:
                limits.end(user, peer)
            method.waits.add(self.now() - now)
            self.method_ended(request, result, error)

        worker.done = done

    def method_ended(self, request: Request, result: Any, error: BaseException | None) -> None:
        """Answer a request whose method has waited."""
        if self._workers is not None:
            self._workers.pop(request, None)
        if error is not None:
            self._answer_exception(request, error)
        else:
            try:
                body = self._state.methods[request.method].encode(result)
            except Exception as unsendable:
                self._answer_exception(request, unsendable)
            else:
                self._answer_body(request, body, self.wall())
        self.flush_soon()

    def _stop(self, ended: RequestEnded) -> None:
        """Cancel the method of a request that has ended: cancelled, or past its deadline."""
        self._state.counters.errors[ended.code] += 1
        if ended.reason:
            self._count_cut(ended.request, ended.reason)
        if isinstance(ended.request, ServerStream) and ended.request.worker is not None:
            assert self._streams is not None, "it runs the stream"
            ended.request.worker.cancel()
            self._streams.release(ended.request)
            return
        assert self._workers is not None, "a request in flight has a worker"
        worker = self._workers[ended.request]
        if not isinstance(worker, Waiting):
            del self._workers[ended.request]
            worker.cancel()
        # A request with an idempotency key continues, and stays here until it has ended.

    def cut_stream(self, stream: ServerStream) -> None:
        """End a stream whose user's items take too much memory."""
        if self._connection is not None:
            self._stop(self._connection.cut_stream(stream, TOO_MUCH_HELD, self.wall()))

    def cut_streams_soon(self) -> None:
        """Cut the streams of the sessions that this peer has ended, after its request has been answered."""
        if self._uncut:
            self._state.call_soon(self._cut_streams)

    def _cut_streams(self) -> None:
        uncut, self._uncut = self._uncut, ()
        if self._connection is not None:
            for session_id, code in uncut:
                for ended in self._connection.cut_streams(session_id, code, self.wall()):
                    self._stop(ended)
            self.flush_soon()

    def cut_denied_streams(self) -> None:
        """Cut the streams whose sessions may no longer call their methods."""
        if self._connection is not None:
            for ended in self._connection.cut_denied(self._may_go_on, self.wall()):
                self._stop(ended)
            self.flush_soon()

    def _may_go_on(self, stream: ServerStream) -> bool:
        return self._state.methods[stream.method].may_be_called_by(stream.session)

    def _count_cut(self, stream: Request, reason: str) -> None:
        self._state.counters.streams_cut[reason] += 1
        if reason in LOGGED_CUTS:
            user = None if stream.session is None else stream.session.user
            log.info("stream.cut", peer=self.peer, user=user, what=stream.method, reason=reason)

    def cancel_all(self) -> None:
        """Answer every request in flight with CANCELLED, as it may have run, and cancel its method.

        One that waits for the run of another request with its key has not run: UNAVAILABLE.
        """
        draining = {"reason": "draining", "retry_after_ms": self._state.settings.retry_draining_ms}
        running: list[tuple[Request, EagerWorker | StreamWorker | Waiting]] = [*(self._workers or {}).items()]
        if self._streams is not None:
            running += self._streams.workers()
        for request, worker in running:
            error: CallError = Cancelled("the server stopped before the method returned")
            if isinstance(request, ServerStream):
                error.details = draining
                self._count_cut(request, "draining")
            elif isinstance(worker, Waiting) and not worker.has_begun:
                error = Unavailable("the server stopped while this request waited for its key; send it again")
            self._answer_exception(request, error)
            worker.cancel()
        self._flush()

    @property
    def in_flight(self) -> int:
        """Requests whose methods wait."""
        return self.streams_open + len(self._workers or ())

    @property
    def streams_open(self) -> int:
        """Streams that have not been answered."""
        return 0 if self._streams is None else self._streams.running

    def has_ended(self, request: Request) -> bool:
        """Return whether a request has been answered or can no longer be answered."""
        connection = self._connection
        return connection is None or (request.held and not connection.is_held(request))

    # --- answers -------------------------------------------------------------------------------------

    def _answer_body(self, request: Request, body: bytes, wall: int) -> None:
        if len(body) >= SENT_AT_ONCE:
            self._answer_large(request, body)
        elif self._connection is not None:
            self._connection.respond(request, body, wall)

    def _answer(self, request: Request, answer: Answer) -> None:
        if answer.code:
            self._fail(request, answer.code, answer.body)
        else:
            self._answer_body(request, answer.body, self.wall())

    def _answer_large(self, request: Request, body: bytes) -> None:
        """Answer and send at once, so that a peer that does not read stops the next request."""
        if self._connection is None:
            return
        if len(body) > self._connection.settings.max_body:
            self._answer_exception(request, MessageError(f"the answer has {len(body)} bytes"))
        else:
            if len(body) >= LARGE:
                self._state.counters.large_bytes += len(body)
            self._connection.respond(request, body, self.wall())
            self._flush()

    def _answer_exception(self, request: Request, error: BaseException) -> None:
        self._answer(request, self._error_answer(request, error))

    def _error_answer(self, request: Request, error: BaseException) -> Answer:
        """Return the ERROR that an exception becomes."""
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("the server cancelled the method")
        elif isinstance(error, ZcprotoError) and error.of_client:
            error = Aborted(f"a call to a client failed: {error}")
        if not isinstance(error, CallError):
            return Answer(Code.INTERNAL, self._internal_error(request.method, error))
        details = error.details
        if error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED) and not details:
            details = {"retry_after_ms": self._state.settings.retry_draining_ms}
        try:
            return Answer(error.code, encode_error(error.code, error.message, details))
        except MessageError as unsendable:
            return Answer(Code.INTERNAL, self._internal_error(request.method, unsendable))

    def _internal_error(self, what: str, error: BaseException) -> bytes:
        """Log an internal error; return the ERROR's body, which holds only the incident id."""
        incident = self._state.incident(what, error, peer=self.peer, connection=self.id)
        return encode_error(Code.INTERNAL, f"internal error, incident {incident}", {"incident": incident})

    def _log_denied(self, request: Request, method: Method) -> None:
        session = request.session
        assert session is not None
        assert method.access is not None
        needed, denied = method.access
        log.info(
            "request.denied",
            what=method.name,
            user=session.user,
            peer=self.peer,
            missing=None if needed & session.roles else sorted(needed) or None,
            denied=sorted(denied & session.roles) or None,
        )

    def _fail(self, request: Request, code: int, body: bytes) -> None:
        if self._connection is not None and self._connection.fail(request, body, self.wall()):
            self._state.counters.errors[code] += 1
            if code == Code.RESOURCE_EXHAUSTED:
                self._connection.wasted += 1
                self._connection.deadline_moved = True
