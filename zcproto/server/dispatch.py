"""Runs the methods of one connection's requests and answers them.

    event -> request -> `admit` -> parameters -> method -> answer
          -> any other: `handle` of the edge

Decides: which requests may run, in `admit` alone, and which answer an exception becomes.

Rules:
- A method runs in the turn of the loop in which its request arrives, until it first waits.
- Every request gets one answer, whatever its method raises.
- An exception that is not a CallError is an internal error: the peer gets an incident id, the log the traceback.
- A large answer is sent before the next request is run, so that back-pressure takes effect.

It must not know: TLS, what is allowed on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import CoroutineType
from typing import Any, Final, Protocol

from zcproto.app.app import RESERVED_PREFIXES, UNLIMITED, Method
from zcproto.app.context import CallConnection, Context, DetachedContext
from zcproto.connection.events import (
    DurableStream,
    FramesRead,
    RawRequest,
    Request,
    RequestEnded,
    ServerEvent,
    ServerStream,
)
from zcproto.connection.refusals import LEAVING, NEEDS_SESSION
from zcproto.connection.server import ServerConnection
from zcproto.connection.state import State
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
)
from zcproto.server.eager import EagerWorker
from zcproto.server.idempotency import Answer, Waiting, request_digest
from zcproto.server.state import DETACHED, PART_BITS, ServerState, log
from zcproto.server.streams import StreamRunner, StreamWorker
from zcproto.sessions import Session
from zcproto.wire.decoder import LARGE
from zcproto.wire.frame import RESPONSE
from zcproto.wire.message import NO_META, MessageError, RequestMeta, encode_error

SENT_AT_ONCE: Final = 4_096
"""An answer of this size is sent at once: back-pressure must take effect before the next one is made."""

FRAMES_PER_TURN: Final = 128
TURN_MS: Final = 1
"""A connection that has processed so many frames, or for longer, waits for its next turn of the loop."""

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


class DispatchEdge(CallConnection, Protocol):
    """What moves the bytes of a connection; contexts refer to it. Implemented by `ServerProtocol`."""

    is_held_up: bool
    """Whether the peer must read before its next request is run."""

    def handle(self, event: ServerEvent) -> bool: ...
    def suspend(self, events: Iterable[ServerEvent]) -> None: ...
    def wait_turn(self, events: Iterable[ServerEvent]) -> None: ...
    def flush(self) -> None: ...
    def flush_soon(self) -> None: ...
    def begin_streams(self) -> bool: ...


def _too_large(body: bytes) -> MessageError:
    return MessageError(
        f"the answer has {len(body)} bytes, more than limits.max_frame_bytes; send it in pieces, as a stream"
    )


def _raw(stream: ServerStream) -> RawRequest:
    return stream.stream, stream.token, stream.session, stream.method, stream.params, stream.meta


class Dispatcher:
    """Runs the requests of one connection and answers them. `streams` runs its streams, once there was one."""

    __slots__ = ("_connection", "_edge", "_state", "_workers", "streams")

    def __init__(self, state: ServerState, connection: ServerConnection, edge: DispatchEdge) -> None:
        self._state = state
        self._connection = connection
        self._edge = edge
        self._workers: dict[Request, EagerWorker | Waiting] | None = None
        self.streams: StreamRunner | None = None

    # --- methods -------------------------------------------------------------------------------------

    def run(self, events: Iterable[ServerEvent], wall: int, opened: ServerStream | None = None) -> None:
        """Run the requests of a read, each until it returns or waits, and let the edge handle the other events.

        `wall` is when they were read. With `opened`, an OPEN, it is the only request.
        """
        state, edge, frames_out = self._state, self._edge, self._connection.outbox.frames
        is_timed = wall >> PART_BITS != state.timed_part and opened is None
        frames, others, check_at = 0, 0, 16
        for event in self._timed(events, wall) if is_timed else events:
            if event.__class__ is tuple:
                stream, token, session, name, params, meta = event  # type: ignore[misc]  # the only bare tuple
                method: Any = state.methods.get(name)  # known, once it is admitted
                request: Request | None = opened
                if (
                    session is None
                    or method is None
                    or not method.admits_sessions
                    or opened is not None
                    or state.request_limits.checks_sessions
                ) and (
                    refusal := self.admit(name, method, session, is_stream=opened is not None)
                ) is not None:
                    if state.on_refused is not None:
                        refusal = state.on_refused(name, session, refusal)
                    self._answer(request or Request(*event), refusal)
                else:
                    method.calls += 1
                    entered = None
                    try:
                        if state.tracing is not None and state.tracing.is_due(meta):
                            request = request or Request(*event)
                            method, entered = state.tracing.enter(request, method)
                        if meta is not NO_META and self._is_idempotent(name, meta):
                            self._run_once(request or Request(*event), method)
                            body = worker = None
                        elif opened is not None:
                            self._run_stream(opened, method)
                            body = worker = None
                        else:
                            arguments = params
                            if not method.is_unchecked:
                                arguments = method.bind(params)
                                if method.context_name is not None:
                                    request = request or Request(*event)
                                    arguments[method.context_name] = Context(edge, request)
                            result = method.function(**arguments)
                            if method.may_wait and (method.is_async or isinstance(result, CoroutineType)):
                                worker = state.tasks.start(result)
                                body = None if worker is not None else method.encode(state.tasks.result)
                            else:
                                body = method.encode(result)
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException as error:  # a method may raise anything; its caller gets one answer
                        self._answer_exception(request or Request(*event), error)
                    else:
                        if body is None:
                            if worker is not None:
                                self._hold(request or Request(*event), worker)
                        elif len(body) >= SENT_AT_ONCE:
                            self._answer_large(request or Request(*event), body)
                        else:
                            frames_out.append((RESPONSE, stream, wall, token, body))
                    finally:
                        if entered is not None:
                            state.tracing.leave(entered)  # type: ignore[union-attr]  # it was entered
            elif event.__class__ is ServerStream or event.__class__ is DurableStream:
                self.run((_raw(event),), wall, event)
                others += 1
            elif event.__class__ is FramesRead:
                frames += event.frames - 1
                others += event.frames
            elif edge.handle(event):
                edge.suspend(events)
                break
            else:
                others += 1
            frames += 1
            if edge.is_held_up:
                edge.suspend(events)
                break
            if frames >= check_at:
                if frames >= FRAMES_PER_TURN or state.clock.wall() - wall > TURN_MS:
                    edge.wait_turn(events)
                    break
                check_at += 16
        state.counters.requests += frames - others

    def _timed(self, events: Iterable[ServerEvent], wall: int) -> Iterator[ServerEvent]:
        """Yield the events of a read, and record how long each request takes."""
        state = self._state
        for event in events:
            if event.__class__ is not tuple:
                yield event
                continue
            state.timed_part = wall >> PART_BITS
            state.traffic_begins()
            began = state.clock.now()
            try:
                yield event
            finally:
                method = state.methods.get(event[3])  # type: ignore[misc]  # the only bare tuple
                if method is not None:
                    method.durations.add(state.clock.now() - began)

    def _is_idempotent(self, name: str, meta: RequestMeta) -> bool:
        """Return whether a request is run once; never one of the protocol, whose answers may hold tokens."""
        return meta.idempotency_key is not None and not name.startswith(RESERVED_PREFIXES)

    def admit(
        self, name: str, method: Method | None, session: Session | None, *, is_stream: bool
    ) -> Answer | None:
        """Return the error of a request that may not run; None if it may.

        None also for each request with a session whose method `admits_sessions`, unless they are limited.
        """
        if method is not None and method.is_open:
            return None
        limits, peer = self._state.request_limits, self._edge.peer
        if (session is None or limits.checks_sessions) and not name.startswith(UNLIMITED):
            user = None if session is None else session.user
            excess = limits.check(user, peer, self._state.clock.now())
            if excess is not None:
                log.info("request.limited", peer=peer, user=user, what=name)
                return self._error_answer(name, excess)
        if session is None and (method is None or not method.public):
            return Answer(Code.UNAUTHENTICATED, NEEDS_SESSION)
        if method is None:
            message = f"unknown method {name!r}; call server.info to list methods"
            return Answer(Code.UNIMPLEMENTED, encode_error(Code.UNIMPLEMENTED, message))
        if not method.may_be_called_by(session):
            self._log_denied(session, method)
            return Answer(Code.PERMISSION_DENIED, NOT_PERMITTED)
        if is_stream is (method.shape == "unary"):
            cure = "not a stream; call it" if is_stream else "a stream; open it with stream"
            return self._error_answer(
                name, FailedPrecondition(f"this method is {cure}", {"shape": method.shape})
            )
        return None

    def _run_stream(self, stream: ServerStream, method: Method) -> None:
        """Start a method that sends or takes items."""
        if self.streams is None:
            self.streams = StreamRunner(self._state, self._connection, self)
            self.streams.is_blocked = self._edge.begin_streams()
        if isinstance(stream, DurableStream):
            assert self._state.runs is not None, "announced"
            self._connection.hold(stream, self._state.clock.now())
            work = self._state.runs.serve(stream, method, self.streams, self._connection)
            self.streams.start(stream, work, None)
            return
        try:
            arguments = method.bind(stream.params)
        except Exception as error:
            self._answer_exception(stream, error)
            return
        if method.context_name is not None:
            arguments[method.context_name] = Context(self._edge, stream)
        items = None
        if method.items is not None:
            name, type_ = method.items
            items = arguments[name] = self.streams.take_items(stream, type_.check)
            if items is None:
                self._answer_exception(stream, ResourceExhausted(TOO_MANY_ITEMS))
                return
        elif stream.has_items:
            refusal = FailedPrecondition(
                "this method takes no items; leave them out", {"shape": method.shape}
            )
            self._answer_exception(stream, refusal)
            return
        self._state.traffic_begins()
        self._connection.hold(stream, self._state.clock.now())
        if method.shape == "client":
            work = method.function(**arguments)
        elif method.middleware:
            produce = partial(self.streams.produce, stream, encode=method.encode_item)
            work = method.function(**arguments, produce=produce)
        else:
            work = self.streams.produce(stream, method.function(**arguments), method.encode_item)
        self.streams.start(stream, work, items)

    def _run_once(self, request: Request, method: Method) -> None:
        """Run a request with an idempotency key, or repeat the answer if it has been run."""
        session, key, state = request.session, request.meta.idempotency_key, self._state
        assert key is not None
        if session is None:
            self._answer(request, Answer(Code.INVALID_ARGUMENT, KEY_NEEDS_SESSION))
            return
        try:
            arguments = method.bind(request.params)
            if method.context_name is not None:
                arguments[method.context_name] = DetachedContext(self._edge, request)
        except Exception as error:
            self._answer_exception(request, error)
            return

        async def execute() -> bytes:
            result = method.function(**arguments)
            body = method.encode(await result if method.is_async else result)
            if len(body) > state.settings.max_body:
                raise MessageError(
                    f"the answer has {len(body)} bytes, more than limits.max_frame_bytes; send items of a stream"
                )
            return body

        began, error_answer = state.clock.now(), partial(self._error_answer, request.method)

        def later(answer: Answer) -> None:
            method.waits.add(state.clock.now() - began)
            if self._workers is not None:
                self._workers.pop(request, None)
            self._answer(request, answer)
            self._edge.flush_soon()

        digest = request_digest(request.method, request.params)
        outcome = state.idempotency.submit(session.user, key, digest, execute, error_answer, later)
        if isinstance(outcome, Answer):
            self._answer(request, outcome)
        else:
            self._hold(request, outcome)

    def _hold(self, request: Request, worker: EagerWorker | Waiting) -> None:
        """Keep a request whose method waits."""
        connection, now = self._connection, self._state.clock.now()
        if connection.state is State.CLOSED:  # the method ended its own connection before it began to wait
            worker.cancel()
            return
        connection.hold(request, now)
        if self._workers is None:
            self._workers = {}
        self._workers[request] = worker
        if isinstance(worker, Waiting):
            return
        method = self._state.methods[request.method]
        limits = self._state.request_limits if self._state.request_limits.counts_running else None
        user, peer = None if request.session is None else request.session.user, self._edge.peer
        if limits is not None:
            limits.begin(user, peer)

        def done(result: Any, error: BaseException | None) -> None:
            if limits is not None:
                limits.end(user, peer)
            method.waits.add(self._state.clock.now() - now)
            self.method_ended(request, result, error)

        worker.done = done

    def method_ended(self, request: Request, result: Any, error: BaseException | None) -> None:
        """Answer a request whose method has waited."""
        if self._workers is not None:
            self._workers.pop(request, None)
        if error is not None:
            self._answer_exception(request, error)
        elif result.__class__ is Answer:  # of a durable run
            self._answer(request, result)
        else:
            try:
                body = self._state.methods[request.method].encode(result)
            except Exception as unsendable:
                self._answer_exception(request, unsendable)
            else:
                self._answer_body(request, body)
        self._edge.flush_soon()

    def stop(self, ended: RequestEnded) -> None:
        """Cancel the method of a request that has ended: cancelled, or past its deadline."""
        self._state.counters.errors[ended.code] += 1
        if ended.reason:
            self._count_cut(ended.request, ended.reason)
        if isinstance(ended.request, ServerStream) and ended.request.worker is not None:
            assert self.streams is not None, "it runs the stream"
            if isinstance(ended.request, DurableStream) and self._state.runs is not None:
                self._state.runs.cut(ended.request, ended.reason)
            ended.request.worker.cancel()
            self.streams.release(ended.request)
            return
        assert self._workers is not None, "a request in flight has a worker"
        worker = self._workers[ended.request]
        if not isinstance(worker, Waiting):
            del self._workers[ended.request]
            worker.cancel()
        # A request with an idempotency key continues, and stays here until it has ended.

    def cut_stream(self, stream: ServerStream, body: bytes) -> None:
        """End a stream with this ERROR."""
        if self._connection.state is not State.CLOSED:
            self.stop(self._connection.cut(stream, body, self._state.clock.wall()))

    def cut_denied_streams(self) -> None:
        """Cut the streams whose sessions may no longer call their methods."""
        for ended in self._connection.cut_denied(self._may_go_on, self._state.clock.wall()):
            self.stop(ended)

    def _may_go_on(self, stream: ServerStream) -> bool:
        return self._state.methods[stream.method].may_be_called_by(stream.session)

    def _count_cut(self, stream: Request, reason: str) -> None:
        self._state.counters.streams_cut[reason] += 1
        if reason in LOGGED_CUTS:
            user = None if stream.session is None else stream.session.user
            log.info("stream.cut", peer=self._edge.peer, user=user, what=stream.method, reason=reason)

    def leave_runs(self) -> None:
        """Answer the streams that read runs with CANCELLED: their client reads these elsewhere from now on."""
        for stream, _ in [] if self.streams is None else self.streams.workers():
            if isinstance(stream, DurableStream):
                self.cut_stream(stream, LEAVING)

    def cancel_all(self) -> None:
        """Answer every request in flight with CANCELLED, as it may have run, and cancel its method.

        One that waits for the run of another request with its key has not run: UNAVAILABLE.
        """
        draining = {"reason": "draining", "retry_after_ms": self._state.settings.retry_draining_ms}
        running: list[tuple[Request, EagerWorker | StreamWorker | Waiting]] = [*(self._workers or {}).items()]
        if self.streams is not None:
            running += self.streams.workers()
        for request, worker in running:
            error: CallError = Cancelled("the server stopped before the method returned")
            if isinstance(request, ServerStream):
                error.details = (
                    {**draining, DETACHED: True} if isinstance(request, DurableStream) else draining
                )
                self._count_cut(request, "draining")
            elif isinstance(worker, Waiting) and not worker.has_begun:
                error = Unavailable("the server stopped while this request waited for its key; send it again")
            self._answer_exception(request, error)
            worker.cancel()
        self._edge.flush()

    def close(self) -> None:
        """Cancel all methods: the connection has ended."""
        if self.streams is not None:
            self.streams.close()
        if self._workers:
            workers, self._workers = self._workers, None
            for worker in workers.values():
                worker.cancel()

    def flush_soon(self) -> None:
        self._edge.flush_soon()

    @property
    def peer(self) -> str:
        return self._edge.peer

    @property
    def in_flight(self) -> int:
        """Requests whose methods wait."""
        streams = 0 if self.streams is None else self.streams.running
        return streams + len(self._workers or ())

    # --- answers -------------------------------------------------------------------------------------

    def _answer_body(self, request: Request, body: bytes) -> None:
        if len(body) >= SENT_AT_ONCE:
            self._answer_large(request, body)
        else:
            self._connection.respond(request, body, self._state.clock.wall())

    def _answer(self, request: Request, answer: Answer) -> None:
        code, body = answer
        if not code:
            self._answer_body(request, body)
        elif self._connection.fail(request, body, self._state.clock.wall()):
            self._state.counters.errors[code] += 1
            if code == Code.RESOURCE_EXHAUSTED:
                self._connection.count_wasted()

    def _answer_large(self, request: Request, body: bytes) -> None:
        """Answer and send at once, so that a peer that does not read stops the next request."""
        if len(body) > self._connection.settings.max_body:
            self._answer_exception(
                request,
                MessageError(
                    f"the answer has {len(body)} bytes, more than limits.max_frame_bytes; send items of a stream"
                ),
            )
            return
        if self._connection.respond(request, body, self._state.clock.wall()):
            if len(body) >= LARGE:
                self._state.counters.large_bytes += len(body)
            self._edge.flush()

    def _answer_exception(self, request: Request, error: BaseException) -> None:
        self._answer(request, self._error_answer(request.method, error))

    def _error_answer(self, method: str, error: BaseException) -> Answer:
        """Return the ERROR that an exception becomes."""
        return self._state.error_answer(method, error, peer=self._edge.peer, connection=self._edge.id)

    def _log_denied(self, session: Session | None, method: Method) -> None:
        assert session is not None
        assert method.access is not None
        needed, denied = method.access
        log.info(
            "request.denied",
            what=method.name,
            user=session.user,
            peer=self._edge.peer,
            missing=None if needed & session.roles else sorted(needed) or None,
            denied=sorted(denied & session.roles) or None,
        )
