"""What an application does with one session of a client: calls, streams, handlers and events.

    SessionClient -> Client        its own session, and the connections
                  -> UserSession   the session of another user on a client's connection

Decides: whether a call is sent again after an error, by the table in `retry.py` (zcp1.md, section 11.1).

Must not know: when connections are made (`connections.py`) and sessions opened (`session.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import metadata
from typing import Any, ClassVar, Final

from zcproto.client.address import Endpoint
from zcproto.client.connections import ConnectionManager
from zcproto.client.handlers import Event, EventStream, Function, Handler, Handlers, Registrar, call_back
from zcproto.client.kept_session import KeptSessionManager
from zcproto.client.options import ConnectOptions, choose_credentials
from zcproto.client.protocol import TIMED_OUT, ClientProtocol, PendingStream
from zcproto.client.retry import (
    MAX_DEADLINE_MS,
    SESSION_IS_OVER,
    Attempt,
    Random,
    Step,
    Then,
    deadline_ms,
    is_interruption,
    retry_after_ms,
    what_next,
)
from zcproto.client.session import ClientSession, SessionManager
from zcproto.client.session_file import SessionFile
from zcproto.client.streams import (
    DEFAULT_WINDOW,
    OutgoingCall,
    Prepared,
    Reopen,
    SentItems,
    Stream,
    StreamMiddleware,
    StreamRequest,
)
from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.middleware import around, check_middleware
from zcproto.connection.events import NEVER, EventReceived
from zcproto.errors import CallError, Code, ConnectionClosed, DeadlineExceeded, InvalidArgument, ZcprotoError
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import Credit

UNSET: Final[Any] = object()


class SessionClient:
    """Calls, streams, handlers and events of one session. Base of `Client` and `UserSession`."""

    _NOT_OPEN: ClassVar[str]
    """The error of a call before it is open."""

    def __init__(self, options: ConnectOptions, clock: Clock, random: Random) -> None:
        self.events = EventStream()
        self._options = options
        self._credentials = choose_credentials(options)
        self._session_file: SessionFile | None = None
        for each in options.middleware:
            check_middleware(each, "call")
        for around_handler in options.handler_middleware:
            check_middleware(around_handler, "call")
        self._handlers = Handlers(options.max_calls, options.handler_middleware)
        self._random = random
        self._clock = clock
        timeout = options.timeout
        # Of most calls, at their first attempt. None: it is made for each.
        self._usual_meta = _deadline_meta(timeout) if timeout and 0 < timeout < MAX_DEADLINE_MS else None
        self._opened = False
        self._closed = False

    def _start(self, connections: ConnectionManager, wheel: DeadlineWheel) -> None:
        """Use these connections from now on."""
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time  # CPython does not specialise the lookup of uvloop's methods
        self._opened = True
        self._connections = connections
        manager: Callable[..., SessionManager] = SessionManager
        if self._session_file is not None:
            manager = partial(KeptSessionManager, file=self._session_file)
        self._sessions = manager(
            self._loop,
            wheel,
            self._clock,
            connections.get,
            credentials=self._credentials,
            client=default_client() if self._options.client is None else self._options.client,
            random=self._random,
        )
        self._registrar = Registrar(self._loop, self._sessions, self._handlers, self._random)
        self._sessions.on_changed = self._session_changed

    def _session_changed(self, previous: bytes, connection: ClientProtocol) -> None:
        """Show another token on each connection but the one that it came by (zcp1.md, section 9.6)."""
        for other in self._connections.open:
            if other is not connection:
                other.conversation.session_ended(previous)
                other.cancel_calls(previous)
                if not self._registrar.begin(other):
                    self._sessions.present_now(other)
        self._registrar.changed()

    # --- state ------------------------------------------------------------------------------------

    @property
    def session(self) -> ClientSession | None:
        """The open session, or None."""
        return self._sessions.session if self._opened else None

    async def open_session(self) -> ClientSession:
        """Open a session unless one is valid, such as after TOKEN_REVOKED, SESSION_REPLACED or UNAUTHENTICATED.

        Raises Unauthenticated without credentials, and otherwise like `call`.
        """
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        self._sessions.require()
        deadline = self._deadline(UNSET)
        await self._ready_before(deadline)
        await self._registrar.settle(deadline)
        assert self._sessions.session is not None
        return self._sessions.session

    # --- calls ------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        timeout: float | None = UNSET,  # noqa: ASYNC109  it is sent, and limits several waits
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> Any:
        """Call a method of the server and return its result.

        Pass params by name, or in a mapping if a name is one of this function's own. `timeout` in seconds includes
        connecting and retries, and is sent as the call's deadline; None is unlimited. A call with an
        `idempotency_key` (at most 64 characters) is retried even if its answer was lost, because the server runs it
        once per key.

        Raises CallError with the server's error, DeadlineExceeded at the timeout, ConnectionClosed if the
        connection was lost and the call may have run, CannotConnect or TlsError if the server cannot be reached.
        """
        if params is not None:
            named = {**params, **named}
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        if self._options.middleware and not isinstance(params, Prepared):
            return await self._call_within_middleware(
                OutgoingCall(
                    method=method,
                    params=named,
                    timeout=self._timeout(timeout),
                    idempotency_key=idempotency_key,
                    traceparent=traceparent,
                    endpoint=self._endpoint(),
                )
            )
        meta: dict[str, Any] | None = None
        if timeout is UNSET:
            timeout, meta = self._options.timeout, self._usual_meta
        now = self._now()
        deadline = NEVER if timeout is None else now + timeout
        attempt: Attempt | None = None
        sessions = self._sessions
        while True:
            connection = self._connections.current
            if connection is None or not connection.ready or now >= sessions.valid_until or self._closed:
                connection = await self._ready_before(deadline)
                now, meta = self._now(), None
            if meta is None and deadline != NEVER:
                if now >= deadline:
                    raise DeadlineExceeded(TIMED_OUT)
                meta = _deadline_meta(deadline - now)
            if idempotency_key is not None or traceparent is not None:
                meta = _meta(meta, idempotency_key, traceparent)
            token = sessions.token
            if now >= sessions.noted_until:
                sessions.used(now)
            try:
                stream, pending = connection.request(method, named, token, meta, deadline)
                try:
                    return await pending
                except asyncio.CancelledError:
                    connection.abandon(stream)
                    raise
            except CallError as error:
                attempt = attempt or Attempt(self._random)
                await self._after_error(error, attempt, connection, token, deadline)
            except ConnectionClosed as error:
                attempt = attempt or Attempt(self._random)
                is_repeatable = connection.unanswered_not_run or idempotency_key is not None
                await self._after_loss(error, attempt, deadline, is_repeatable=is_repeatable)
            now, meta = self._now(), None

    async def _call_within_middleware(self, call: OutgoingCall) -> Any:
        async def send(call: OutgoingCall) -> Any:
            return await self.call(
                call.method,
                Prepared(call.params),
                timeout=call.timeout,
                idempotency_key=call.idempotency_key,
                traceparent=call.traceparent,
            )

        return await around(self._options.middleware, send)(call)

    def stream(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        items: SentItems | None = None,
        reopen: Reopen | None = None,
        window: Credit = DEFAULT_WINDOW,
        timeout: float | None = None,
        item_timeout: float | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> Stream:
        """Open a stream of a method's items, with `async with`, or with `async for` alone.

        `items` are sent to the method, each when it wants one; without them use `send` and `end`. `window` is how
        many items and bytes the server may send before the first is taken. `timeout` limits the whole stream,
        `item_timeout` the wait for each item, both in seconds; None is unlimited. Leaving early cancels the method.

        With `reopen` a stream whose connection is lost is opened again. The function gets the last item and
        returns the params to replace, such as `{"after": last["id"]}`. Without it, a stream that may have begun is
        never opened again.

        Raises like `call`, and Unimplemented if the server has no streams.
        """
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        request = StreamRequest(
            method,
            {**(params or {}), **named},
            window,
            self._deadline(timeout),
            traceparent,
            Attempt(self._random),
        )
        middleware = None
        if self._options.middleware:
            call = OutgoingCall(
                method=method,
                params=request.params,
                timeout=timeout,
                traceparent=traceparent,
                is_stream=True,
                endpoint=self._endpoint(),
            )
            middleware = StreamMiddleware(self._options.middleware, call)
        return Stream(_Opener(self), request, item_timeout, items, reopen, middleware)

    async def _open_stream(self, request: StreamRequest) -> PendingStream:
        connection = await self._ready_before(request.deadline)
        now, meta = self._loop.time(), None
        if request.deadline != NEVER:
            meta = _deadline_meta(request.deadline - now)
        if request.traceparent is not None:
            meta = _meta(meta, None, request.traceparent)
        self._sessions.used(now)
        token = self._sessions.token
        return connection.open_stream(
            request.method, request.params, token, meta, request.window, request.deadline
        )

    async def _after_stream_error(
        self,
        error: CallError | ConnectionClosed,
        request: StreamRequest,
        pending: PendingStream,
        can_resume: bool,
    ) -> None:
        """Wait until a stream may be opened again; raise the error if it may not.

        `can_resume`: also if it has begun, and its connection has interrupted it.
        """
        connection, attempt = pending.connection, request.attempt
        if can_resume and is_interruption(error, pending.half.was_lost) and not self._closed:
            asked = 0
            if isinstance(error, CallError) and not connection.draining:
                asked = retry_after_ms(error.details)
            await self._wait(attempt.wait(asked, request.deadline - self._loop.time()), error)
        elif pending.half.was_answered_to:
            raise error
        elif isinstance(error, CallError):
            await self._after_error(error, attempt, connection, pending.half.token, request.deadline)
        else:
            is_repeatable = connection.unanswered_not_run
            await self._after_loss(error, attempt, request.deadline, is_repeatable=is_repeatable)

    def _endpoint(self) -> Endpoint | None:
        connection = self._connections.current
        return None if connection is None else connection.endpoint

    def _timeout(self, timeout: float | None) -> float | None:
        return self._options.timeout if timeout is UNSET else timeout

    def _deadline(self, timeout: float | None) -> float:
        timeout = self._timeout(timeout)
        return NEVER if timeout is None else self._loop.time() + timeout

    async def _after_error(
        self, error: CallError, attempt: Attempt, connection: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """Wait until a call may be sent again after an error; raise the error if it may not."""
        sessions = self._sessions
        step = attempt.after_error(
            error,
            sessions.shown(token),
            opens=sessions.credentials is not None,
            is_draining=connection.draining,
            left=deadline - self._loop.time(),
        )
        then = step.then
        if then is Then.LATER:
            await self._wait(step, error)
        elif then is Then.ATTACH:
            await self._attach(error, attempt, connection, token, deadline)
        elif then is Then.RENEW:
            sessions.expired(token)
        elif then is Then.REPLACE:
            sessions.lost(token)
        elif then is Then.REOPEN and not sessions.reopen(token):
            sessions.unauthenticated(token)
            raise error
        elif then is Then.RAISE:
            if token == NO_TOKEN:
                raise error
            if isinstance(error, InvalidArgument) and "size" in error.details and attempt.once(Then.AT_ONCE):
                await self._present_token(error, connection, token, deadline)
                return
            if error.code in SESSION_IS_OVER:
                sessions.ended(token, error)
            elif error.code is Code.UNAUTHENTICATED:
                sessions.unauthenticated(token)
            raise error

    async def _attach(
        self, error: CallError, attempt: Attempt, connection: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """Prove the session's key after a call was refused without it. Raise the call's error without a device."""
        try:
            async with asyncio.timeout_at(None if deadline == NEVER else deadline):
                if not await self._sessions.attach(connection, token):
                    raise error
        except TimeoutError:
            raise DeadlineExceeded(TIMED_OUT) from error
        except CallError as refused:
            if refused is error:
                raise
            if what_next(refused) is Then.LATER:
                attempt.done.discard(Then.ATTACH)  # it was not carried out
            await self._after_error(refused, attempt, connection, token, deadline)

    async def _after_loss(
        self, error: ConnectionClosed, attempt: Attempt, deadline: float, *, is_repeatable: bool
    ) -> None:
        """Wait until a call may be sent again after its connection was lost; raise the error if it may not."""
        is_repeatable = is_repeatable and not self._closed
        left = deadline - self._loop.time()
        await self._wait(attempt.after_loss(is_repeatable=is_repeatable, left=left), error)

    async def _wait(self, step: Step, error: ZcprotoError) -> None:
        """Wait before a retry, or raise the error without one."""
        if step.then is Then.RAISE:
            raise error
        await asyncio.sleep(step.delay)

    async def _present_token(
        self, error: InvalidArgument, connection: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """Present the token in a small request, because connections without a session refuse large ones."""
        if connection.conversation.has_session:
            raise error
        left = None if deadline == NEVER else max(0.0, deadline - self._loop.time())
        await self.call("session.info", Prepared(), timeout=left)

    async def _ready_before(self, deadline: float) -> ClientProtocol:
        """Return a connection that accepts a request, with a valid session if required. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(None if deadline == NEVER else deadline):
                return await self._ready()
        except TimeoutError:
            cause = self._connections.last_error if self._connections.current is None else None
            reason = "no answer" if cause is None else f"no connection ({cause})"
            if self._sessions.is_fetching_login:
                reason = "the function given as login has not returned: no session"
            elif self._sessions.is_lost:
                reason = "the server has lost the session: no other one"
            elif self._sessions.expires_at_once:
                reason = "the server opens only expired sessions; report it to its operator: no session"
            raise DeadlineExceeded(f"{reason} within the call's timeout") from cause

    async def _ready(self) -> ClientProtocol:
        while True:
            if self._closed:
                raise ConnectionClosed("this client is closed", clean=True)
            await self._sessions.ensure()
            connection = await self._connections.wait_ready()
            if connection.ready and self._loop.time() < self._sessions.valid_until:
                return connection

    # --- calls of the server ------------------------------------------------------------------------

    def handler(self, name: str, *, in_thread: bool = False) -> Callable[[Function], Function]:
        """Let the server call a function, before or after connecting. It stays registered after a reconnect.

            @client.handler("approve")
            async def approve(call: Call, tool: str) -> bool: ...

        With `in_thread` it runs in a thread of its own, and may block. Parameters are passed by name and checked
        against the annotations; one annotated `Call` receives the call.
        Its exceptions are answered to the server: a CallError with its code, any other as INTERNAL. Raises
        ValueError for a malformed or registered name, TypeError for parameters that cannot be checked.
        """

        def register(function: Function) -> Function:
            handler = Handler(name, function, in_thread=in_thread)
            if self._opened:
                self._registrar.add(handler)
            else:
                self._handlers.add(handler)
            return function

        return register

    # --- connections and events -------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        """Whether the server revoked or refused the session: only the application may open another one."""
        return self._sessions.is_over

    def _show_session(self, connection: ClientProtocol, *, is_further: bool = False) -> None:
        """Show the session on a new connection, and register its handlers there, before other requests."""
        if not self._registrar.connected(connection, is_further=is_further):
            self._sessions.present(connection)

    def _owns(self, token: bytes) -> bool:
        """Return whether an event with this token concerns this session."""
        return self._sessions.owns(token)

    def _receive_event(self, event: EventReceived) -> None:
        """Process an event of the server about this session, or about the server itself."""
        self._sessions.event_received(event, self._connections.current)
        if self._options.on_event is not None:
            call_back("on_event", self._options.on_event, Event(event.name, event.data))
        else:
            self.events.put(event.body)


class _Opener:
    """The client, as its streams use it."""

    __slots__ = ("after_stream_error", "deadline", "open_stream")

    def __init__(self, client: SessionClient) -> None:
        self.open_stream = client._open_stream
        self.deadline = client._deadline
        self.after_stream_error = client._after_stream_error


def _deadline_meta(left: float) -> dict[str, Any]:
    """Return the metadata of a request with so many seconds until its deadline."""
    return {"deadline_ms": deadline_ms(left)}


def _meta(
    meta: dict[str, Any] | None, idempotency_key: str | None, traceparent: str | None
) -> dict[str, Any]:
    more: dict[str, Any] = {} if meta is None else {**meta}
    if idempotency_key is not None:
        more["idempotency_key"] = idempotency_key
    if traceparent is not None:
        more["traceparent"] = traceparent
    return more


@cache
def default_client() -> str:
    """Return the product and version of this client."""
    try:
        return f"zcproto-python/{metadata.version('zcproto')}"
    except metadata.PackageNotFoundError:
        return "zcproto-python/0"
