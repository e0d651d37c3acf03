"""The client: each call gets an answer or a clear error, over as many connections as that takes. `connect` creates
it, and `enroll` uses one to enroll a device.

    SessionClient    calls, streams, handlers and events of one session
    -> Client        its own session, and the connections
    -> UserSession   the session of another user on a client's connections

Decides: whether a call is sent again after an error, by the table in `retry.py` (zcp1.md, section 11.1); how long
connections and sessions live; which session an event concerns.

Must not know: when connections are made (`connections.py`) and sessions opened (`session.py`).
"""

from __future__ import annotations

import asyncio
import random as system_random
from asyncio import get_running_loop
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, Unpack

from zcproto.client.connections import ConnectionManager
from zcproto.client.credentials import Device, LoginSource, PositionFile, SessionFile
from zcproto.client.dial import Dial, Dialer, Resolve, acquire_resources, release_resources, report_wait
from zcproto.client.endpoints import Address, Endpoint, Endpoints, parse_addresses
from zcproto.client.handlers import Event, EventStream, Function, Handler, Handlers, Registrar, call_back
from zcproto.client.options import (
    ConnectOptions,
    EnrollOptions,
    accept_options,
    check_options,
    choose_credentials,
)
from zcproto.client.protocol import TIMED_OUT, TOO_LATE, ClientProtocol, PendingStream
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
from zcproto.client.session import CLOSE_TIMEOUT, ClientSession, SessionManager
from zcproto.client.streams import (
    DEFAULT_WINDOW,
    RUN_ID_SIZE,
    OutgoingCall,
    Prepared,
    Reopen,
    RunPosition,
    SentItems,
    Stream,
    StreamMiddleware,
    StreamRequest,
)
from zcproto.common.clock import Clock, MonotonicClock, system_clock, system_entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.middleware import around, check_middleware
from zcproto.common.misuse import check_seconds, no_such_method, wrong_use
from zcproto.common.value_types import RETURNS_ANY, Returned, checked_result
from zcproto.connection.events import NEVER, EventReceived
from zcproto.errors import (
    CallError,
    Code,
    ConfigError,
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unimplemented,
    ZcprotoError,
)
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import Credit

CLOSED_AT_ONCE: Final = 32
"""Sessions of users that are closed at once: fewer than the requests that a server allows in flight."""

_OTHER_LOOP: Final = (
    "this client belongs to another event loop; create it in the one that uses it, or use connect_blocking"
)

_IS_CLOSED: Final = "this client is closed; create a new one"

_LATE: Final = frozenset({TIMED_OUT, TOO_LATE})

UNSET: Final[Any] = object()
"""In place of a timeout that was not given: the client's own applies."""


class SessionClient:
    """Calls, streams, handlers and events of one session. Base of `Client` and `UserSession`."""

    _NOT_OPEN: ClassVar[str]
    """The error of a call before `open`."""

    def __init__(self, options: ConnectOptions, clock: Clock, random: Random, service: str = "") -> None:
        """Check the options. `service` has the addresses of the server, to which a session file belongs."""
        self.events = EventStream()
        self._options = options
        self._credentials = choose_credentials(options)
        self._session_file = None
        if options.session_file is not None:
            if self._credentials is None:
                raise ConfigError(["session_file: credentials are missing; give what opens a session"])
            self._session_file = SessionFile(options.session_file, service, self._credentials)
        self._positions = None if self._session_file is None else PositionFile(self._session_file)
        for each in options.middleware:
            check_middleware(each, "call")
        for around_handler in options.handler_middleware:
            check_middleware(around_handler, "call")
        self._handlers = Handlers(options.max_calls, options.handler_middleware)
        self._random = random
        self._clock = clock
        timeout = options.timeout
        # The metadata of most first attempts; None if each needs its own.
        self._default_meta = _deadline_meta(timeout) if timeout and 0 < timeout < MAX_DEADLINE_MS else None
        self._opened = False
        self._closed = False

    def _start(self, connections: ConnectionManager, wheel: DeadlineWheel) -> None:
        """Use these connections from now on."""
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time  # CPython does not specialise the lookup of uvloop's methods
        self._opened = True
        self._connections = connections
        self._sessions = SessionManager(
            self._loop,
            wheel,
            self._clock,
            connections.get,
            connections.wait_ready,
            credentials=self._credentials,
            client=default_client() if self._options.client is None else self._options.client,
            random=self._random,
            file=self._session_file,
        )
        self._registrar = Registrar(self._loop, self._sessions, self._handlers, self._random)
        self._sessions.on_changed = self._session_changed

    def _session_changed(self, previous: bytes, connection: ClientProtocol) -> None:
        """Show a new token on all connections except the one that delivered it (zcp1.md, section 9.6)."""
        for other in self._connections.open:
            if other is not connection:
                other.conversation.session_ended(previous)
                other.cancel_calls(previous)
                if not self._registrar.begin(other):
                    self._sessions.present_now(other)
        if not connection.conversation.handles(self._sessions.token):
            self._registrar.begin(connection)  # before other requests
        self._registrar.changed()

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    if not TYPE_CHECKING:
        __enter__ = __exit__ = wrong_use("write async with; a program without asyncio uses connect_blocking")
        __getattr__ = no_such_method("await client.call")

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
        returns: type[Returned] = RETURNS_ANY,
        timeout: float | None = UNSET,  # noqa: ASYNC109  it is sent, and limits several waits
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> Returned:
        """Call a method of the server and return its result.

        Pass params by name, or in a mapping if a name is one of this function's own. `timeout` in seconds includes
        connecting and retries, and is sent as the call's deadline; None is unlimited. A call with an
        `idempotency_key` (at most 64 characters) is retried even if its answer was lost, because the server runs it
        once per key. With `returns`, such as a dataclass, the result is converted to that type; pydantic raises
        ValidationError if it is of another.

        Raises CallError with the server's error, DeadlineExceeded at the timeout, ConnectionClosed if the
        connection was lost and the call may have run, CannotConnect or TlsError if the server cannot be reached.
        """
        if returns is not RETURNS_ANY:
            result = await self.call(
                method,
                params,
                timeout=timeout,
                idempotency_key=idempotency_key,
                traceparent=traceparent,
                **named,
            )
            return checked_result(returns, result)
        if params is not None:  # without a call, for speed
            is_plain = params.__class__ is dict and not named
            named = {**params} if is_plain else _merged("call", method, params, named)
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        if get_running_loop() is not self._loop:
            raise RuntimeError(_OTHER_LOOP)
        if self._options.middleware and not isinstance(params, Prepared):
            return await self._call_within_middleware(  # type: ignore[no-any-return]
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
            timeout, meta = self._options.timeout, self._default_meta
        elif timeout.__class__ is not float:
            check_seconds("timeout", timeout)
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
                    raise DeadlineExceeded(_late(method, timeout))
                meta = _deadline_meta(deadline - now)
            if idempotency_key is not None or traceparent is not None:
                meta = _meta(meta, idempotency_key, traceparent)
            token = sessions.token
            if now >= sessions.noted_until:
                sessions.used(now)
            try:
                stream, pending = connection.request(method, named, token, meta, deadline)
                try:
                    return await pending  # type: ignore[no-any-return]
                except asyncio.CancelledError:
                    connection.abandon(stream)
                    raise
            except (CallError, ConnectionClosed) as error:
                if timeout is not None and isinstance(error, DeadlineExceeded) and error.message in _LATE:
                    raise DeadlineExceeded(_late(method, timeout), error.details) from error
                attempt = attempt or Attempt(self._random)
                is_idempotent = idempotency_key is not None
                await self._after_failure(
                    error, attempt, connection, token, deadline, is_idempotent=is_idempotent
                )
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
        durable: bool = False,
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

        A `durable` stream goes on without its connection: it is resumed where it stopped, on any connection. Its
        items come once and in order. Leaving early does not cancel the method: `cancel` does. `stream.id` and
        `stream.position` let another client go on with `resume`.

        Raises like `call`, and Unimplemented if the server has no streams, or no durable ones.
        """
        run = RunPosition(system_entropy(RUN_ID_SIZE).hex()) if durable else None
        return self._stream(
            method,
            named if params is None else _merged("stream", method, params, named),
            window=window,
            timeout=timeout,
            item_timeout=item_timeout,
            traceparent=traceparent,
            items=items,
            reopen=reopen,
            run=run,
        )

    def resume(
        self,
        id: str,
        *,
        method: str = "",
        after: int | None = None,
        window: Credit = DEFAULT_WINDOW,
        timeout: float | None = None,
        item_timeout: float | None = None,
    ) -> Stream:
        """Go on with a durable stream of this user from the position `after`: that many items are not sent again.

        By default this is the position in the session file, or 0 without one.
        `timeout` limits this attachment and not the method. Without `method` the server is asked for its name.

        Raises NotFound for a run that is not kept any more, OutOfRange for items that are not, and otherwise like
        `stream`.
        """
        if after is None:
            after = 0 if self._positions is None else self._positions.position(id)
        run = RunPosition(id, after, is_known=True)
        return self._stream(
            method, {}, window=window, timeout=timeout, item_timeout=item_timeout, traceparent=None, run=run
        )

    async def durable_streams(self) -> list[dict[str, Any]]:
        """Return the durable streams of this user that run or are kept, as `stream.list` describes them.

        Raises Unimplemented if the server has none, and otherwise like `call`.
        """
        try:
            found: list[dict[str, Any]] = await self.call("stream.list")
        except Unimplemented as error:
            raise Unimplemented("this server has no durable streams") from error
        return found

    def _stream(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        window: Credit,
        timeout: float | None,
        item_timeout: float | None,
        traceparent: str | None,
        items: SentItems | None = None,
        reopen: Reopen | None = None,
        run: RunPosition | None = None,
    ) -> Stream:
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        check_seconds("timeout", timeout)
        check_seconds("item_timeout", item_timeout)
        _check_window(window)
        request = StreamRequest(
            method,
            params,
            window,
            self._deadline(timeout),
            traceparent,
            Attempt(self._random),
            run,
            items is not None,
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
        return Stream(self, request, item_timeout, items, reopen, middleware)

    async def _open_stream(self, request: StreamRequest) -> PendingStream:
        run = request.run
        if run is not None and not request.method:
            request.method = await self._method_of(run.id)
        connection = await self._ready_before(request.deadline)
        now, meta = self._loop.time(), None
        if run is not None and not run.may_open(now):
            raise ConnectionClosed("the stream may have begun; call durable_streams to find it")
        if request.deadline != NEVER:
            meta = _deadline_meta(request.deadline - now)
        if request.traceparent is not None:
            meta = _meta(meta, None, request.traceparent)
        if request.has_items:
            meta = {**(meta or {}), "items": True}
        self._sessions.used(now)
        token = self._sessions.token
        return connection.open_stream(
            request.method,
            request.params,
            token,
            meta,
            request.window,
            request.deadline,
            None if run is None else run.resume(now),
        )

    async def _method_of(self, id: str) -> str:
        for run in await self.durable_streams():
            if run["id"] == id:
                return str(run["method"])
        raise NotFound(
            "there is no durable stream with this id; call durable_streams for those that are kept"
        )

    async def _cancel_run(self, id: str) -> bool:
        result: dict[str, Any] = await self.call("stream.cancel", id=id)
        return bool(result["cancelled"])

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
        if can_resume and is_interruption(error, pending.stream.was_lost) and not self._closed:
            asked = 0
            if isinstance(error, CallError) and not connection.draining:
                asked = retry_after_ms(error.details)
            await self._wait(attempt.wait(asked, request.deadline - self._loop.time()), error)
        elif pending.stream.was_answered_to:
            raise error
        else:
            await self._after_failure(error, attempt, connection, pending.stream.token, request.deadline)

    def _endpoint(self) -> Endpoint | None:
        connection = self._connections.current
        return None if connection is None else connection.endpoint

    def _timeout(self, timeout: float | None) -> float | None:
        return self._options.timeout if timeout is UNSET else timeout

    def _deadline(self, timeout: float | None) -> float:
        timeout = self._timeout(timeout)
        return NEVER if timeout is None else self._loop.time() + timeout

    async def _after_failure(
        self,
        error: CallError | ConnectionClosed,
        attempt: Attempt,
        connection: ClientProtocol,
        token: bytes,
        deadline: float,
        *,
        is_idempotent: bool = False,
    ) -> None:
        """Wait until a call may be sent again after an error or a loss; raise the error if it may not."""
        sessions, left = self._sessions, deadline - self._loop.time()
        if isinstance(error, ConnectionClosed):
            is_repeatable = (connection.unanswered_not_run or is_idempotent) and not self._closed
            await self._wait(attempt.after_loss(is_repeatable=is_repeatable, left=left), error)
            return
        step = attempt.after_error(
            error,
            sessions.shown(token),
            opens=sessions.credentials is not None,
            is_draining=connection.draining,
            left=left,
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
                raise sessions.missing(error)
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
            await self._after_failure(refused, attempt, connection, token, deadline)

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
                raise ConnectionClosed(_IS_CLOSED, clean=True)
            await self._sessions.ensure()
            connection = await self._connections.wait_ready()
            if connection.ready and self._loop.time() < self._sessions.valid_until:
                return connection

    # --- calls of the server ------------------------------------------------------------------------

    def handler(self, name: str, *, in_thread: bool = False) -> Callable[[Function], Function]:
        """Let the server call a function, before or after connecting. It stays registered after a reconnect.

            @client.handler("approve")
            async def approve(call: Call, tool: str) -> bool: ...

        While the client is open the server can call it a moment later; `handle` waits for that. With `in_thread` it
        runs in a thread of its own, and may block. Parameters are passed by name and checked against the
        annotations; one annotated `Call` receives the call.
        Its exceptions are answered to the server: a CallError with its code, any other as INTERNAL. Raises
        ValueError for a malformed or registered name, TypeError for parameters that cannot be checked.
        """

        if not isinstance(name, str):  # used as a decorator without a call, which would register nothing
            raise TypeError('the handler has no name; write @client.handler("NAME")')

        def register(function: Function) -> Function:
            handler = Handler(name, function, in_thread=in_thread)
            if self._opened:
                self._registrar.add(handler)
            else:
                self._handlers.add(handler)
            return function

        return register

    async def handle(self, name: str, function: Callable[..., Any], *, in_thread: bool = False) -> None:
        """Let the server call a function, like `handler`, and wait until it can: a next call may rely on it.

            await client.handle("approve", approve)

        Before connecting, `open` waits instead. Raises Unavailable if the server cannot call it yet, and otherwise
        like `handler`.
        """
        self.handler(name, in_thread=in_thread)(function)
        if self._opened:
            await self._registrar.settle(self._deadline(UNSET))
            self._registrar.require(name)

    # --- connections and events -------------------------------------------------------------------

    def _show_session(self, connection: ClientProtocol, *, is_extra: bool = False) -> None:
        """Show the session on a new connection, and register its handlers there, before other requests."""
        if not self._registrar.connected(connection, is_extra=is_extra):
            self._sessions.present(connection)

    def _receive_event(self, event: EventReceived) -> None:
        """Process an event of the server about this session, or about the server itself."""
        self._sessions.event_received(event, self._connections.current)
        if self._options.on_event is not None:
            call_back("on_event", self._options.on_event, Event(event.name, event.data))
        else:
            self.events.put(event.body)


def _merged(function: str, method: str, params: Mapping[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Return the params of a call. Raises TypeError if they are no mapping, or a name is given twice."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params are given by name, as in {function}({method!r}, name=...), or as a mapping")
    twice = params.keys() & named.keys()
    if twice:
        raise TypeError(f"{min(twice)} is given twice, in the mapping and by name")
    return {**params, **named}


def _check_window(window: Credit) -> None:
    """Raise TypeError or ValueError for a window in which no item fits."""
    if not (isinstance(window, Sequence) and len(window) == 2 and all(isinstance(n, int) for n in window)):
        raise TypeError(f"window is (items, bytes), such as window={DEFAULT_WINDOW}")
    if min(window) < 1:
        raise ValueError(f"window is (items, bytes), both above 0, such as window={DEFAULT_WINDOW}")


def _late(method: str, timeout: float | None) -> str:
    return f"{method} has not answered within {timeout:g} s; give it a longer timeout"


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


class Client(SessionClient):
    """A client of one server, or of several that share their sessions. Create it with `zcproto.connect`.

    It belongs to one event loop. Any number of concurrent calls share one connection. `addresses` is what was given
    to `connect`, and `address` the first of them.
    """

    _NOT_OPEN = "open the client first: async with connect(...) as client"

    def __init__(
        self,
        address: str | Sequence[str],
        options: ConnectOptions,
        *,
        clock: Clock = system_clock,
        random: Random = system_random.random,
        dial: Dial | None = None,
    ) -> None:
        self.addresses = parse_addresses(address)
        check_options(options)
        self.address = self.addresses[0]
        service = ",".join(sorted(map(str, self.addresses)))
        super().__init__(options, MonotonicClock(clock), random, service)
        self._resolve: Resolve = _host_itself
        if dial is None:
            dialer = Dialer(options, self._clock, clock)
            dial, self._resolve = dialer, dialer.resolve
        self._dial: Dial = dial
        self._users: dict[UserSession, None] = {}
        self._had_users = False
        self._showing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Client({', '.join(map(str, self.addresses))!r})"

    # --- opening and closing ----------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def open(self) -> None:
        """Connect, and open a session if there are credentials. `async with` calls this.

        Waits for a server that is starting, up to `start_timeout`. Raises any other error of the first attempt:
        CannotConnect, TlsError, CertificateError, ConnectionClosed, the CallErrors of `session.open`, and
        ConfigError for a key log or a session file that cannot be used.
        """
        if self._opened:
            raise RuntimeError("this client was opened before; create a new one")
        loop, options = asyncio.get_running_loop(), self._options
        resources = acquire_resources(loop)
        self._wheel = resources.wheel
        connections = ConnectionManager(
            loop,
            self._resolve,
            lambda owner, *attempt: self._dial(owner, resources, *attempt),
            Endpoints(self.addresses, options.address_order == "random", self._random),
            on_event=self._event_received,
            on_connected=self._connected,
            on_extra=self._extra_connected,
            shows_session=self._shows_session,
            is_wanted=lambda: not all(each._sessions.is_over for each in (self, *self._users)),
            max_extra=options.max_connections - 1,
            start_timeout=options.start_timeout,
            on_starting=lambda: report_wait(self.addresses, options.start_timeout),
        )
        self._start(connections, resources.wheel)
        try:
            if options.session and self._credentials is not None:
                self._sessions.require()
            await connections.get()  # within `start_timeout` and `connect_timeout`
            deadline = self._deadline(UNSET)
            await self._ready_before(deadline)
            await self._registrar.settle(deadline)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all sessions and the connection. Pending calls raise ConnectionClosed."""
        if self._closed:
            return
        self._closed = True
        if not self._opened:
            return
        try:
            await self._close_sessions()
        finally:
            try:
                await self._connections.close()
            finally:
                self.events.close()
                release_resources(self._loop)

    async def _close_sessions(self) -> None:
        if self._showing is not None:
            self._showing.cancel()
        await self._registrar.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):  # for all of them: there may be hundreds
                while self._users:
                    users = [*self._users][:CLOSED_AT_ONCE]
                    await asyncio.gather(*(user.close() for user in users))
        for user in [*self._users]:
            await user._close(None)  # without telling the server
        await self._sessions.close(self._connections.current)

    # --- state ------------------------------------------------------------------------------------

    @property
    def welcome(self) -> Mapping[str, Any]:
        """The server's latest WELCOME; empty without a connection."""
        connection = self._connections.current if self._opened else None
        return {} if connection is None else connection.conversation.welcome

    @property
    def endpoint(self) -> Endpoint | None:
        """Where this client is connected; None without a connection."""
        return self._endpoint() if self._opened else None

    # --- other users ------------------------------------------------------------------------------

    def session_for(
        self,
        *,
        user: str | None = None,
        key: str | None = None,
        key_file: str | Path | None = None,
        device: Device | str | Path | None = None,
        device_name: str | None = None,
        login: LoginSource | None = None,
    ) -> UserSession:
        """Return a session of another user on this client's connection, which `async with` opens and closes.

            async with client.session_for(user="ada", key=key) as ada:
                await ada.call("order.place", id=7)

        It has this client's `call`, `stream`, `handler`, `events` and options, for this session alone: each one is
        refreshed and ends by itself, and each survives a reconnect. Give `user` with `key` or `key_file`, `device`
        and `device_name`, or a `login`, as for `connect`. Raises ConfigError for others, CertificateError for
        an unusable device key.
        """
        options = replace(
            self._options,
            user=user,
            key=key,
            key_file=key_file,
            device=device,
            device_name=device_name,
            login=login,
            certificate=None,
            session_file=None,
            on_event=None,
            on_connected=None,
        )
        return UserSession(self, options, self._clock, self._random)

    def _attach_session(self, user: UserSession) -> tuple[ConnectionManager, DeadlineWheel]:
        """Show a session on each connection from now on. Return what it uses of this client."""
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        if self._closed:
            raise ConnectionClosed(_IS_CLOSED, clean=True)
        self._users[user] = None
        self._had_users = True
        return self._connections, self._wheel

    def _detach_session(self, user: UserSession) -> None:
        self._users.pop(user, None)

    # --- connections and events -------------------------------------------------------------------

    def _connected(self, connection: ClientProtocol) -> None:
        self._show_session(connection)
        if self._users:
            self._showing = self._loop.create_task(self._show_users(connection))
        if self._options.on_connected is not None:
            self._loop.call_soon(call_back, "on_connected", self._options.on_connected, connection.endpoint)

    async def _shows_session(self, connection: ClientProtocol) -> bool:
        return await self._sessions.is_accepted_on(connection)

    def _extra_connected(self, connection: ClientProtocol) -> None:
        for each in (self, *self._users):
            each._show_session(connection, is_extra=True)

    async def _show_users(self, connection: ClientProtocol) -> None:
        """Show the sessions of all users, as many at once as the server allows requests."""
        for user in [*self._users]:
            await connection.wait_ready()
            if not connection.ready:
                return
            user._show_session(connection)

    def _event_received(self, event: EventReceived) -> None:
        token = event.token
        owner: SessionClient = next((each for each in self._users if each._sessions.owns(token)), self)
        if owner is self and self._had_users and token != NO_TOKEN and not self._sessions.owns(token):
            return  # of a session that was closed
        owner._receive_event(event)


class UserSession(SessionClient):
    """A session of another user on the connection of a client. Create it with `Client.session_for`."""

    _NOT_OPEN = "open the session first: async with client.session_for(...) as session"

    def __init__(self, client: Client, options: ConnectOptions, clock: Clock, random: Random) -> None:
        super().__init__(options, clock, random)
        if self._credentials is None:
            raise ConfigError(["session_for: give user and key, device and device_name, or login"])
        self._client = client

    def __repr__(self) -> str:
        return f"UserSession({str(self._client.address)!r})"

    async def open(self) -> None:
        """Open the session. `async with` calls this. Raises like `Client.open_session`."""
        if self._opened:
            raise RuntimeError("this session was opened before; create a new one")
        connections, wheel = self._client._attach_session(self)
        self._start(connections, wheel)
        if connections.current is not None:
            self._show_session(connections.current)
        try:
            await self.open_session()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the session; the connection stays open. Idempotent."""
        if self._opened and not self._closed:
            await self._close(self._connections.current)

    async def _close(self, connection: ClientProtocol | None) -> None:
        self._closed = True
        try:
            await self._registrar.close()
            await self._sessions.close(connection)
        finally:
            self._client._detach_session(self)
            self.events.close()


@accept_options(ConnectOptions)
def connect(address: str | Sequence[str], options: ConnectOptions) -> Client:
    """Return a client of the server at `host`, `host:port` or `[::1]:port`. The default port is 7443.

    Several addresses, as a list or as one text with commas, are those of servers that share their sessions: the
    client connects to one of them, and to another one as soon as that is lost or goes away.

        async with zcproto.connect("host:7443", user="ada", key_file="ada.key", ca_file="ca.crt") as client:
            print(await client.call("echo", word="hello"))

    On the server's machine the CA need not be given. ConnectOptions documents the options. Raises TypeError for an
    unknown one, ConfigError for options that cannot be used or contradict each other, TlsError for a malformed pin,
    CertificateError for an unusable device key. `async with` raises like `Client.open`.
    """
    return Client(address, options)


async def enroll(
    address: str | Sequence[str], code: str, device: Device, name: str, **options: Unpack[EnrollOptions]
) -> str:
    """Enroll a device as `name` with a code of `zcproto pair`. Return the user whose sessions it can open.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", "7D9K-X2MP", device, "laptop", ca_file="ca.crt")

    Afterwards `connect(..., device=device, device_name="laptop")` opens sessions of that user. ConnectOptions
    documents the options. Raises Unauthenticated for an invalid code, AlreadyExists for a name in use (the code
    stays valid), and like `connect` and `Client.open`.
    """
    async with connect(address, session=False, **options) as client:
        enrolled = await client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])


async def _host_itself(address: Address) -> list[str]:
    """Return the host in place of its IP address, for connections that are not made over a network."""
    return [address.host]
