"""Handlers: functions of the application that the server calls.

    @client.handler("approve")
    async def approve(call: Call, tool: str, text: str) -> bool:
        return await ask(f"{call.user}: run {tool}?", text)

Decides: how a handler runs, and which FAILURE its exception becomes.

Rules:
- Parameters are passed by name and checked against the annotations, as those of a server's methods.
- A handler whose call was withdrawn, or whose session or connection has ended, is cancelled.
- An exception that is not a CallError is logged; the server only learns that the handler failed.
- The answer of a handler waits until the server reads: it takes the place of another call.

Must not know: when handlers are registered.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from zcproto.client.protocol import ClientProtocol
from zcproto.common.exceptions import traceback_lines
from zcproto.common.middleware import Middleware, around
from zcproto.common.parameters import Signature
from zcproto.common.text import escape_text
from zcproto.connection.client_calls import ClientCall, ClientCallState
from zcproto.errors import CallError, Code
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH

log = logging.getLogger("zcproto.client")

MAX_HANDLERS: Final = 256
MS_PER_SECOND: Final = 1000

Function = TypeVar("Function", bound=Callable[..., Any])


class Call:
    """One call of the server. A handler gets it through a parameter annotated `Call`.

    `method` is the name that was called, `user` the user whose session it concerns, `traceparent` the caller's W3C
    Trace Context header, if it is valid.
    """

    __slots__ = ("_call", "_ends", "_now", "method", "traceparent", "user")

    def __init__(self, call: ClientCall, user: str, now: Callable[[], float]) -> None:
        self._call = call
        self._now = now
        self._ends = now() + call.deadline_ms / MS_PER_SECOND
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
    """The handlers of one session, and the calls that run, each within `middleware`. `most` run at once."""

    def __init__(self, most: int, middleware: Sequence[Middleware[Call]] = ()) -> None:
        self.most = most
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

    def finish(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function(**arguments)
        except BaseException as error:  # passed to the task
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, failure)

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
