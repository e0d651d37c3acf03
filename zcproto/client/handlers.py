"""Run what the server calls, keep it registered, and queue what the server reports.

    @client.handler("approve")
    async def approve(call: Call, tool: str, text: str) -> bool:
        return await ask(f"{call.user}: run {tool}?", text)

    Handler    checks the parameters of a function and runs it
    Handlers   the handlers of a session, and the calls that run
    Registrar  sends `session.handle` on each connection of the session
    EventStream  the events that the application has not read

Decides: which FAILURE the exception of a handler becomes; when `session.handle` is sent, and sent again after an
error by the table in `retry.py`.

Rules:
- Parameters are passed by name and checked against the annotations, as those of a server's methods.
- A handler whose call was withdrawn, or whose session or connection has ended, is cancelled.
- An exception that is not a CallError is logged; its text is not sent to the server.
- The answer of a handler waits until the server reads: it counts as a running call until then.
- Each connection is registered before other requests are sent on it: a method calls back on the connection on which
  it was called.
- The session of a client that only waits for calls is renewed, and shown to the server before its idle timeout.

Must not know: how sessions are opened.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from zcproto.client.protocol import ClientProtocol, PendingCall, mark_retrieved
from zcproto.client.retry import Backoff, Random, Then, retry_after_ms, what_next
from zcproto.client.session import ANSWER_TIMEOUT, SessionManager, answer
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.exceptions import traceback_lines
from zcproto.common.middleware import Middleware, around
from zcproto.common.misuse import wrong_use
from zcproto.common.parameters import Signature
from zcproto.common.text import escape_text
from zcproto.connection.client_calls import ClientCall, ClientCallState
from zcproto.errors import (
    CallError,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    LoginError,
    Unavailable,
    ZcprotoError,
)
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH, decode_event

log = logging.getLogger("zcproto.client")

MAX_HANDLERS: Final = 256
MAX_EVENTS: Final = 1_000
MAX_EVENT_BYTES: Final = 4_194_304

MIN_INTERVAL: Final = 1.0
"""Seconds between two requests that only show the session."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Call:
    """One call of the server. A handler gets it through a parameter annotated `Call`.

    `method` is the name that was called, `user` the user whose session it concerns, `traceparent` the caller's W3C
    Trace Context header, if it is valid. `id` is that of a pending call, the same for all clients of the user and
    after a reconnect; None for other calls.
    """

    __slots__ = ("_call", "_ends", "_now", "id", "method", "traceparent", "user")

    def __init__(self, call: ClientCall, user: str, now: Callable[[], float]) -> None:
        self._call = call
        self._now = now
        self._ends = now() + call.deadline_ms / MS_PER_SECOND
        self.id = call.pending
        self.method = call.method
        self.user = user
        self.traceparent = call.traceparent

    def __repr__(self) -> str:
        return f"Call(method={self.method!r}, user={self.user!r})"

    @property
    def time_left(self) -> float:
        """Seconds until the server stops waiting."""
        return self._ends - self._now()

    @property
    def cancelled(self) -> bool:
        """Whether the answer will be discarded: for handlers that run in a thread, which cannot be cancelled."""
        return self._call.state is ClientCallState.NONE


class Event(NamedTuple):
    """The name and the data of one event."""

    name: str
    data: Any


class EventStream:
    """An async iterator over events in order, which ends when the client is closed.

    It holds at most 1,000 events of together 4 MiB, or one larger event; more replace the oldest, which `dropped`
    counts. Events are decoded when they are read: decoded data can take 70 times the memory.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()  # b"" follows the last event
        self._size = 0
        self.dropped = 0

    def put(self, body: bytes) -> None:
        """Add the body of an EVENT; drop the oldest if there are too many."""
        queue = self._queue
        self._size += len(body)
        while queue.qsize() >= MAX_EVENTS or (self._size > MAX_EVENT_BYTES and queue.qsize()):
            self._size -= len(queue.get_nowait())
            self.dropped += 1
        queue.put_nowait(body)

    def close(self) -> None:
        """End the stream after the events that are queued."""
        self._queue.put_nowait(b"")

    def __aiter__(self) -> EventStream:
        return self

    if not TYPE_CHECKING:
        __iter__ = wrong_use("write async for, or await anext(client.events)")

    async def __anext__(self) -> Event:
        body = await self._queue.get()
        if not body:
            self.close()  # for other readers
            raise StopAsyncIteration
        self._size -= len(body)
        return Event(*decode_event(body))


class Handler:
    """A function under a name. Raises ValueError for a malformed name, TypeError for parameters that cannot be
    checked."""

    def __init__(self, name: str, function: Callable[..., Any], *, in_thread: bool = False) -> None:
        if not 1 <= len(name) <= METHOD_MAX_LENGTH or not METHOD_ALPHABET.issuperset(name):
            raise ValueError(
                f"handler name {name!r} must be 1 to {METHOD_MAX_LENGTH} characters of a-z 0-9 _ ."
            )
        try:
            self._signature = Signature(function, injected=Call)
        except TypeError as error:
            raise TypeError(f"handler {name}: {error}") from error
        self.name = name
        self._function = function
        self._in_thread = in_thread

    async def run(self, call: Call, params: dict[str, Any]) -> Any:
        """Run the function. Raises InvalidArgument for params that do not fit it."""
        arguments = self._signature.bind(params)
        if self._signature.injected is not None:
            arguments[self._signature.injected] = call
        if self._in_thread:
            return self._sent(await run_in_thread(self._function, arguments))
        result = self._function(**arguments)
        return self._sent(await result if inspect.isawaitable(result) else result)

    def _sent(self, result: Any) -> Any:
        dump = self._signature.result.dump
        return result if dump is None else dump(result)


class Handlers:
    """The handlers of one session, and the calls that run, each within `middleware`. `limit` run at once."""

    def __init__(self, limit: int, middleware: Sequence[Middleware[Call]] = ()) -> None:
        self.limit = limit
        self._middleware = middleware
        self.user = ""
        self._handlers: dict[str, Handler] = {}
        self._running: dict[ClientCall, asyncio.Task[None]] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._handlers)

    def add(self, handler: Handler) -> None:
        """Add a handler. Raises ValueError if its name has one, or if there are too many."""
        if handler.name in self._handlers:
            raise ValueError(f"handler {handler.name!r} is registered twice")
        if len(self._handlers) >= MAX_HANDLERS:
            raise ValueError(f"at most {MAX_HANDLERS} handlers can be registered")
        self._handlers[handler.name] = handler

    # --- called by a connection -------------------------------------------------------------------

    def call_received(self, connection: ClientProtocol, call: ClientCall) -> None:
        task = asyncio.get_running_loop().create_task(self._run(connection, call), name="zcproto-handler")
        self._running[call] = task
        task.add_done_callback(partial(self._ended, connection, call))

    def call_withdrawn(self, call: ClientCall) -> None:
        task = self._running.get(call)
        if task is not None and task is not asyncio.current_task():  # a handler may close its client
            task.cancel()

    async def _run(self, connection: ClientProtocol, call: ClientCall) -> None:
        try:
            handler = self._handlers[call.method]
            seen = Call(call, self.user, asyncio.get_running_loop().time)
            result = await around(self._middleware, lambda seen: handler.run(seen, call.params))(seen)
            await connection.wait_writable()
        except CallError as error:
            connection.fail_call(call, error.code, error.message, error.details)
        except Exception as error:
            log_failure(f"the handler of {call.method}", error)
            connection.fail_call(call, Code.INTERNAL, "the handler failed; see the log of the client")
        else:
            connection.answer_call(call, result)

    def _ended(self, connection: ClientProtocol, call: ClientCall, task: asyncio.Task[None]) -> None:
        del self._running[call]
        if task.cancelled():
            connection.fail_call(call, Code.CANCELLED, "the client has cancelled the handler")
        connection.release_call(call)

    async def close(self) -> None:
        """Cancel the handlers that run, except one that closes its client."""
        for call in [*self._running]:
            self.call_withdrawn(call)
        await asyncio.sleep(0)  # they answer in this turn


class Registrar:
    """Registers the handlers of one session on its connections. It does nothing without handlers."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sessions: SessionManager, handlers: Handlers, random: Random
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._handlers = handlers
        self._backoff = Backoff(random)
        self._main: ClientProtocol | None = None
        self._sent: dict[ClientProtocol, frozenset[str]] = {}  # what each connection has
        self._begun: dict[ClientProtocol, tuple[frozenset[str], PendingCall]] = {}  # not yet awaited
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def connected(self, connection: ClientProtocol, *, is_extra: bool = False) -> bool:
        """Use another connection, as the main one or an extra one. Return True if that shows the session."""
        if not is_extra:
            self._main = connection
        self._sent[connection] = frozenset()
        shows = bool(self._handlers.names) and "calls" in connection.conversation.welcome
        begin = partial(self._begin_or_check, connection)
        if not shows or self._sessions.is_renewing:
            self.changed()
        elif not self._sessions.prove(connection, begin, holds_calls=not is_extra):
            begin()
        return shows

    def _begin_or_check(self, connection: ClientProtocol) -> None:
        if not self.begin(connection):
            self.changed()

    def begin(self, connection: ClientProtocol) -> bool:
        """Send `session.handle` with the present token now, if possible. Return True if it was sent."""
        names = self._handlers.names
        if (
            not (names and connection.ready and "calls" in connection.conversation.welcome)
            or self._sessions.session is None
            or self._sessions.needs_proof(connection)
        ):
            return False
        self._sent[connection] = frozenset()
        try:
            stream, call = self._request(connection, names, self._sessions.token)
        except InvalidArgument:  # too large for a connection without a session
            return False
        call.add_done_callback(mark_retrieved)
        self._begun[connection] = names, (stream, call)
        self.changed()
        return True

    def add(self, handler: Handler) -> None:
        self._handlers.add(handler)
        self.changed()

    def changed(self) -> None:
        """Check the registrations again."""
        self._changed.set()
        self._settled.clear()
        if self._task is None and self._handlers.names:
            self._task = self._loop.create_task(self._work(), name="zcproto-registration")

    async def settle(self, deadline: float) -> None:
        """Wait until the handlers are registered, that has failed, or the deadline has passed."""
        if self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(None if deadline == inf else deadline):
                    await self._settled.wait()

    def require(self, name: str) -> None:
        """Raise Unavailable if the server cannot call a handler yet."""
        main = self._main
        if main is not None and "calls" not in main.conversation.welcome:
            raise Unavailable(
                f"handler {name}: the server makes no calls; raise calls.max in its configuration"
            )
        if self._sessions.session is None:
            raise Unavailable(f"handler {name}: the server calls sessions; connect with a user and a key")
        if main is None or name not in self._sent.get(main, ()):
            raise Unavailable(f"handler {name}: not registered within the timeout; it is tried further on")

    async def close(self) -> None:
        """Stop, and cancel the handlers that run."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._handlers.close()

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            delay = await self._step()
            if not self._changed.is_set():
                self._settled.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if delay == inf else delay):
                    await self._changed.wait()

    async def _step(self) -> float:
        """Send what is due. Return the seconds until the next step, unless something changes before."""
        for connection in [*self._sent]:
            if connection.draining or connection.error is not None:
                del self._sent[connection]
                self._begun.pop(connection, None)
        if not self._sent:
            return inf
        if not any("calls" in connection.conversation.welcome for connection in self._sent):
            log.warning("the server makes no calls; the handlers of this client are not used")
            return inf
        try:
            await self._sessions.ensure()
        except LoginError as error:  # such as an identity provider that is down
            log.warning("handlers of this client wait for a session: %s", error)
            return self._backoff.next() + MIN_INTERVAL
        except ZcprotoError:  # the next call of the application raises it
            return inf
        self._changed.clear()  # what follows reads everything again
        return min(await asyncio.gather(*map(self._register, self._sent)), default=inf)

    async def _register(self, connection: ClientProtocol) -> float:
        """Send what is due on a connection. Return the seconds until the next step."""
        sessions, was_woken = self._sessions, False
        while True:
            names, token = self._handlers.names, sessions.token
            if connection.draining or connection.error is not None or token == NO_TOKEN:
                return inf
            if "calls" not in connection.conversation.welcome:
                return inf
            if not connection.conversation.handles(token):
                self._sent[connection] = frozenset()
            begun = self._begun.pop(connection, None)
            if begun is None and not self._is_due(connection, names):
                if was_woken:
                    connection.update_ready()
                return self._next_step(connection)
            if begun is not None or connection.ready:
                break
            await connection.wait_ready()
            was_woken = True
        try:
            if begun is not None:
                names, pending = begun
            else:
                if sessions.needs_proof(connection):
                    await sessions.attach(connection, token)
                pending = self._request(connection, names, token)
            await answer(connection, pending)
        except ConnectionClosed:
            return inf  # there will be another connection
        except CallError as error:
            return await self._after_error(error, connection, token)
        self._sent[connection] = names
        self._backoff.reset()
        return self._next_step(connection)

    def _is_due(self, connection: ClientProtocol, names: frozenset[str]) -> bool:
        """Return whether a request has to be sent: a registration, or one that only shows the session."""
        return names != self._sent[connection] or (connection is self._main and self._idle_left() <= 0)

    def _next_step(self, connection: ClientProtocol) -> float:
        return max(self._idle_left(), MIN_INTERVAL) if connection is self._main else inf

    def _request(self, connection: ClientProtocol, names: frozenset[str], token: bytes) -> PendingCall:
        now = self._loop.time()
        self._sessions.used(now)
        deadline = now + ANSWER_TIMEOUT
        if names == self._sent[connection]:
            return connection.request("session.info", None, token, None, deadline)
        self._handlers.user = "" if self._sessions.session is None else self._sessions.session.user
        return connection.handle(names, self._handlers.limit, self._handlers, token, deadline)

    def _idle_left(self) -> float:
        """Return the seconds until the session has to be shown, or renewed."""
        sessions = self._sessions
        shown_before = 0.0 if sessions.session is None else sessions.session.shown_before
        return sessions.valid_until - shown_before - self._loop.time()

    async def _after_error(self, error: CallError, connection: ClientProtocol, token: bytes) -> float:
        then = what_next(error)
        if then is Then.ATTACH:
            with suppress(CallError):  # the next attempt gets the same error
                await self._sessions.attach(connection, token)
        elif then not in (Then.LATER, Then.AT_ONCE):
            self._sessions.refused(token, error)
            if then is Then.RAISE and not isinstance(error, DeadlineExceeded):
                log.warning("the server cannot call this client: %s", error)
                return inf
        return self._backoff.next(retry_after_ms(error.details))


def call_back(what: str, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function of the application, and log what it raises."""
    try:
        function(*arguments)
    except Exception as error:  # asyncio's own report would quote the arguments
        log_failure(what, error)


def log_failure(what: str, error: BaseException) -> None:
    """Log an exception of the application's code, without secrets."""
    log.error("%s failed\n%s", escape_text(what), "\n".join(map(escape_text, traceback_lines(error))))


async def run_in_thread(
    function: Callable[..., Any], arguments: dict[str, Any], *, is_awaited: bool = True
) -> Any:
    """Run a function in a thread of its own, which does not keep the program from exiting.

    If the task is cancelled it waits for the thread, unless `is_awaited` is False.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        result, failure = None, None
        try:
            result = function(**arguments)
        except BaseException as error:  # passed to the task
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, done, result, failure)

    threading.Thread(target=work, name="zcproto-thread", daemon=True).start()
    try:
        await asyncio.wait([done])
    except asyncio.CancelledError:
        if not is_awaited:
            done.cancel()
            raise
        await asyncio.wait([done])
        done.exception()  # mark it as retrieved: nothing awaits it
        raise
    return done.result()


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Set the outcome of a thread, unless the future was cancelled."""
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
