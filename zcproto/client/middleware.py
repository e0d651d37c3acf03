"""Middleware of a client: functions around each of its calls and streams.

    call    -> middleware -> ... -> sent, with all attempts -> its result
    stream  -> middleware, in a task -> ... -> opened -> the application reads and sends -> its result

Must not know: how calls are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zcproto.client.address import Endpoint
from zcproto.common.middleware import Middleware, around


@dataclass(slots=True, kw_only=True)
class OutgoingCall:
    """A call or a stream of a client, as its middleware sees it. Changes apply to what is sent.

    `timeout` is in seconds, None for none. A stream has no idempotency key. `endpoint` is where the client is
    connected when the call begins; None without a connection.
    """

    method: str
    params: Mapping[str, Any]
    timeout: float | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None
    is_stream: bool = False
    endpoint: Endpoint | None = field(default=None, compare=False)


class Prepared(dict[str, Any]):
    """Params of a call that has passed the middleware."""


class StreamMiddleware:
    """Runs the middleware of one stream in a task, from before its opening until after its end."""

    __slots__ = ("_call", "_ended", "_error", "_middleware", "_task")

    def __init__(self, middleware: Sequence[Middleware[OutgoingCall]], call: OutgoingCall) -> None:
        self._middleware = middleware
        self._call = call
        self._error: BaseException | None = None  # of the stream, which its user has received
        self._ended: asyncio.Future[Any] | None = None
        self._task: asyncio.Task[Any] | None = None

    async def enter(self, open_stream: Callable[[OutgoingCall], Awaitable[None]]) -> None:
        """Run the middleware until it has opened the stream. Raises what it raises instead."""
        loop = asyncio.get_running_loop()
        opened, ended = asyncio.Event(), loop.create_future()

        async def use(call: OutgoingCall) -> Any:
            await open_stream(call)
            opened.set()
            return await ended

        async def run() -> Any:
            try:
                return await around(self._middleware, use)(self._call)
            finally:
                opened.set()

        self._ended = ended
        self._task = loop.create_task(run(), name="zcproto-middleware")
        try:
            await opened.wait()
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait([self._task])
            raise
        if self._task.done():
            self._task.result()
            raise RuntimeError("a middleware has returned before the stream ended; await call_next(call)")

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Let `call_next` return the result of the stream, or raise its error. Idempotent."""
        if self._ended is None or self._ended.done():
            return
        self._error = error
        if error is None:
            self._ended.set_result(result)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # mark it as retrieved: a middleware may have returned

    async def leave(self) -> None:
        """Wait for the end of the middleware. Raises an error that is its own."""
        self.end()
        if self._task is not None:
            task, self._task = self._task, None
            await asyncio.wait([task])
            error = None if task.cancelled() else task.exception()
            if error is not None and error is not self._error:
                raise error
