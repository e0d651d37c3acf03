"""A stream of the client: items of either side as they come, then a result.

    async with client.stream("tokens", prompt="hi") as stream:
        async for piece in stream:
            print(piece)
        print(stream.result)

Decides: when an item is taken, and so when the server may send more; that leaving early cancels the stream; that it
is opened again only while the server has certainly not begun it; when the middleware of a stream runs.

Must not know: when connections are made, which errors are retried.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from zcproto.client.credentials import PositionFile
from zcproto.client.endpoints import Endpoint
from zcproto.client.protocol import PendingStream
from zcproto.client.retry import Attempt, is_resumed_elsewhere
from zcproto.client.session import ANSWER_TIMEOUT, STABLE_AFTER
from zcproto.common.middleware import Middleware, around
from zcproto.common.misuse import wrong_use
from zcproto.errors import CallError, Cancelled, ConnectionClosed, DeadlineExceeded
from zcproto.wire.message import Credit, Resume


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


DEFAULT_WINDOW: Final[Credit] = (64, 262_144)

SentItems = AsyncIterable[Any] | Iterable[Any]
"""The items that a stream sends. They are taken one by one when the method wants them."""


Reopen = Callable[[Any], Mapping[str, Any]]
"""Returns the params that continue a stream after its last item."""


RUN_ID_SIZE: Final = 16
"""Random bytes of the id of a run."""

REPORT_S: Final = 1.0
"""Seconds after which an item that was taken is reported at the latest (zcp1.md, section 20.3)."""

KEEP_S: Final = 0.05
"""The same with a session file, to which the position is written first."""

REPEATED_S: Final = 300.0
"""Seconds in which the first OPEN of a run is repeated: half of the time for which a server knows the id of an old
run."""


@dataclass(slots=True)
class RunPosition:
    """Where a durable stream is. `position` counts the items that the application has received.

    `is_known`: the run has begun, and is only attached to. Before that `opened_at` is when it was first opened.
    `accepted_at`: when the present attachment was accepted. `unanswered`: OPENs that were lost with their
    connections, each of which the server may still take for the newest attachment.
    """

    id: str
    position: int = 0
    is_known: bool = False
    opened_at: float | None = None
    accepted_at: float | None = None
    unanswered: int = 0

    def resume(self, now: float) -> Resume:
        """Return what OPEN asks for at a time."""
        self.accepted_at = None
        if self.opened_at is None:
            self.opened_at = now
        return Resume(self.id, self.position, self.is_known)

    def may_open(self, now: float) -> bool:
        """Return whether OPEN may be repeated."""
        return self.is_known or self.opened_at is None or now < self.opened_at + REPEATED_S


@dataclass(slots=True, repr=False)
class StreamRequest:
    """What a stream asks for. `deadline` is in the loop's time, or infinite. `run` is that of a durable stream."""

    method: str
    params: Mapping[str, Any]
    window: Credit
    deadline: float
    traceparent: str | None
    attempt: Attempt
    run: RunPosition | None = None
    has_items: bool = False


class StreamOpener(Protocol):
    """The client, as its streams use it."""

    _positions: PositionFile | None

    async def _cancel_run(self, id: str) -> bool: ...

    def _deadline(self, timeout: float | None) -> float: ...

    async def _open_stream(self, request: StreamRequest) -> PendingStream: ...

    async def _after_stream_error(
        self,
        error: CallError | ConnectionClosed,
        request: StreamRequest,
        pending: PendingStream,
        can_resume: bool,
    ) -> None: ...


class Stream:
    """A stream of one method. Create it with `client.stream`.

    One task at a time receives, and one at a time sends.
    """

    def __init__(
        self,
        client: StreamOpener,
        request: StreamRequest,
        item_timeout: float | None,
        items: SentItems | None = None,
        reopen: Reopen | None = None,
        middleware: StreamMiddleware | None = None,
    ) -> None:
        check_items(items, Iterable | AsyncIterable)
        if reopen is not None and not callable(reopen):
            raise TypeError(
                "reopen is a function of the last item, such as reopen=lambda last: {'after': last['id']}"
            )
        if items is not None and reopen is not None:
            raise ValueError("a stream with items cannot be opened again; choose items or reopen")
        self._run = request.run
        if self._run is not None and (items is not None or reopen is not None):
            raise ValueError(
                "a durable stream takes no items and resumes by itself; leave out items and reopen"
            )
        self._report: asyncio.Task[None] | None = None  # of the position
        self._taken = 0  # items of a durable stream that the application has processed
        self._reopen = reopen
        self._last: tuple[Any, ...] = ()  # the last item, with `reopen`
        self._client = client
        self._middleware = middleware
        self._request = request
        self._item_timeout = item_timeout
        self._items = items
        self._sender: asyncio.Task[None] | None = None  # of `items`
        self._failure: Exception | None = None  # of `items`
        self._pending: PendingStream | None = None
        self._opening = asyncio.Lock()
        self._is_receiving = False
        self._is_sending = False
        self._items_ended = False
        self._has_ended = self._was_read = False
        self._result: Any = None

    def __repr__(self) -> str:
        return f"Stream(method={self._request.method!r})"

    @property
    def result(self) -> Any:
        """The result of the method. Raises RuntimeError before the items have ended."""
        if not self._has_ended:
            raise RuntimeError("the stream has not ended; take all items first")
        return self._result

    @property
    def id(self) -> str | None:
        """The id of a durable stream, for `client.resume`; None of another one."""
        return None if self._run is None else self._run.id

    @property
    def position(self) -> int | None:
        """How many items of a durable stream were received, for `client.resume`; None of another one."""
        return None if self._run is None else self._run.position

    @property
    def draining(self) -> bool:
        """Whether the server is going away: the stream goes on for a while; open the next one elsewhere."""
        return self._pending is not None and self._pending.connection.draining

    async def __aenter__(self) -> Self:
        if self._pending is not None:
            raise RuntimeError("this stream was opened before; create a new one")
        if self._middleware is None:
            self._pending = await self._client._open_stream(self._request)
        else:
            try:
                await self._middleware.enter(self._open_within_middleware)
            except BaseException:
                self.close()
                raise
        if self._items is not None:
            self._sender = asyncio.create_task(self._send_all(self._items))
        return self

    async def _open_within_middleware(self, call: OutgoingCall) -> None:
        self._request = replace(
            self._request,
            method=call.method,
            params=call.params,
            deadline=self._client._deadline(call.timeout),
            traceparent=call.traceparent,
        )
        self._pending = await self._client._open_stream(self._request)

    async def __aexit__(self, *error: object) -> None:
        self.close()
        if self._run is not None:  # an error may have interrupted the processing of the last item
            await self._keep(self._run.position if not any(error) else self._taken)
        if self._sender is not None:
            await asyncio.wait([self._sender])
        if self._middleware is not None:
            await self._middleware.leave()

    if not TYPE_CHECKING:
        __enter__ = __exit__ = wrong_use("write async with")
        __iter__ = wrong_use("write async for")
        __await__ = wrong_use("read it by async for, or open it by async with")

    async def cancel(self) -> bool:
        """Cancel the method of a durable stream. Return whether it was running. Raises like `client.call`."""
        if self._run is None:
            raise RuntimeError("leave a stream that is not durable to cancel it")
        pending = self._pending
        if pending is not None and not pending.done():
            pending.connection.cancel_stream(pending.stream)
            await asyncio.wait([pending], timeout=ANSWER_TIMEOUT)
            error = pending.exception() if pending.done() and not pending.cancelled() else None
            if isinstance(error, Cancelled) and error.details.get("reason") == "caller":
                return True
        return await self._client._cancel_run(self._run.id)  # nothing is attached, or the run has ended

    def close(self) -> None:
        """Leave the stream: cancel it, unless it is durable or has ended. Idempotent."""
        if self._report is not None:
            self._report.cancel()
            self._report = None
        if self._pending is not None:
            self._pending.leave()
        self._stop_sending()

    # --- receiving --------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._was_read:
            raise RuntimeError("this stream was read to its end; open another one")
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[Any, None]:
        if self._pending is None:  # the short form, without `async with`
            async with self:
                async for item in self._iterate():
                    yield item
            return
        while True:
            try:
                item = await self.receive()
            except EOFError:
                return
            yield item

    async def receive(self) -> Any:
        """Return the next item. Raises EOFError after the last one, and otherwise like `client.call`.

        Items that have arrived are returned before an error is raised.
        """
        if self._is_receiving:
            raise RuntimeError("another task is receiving from this stream")
        self._is_receiving = True
        try:
            return await self._receive()
        except EOFError:
            self._was_read = True
            if self._middleware is not None:
                self._middleware.end(self._result)
            raise
        except BaseException as error:
            if self._middleware is not None:
                self._middleware.end(error=error)
            self.close()
            raise
        finally:
            self._is_receiving = False

    async def _receive(self) -> Any:
        run, taken = self._run, None if self._run is None else self._run.position
        while True:
            pending = self._opened()
            if run is not None and taken is not None:
                self._taken = taken
                if pending.stream.is_accepted:
                    self._accepted(run)
                    self._report_soon(pending, taken)
            if pending.stream.items.held:
                item = pending.connection.take_item(pending.stream)
                if run is not None:
                    run.position += 1
                    self._request.attempt.reset()
                if self._reopen is not None:
                    self._last = (item,)
                    self._request.attempt.reset()
                return item
            if pending.done():
                await self._answered(pending)
                continue
            try:
                async with asyncio.timeout(self._item_timeout):
                    await pending.wait()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{self._request.method} has sent no item within {self._item_timeout:g} s; end the items that"
                    " it takes, or give it a longer item_timeout"
                ) from None

    def _accepted(self, run: RunPosition) -> None:
        """Record that the present attachment was accepted: its session was valid, and the run has begun."""
        if run.accepted_at is None:
            run.accepted_at = asyncio.get_running_loop().time()
            run.is_known = True
            self._request.attempt.done.clear()

    def _report_soon(self, pending: PendingStream, taken: int) -> None:
        """Report in time that the items before a position were processed."""
        if taken > max(pending.stream.taken, 0):
            if self._client._positions is None:
                pending.stream.taken = taken  # the next CREDIT reports it
            if self._report is None:
                self._report = asyncio.create_task(self._send_reports(), name="zcproto-position")

    async def _send_reports(self) -> None:
        reported, delay = 0, REPORT_S if self._client._positions is None else KEEP_S
        while self._taken > reported:
            await asyncio.sleep(delay)
            taken = self._taken
            if not await self._keep(taken):
                delay = REPORT_S
                continue
            reported, pending = taken, self._opened()
            if pending.stream.is_accepted and not pending.done():
                pending.stream.taken = max(pending.stream.taken, taken)
                pending.connection.send_taken(pending.stream)
        self._report = None

    async def _keep(self, position: int) -> bool:
        """Write a position to the session file, if there is one. Return False if that fails."""
        positions, run = self._client._positions, self._run
        return positions is None or run is None or await positions.keep(run.id, position)

    async def finished(self) -> Any:
        """End this side's items, discard the method's, and return its result. Raises like `client.call`."""
        if self._sender is None:
            await self.end()
        while True:
            try:
                await self.receive()
            except EOFError:
                return self._result

    # --- sending ----------------------------------------------------------------------------------

    async def send(self, item: Any) -> None:
        """Send an item as soon as the method wants one.

        Raises EOFError if the method has returned, InvalidArgument for an item that cannot be sent, and otherwise
        like `client.call`.
        """
        if self._reopen is not None or self._run is not None:
            raise RuntimeError("a durable stream, or one with reopen, sends no items")
        if self._is_sending or self._items is not None:
            raise RuntimeError("another task is sending to this stream")
        self._is_sending = True
        try:
            pending = await self._wanted()
            pending.connection.send_item(pending.stream, item)
        except EOFError:
            raise EOFError(
                "the method has ended and takes no items; await stream.finished() for its result"
            ) from None
        finally:
            self._is_sending = False

    async def end(self) -> None:
        """Send no more items. Idempotent."""
        pending = self._opened()
        self._items_ended = True
        if not pending.done():
            pending.connection.end_items(pending.stream)

    async def _wanted(self) -> PendingStream:
        """Wait until the method wants an item."""
        while True:
            pending = self._opened()
            if self._items_ended:
                raise RuntimeError("the items of this stream have ended")
            await pending.wait_to_send()
            if not pending.done():
                return pending
            await self._answered(pending)

    async def _send_all(self, items: SentItems) -> None:
        """Send `items`. Their error fails the stream."""
        try:
            async with aclosing(_each(items)) as source:
                while True:
                    try:
                        pending = await self._wanted()  # before an item is taken, which could be lost
                    except (EOFError, CallError, ConnectionClosed):
                        return  # `receive` raises it
                    try:
                        item = await anext(source)
                    except StopAsyncIteration:
                        break
                    if not pending.done():
                        pending.connection.send_item(pending.stream, item)
            await self.end()
        except Exception as error:
            self._failure = error
            self.close()

    # --- the answer -------------------------------------------------------------------------------

    def _opened(self) -> PendingStream:
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            raise RuntimeError("open the stream first: async with client.stream(...) as stream")
        return self._pending

    async def _answered(self, pending: PendingStream) -> None:
        """Raise what an answer means; open the stream again if it has certainly not begun."""
        if pending.cancelled():
            raise RuntimeError("this stream is closed")
        try:
            self._result = pending.result()
        except (CallError, ConnectionClosed) as error:
            run = self._run
            can_resume = self._reopen is not None or run is not None
            if run is not None:
                now = asyncio.get_running_loop().time()
                if pending.stream.is_accepted:
                    self._accepted(run)
                elif isinstance(error, ConnectionClosed):
                    run.unanswered += 1
                if run.unanswered and not isinstance(error, ConnectionClosed) and is_resumed_elsewhere(error):
                    run.unanswered -= 1
                    error = ConnectionClosed(
                        "an earlier OPEN of this client resumed the stream, which goes on"
                    )
                if run.accepted_at is not None and now >= run.accepted_at + STABLE_AFTER:
                    self._request.attempt.reset()
                can_resume = run.may_open(now)
            if (pending.stream.was_answered_to or run is not None) and not can_resume:
                self._stop_sending()
                raise
            async with self._opening:
                if self._pending is pending:
                    await self._client._after_stream_error(error, self._request, pending, can_resume)
                    if self._reopen is not None and self._last:
                        params = {**self._request.params, **self._reopen(*self._last)}
                        self._request = replace(self._request, params=params)
                    self._pending = await self._client._open_stream(self._request)
                    if self._items_ended:
                        self._pending.connection.end_items(self._pending.stream)
            return
        self._has_ended = True
        self._stop_sending()
        raise EOFError("the stream has ended")

    def _stop_sending(self) -> None:
        """Close the iterator of `items`."""
        if self._sender is not None and self._sender is not asyncio.current_task():
            self._sender.cancel()


def check_items(items: object, kind: Any) -> None:
    """Raise TypeError for `items` that cannot be sent one by one. None is accepted."""
    if items is not None and (isinstance(items, str | bytes) or not isinstance(items, kind)):
        raise TypeError(f"items is a list or an iterator of items, not {type(items).__name__}")


async def _each(items: SentItems) -> AsyncGenerator[Any, None]:
    """Iterate over items of either kind, and close their generator at the end."""
    if isinstance(items, AsyncGenerator):
        async with aclosing(items):
            async for item in items:
                yield item
    elif isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
