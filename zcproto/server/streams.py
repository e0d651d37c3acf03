"""Runs the methods of one connection's streams: each item waits at its `yield` for credit and for room.

    item -> encoded -> credit of the client? -> room in this connection? -> connection.send_item

Rules:
- A stream is a task from the beginning: it takes less memory than a method that may end at once.
- Nothing is produced ahead: a generator goes on once its item has been queued.
- At most `write_bytes` of items, and the parts of two streams, wait for a client that does not read: the loop keeps
  all of a write of which the system has taken a part.
- A stream that has sent its part of them lets the other streams, and the answers, have their turn.

It must not know: TLS, what is allowed on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final, Protocol

from zcproto.app.app import Items
from zcproto.app.topics import TopicEvent
from zcproto.common.parameters import Ended
from zcproto.common.value_types import Checker
from zcproto.connection.credit import ItemQueue
from zcproto.connection.events import Request, ServerStream
from zcproto.connection.refusals import TOO_MUCH_HELD
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_streams import read_item
from zcproto.errors import Cancelled, InvalidArgument
from zcproto.server.item_budget import LEAST_ITEMS, ItemShare
from zcproto.server.state import ServerState
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import MessageError

STREAM_TURN_BYTES: Final = 16_384
"""Most bytes of one stream in one turn of the loop, but for its last item."""


class StreamOwner(Protocol):
    """The connection whose streams run; an object, as bound methods would cost each connection memory."""

    @property
    def peer(self) -> str: ...

    def flush_soon(self) -> None:
        """Send what is queued at the end of this turn of the loop."""

    def cut_stream(self, stream: ServerStream, body: bytes) -> None:
        """End a stream with this ERROR."""

    def method_ended(self, request: Request, result: Any, error: BaseException | None) -> None:
        """Answer a stream with the result of its method, or with its exception."""


class StreamWorker:
    """The task of one stream's method.

    `items` are the client's, if the method takes them. `waiter` is set while the method waits for credit.
    """

    __slots__ = ("_limits", "_runner", "_stream", "items", "task", "waiter")

    def __init__(
        self,
        runner: StreamRunner,
        stream: ServerStream,
        work: Coroutine[Any, Any, Any],
        items: StreamItems | None,
    ) -> None:
        state = runner.state
        self.items = items
        self.waiter: asyncio.Future[None] | None = None
        self._runner = runner
        self._stream = stream
        self._limits = state.request_limits if state.request_limits.counts_running else None
        if self._limits is not None:
            self._limits.begin(*self._owner())
        self.task = state.tasks.start_task(work, self)

    def _owner(self) -> tuple[str | None, str]:
        session = self._stream.session
        return None if session is None else session.user, self._runner.owner.peer

    def cancel(self) -> None:
        """Raise CancelledError in the method where it waits."""
        self.task.cancel()

    def __call__(self, task: asyncio.Task[Any]) -> None:
        """Answer the stream: its task has ended. Called by the task; a bound method would take memory."""
        self._runner.state.tasks.forget_task(task)
        if self._limits is not None:
            self._limits.end(*self._owner())
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._runner.owner.method_ended(self._stream, None if error is not None else task.result(), error)
        self._runner.release(self._stream)


class StreamItems(Items[Any]):
    """The client's items of one stream, as its method takes them."""

    __slots__ = ("_check", "_queue", "_runner", "_stream", "_waiter", "held", "promised", "share")

    def __init__(
        self, runner: StreamRunner, stream: ServerStream, queue: ItemQueue, check: Checker, share: ItemShare
    ) -> None:
        self._runner = runner
        self._stream = stream
        self._queue = queue
        self._check = check
        self.share = share
        self.held = self.promised = 0  # as counted in the share
        self._waiter: asyncio.Future[None] | None = None

    async def __anext__(self) -> Any:
        if self._waiter is not None:
            raise RuntimeError("another task takes the items of this stream")
        queue = self._queue
        while not queue.held:
            if self._stream.is_answered:
                raise Cancelled("the stream has ended")
            if queue.has_ended:
                raise StopAsyncIteration
            self._runner.grant(self._stream, queue, self)
            self.count()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        number, body = queue.taken, queue.take()
        self._runner.grant(self._stream, queue, self)
        self.count()
        value = read_item(self._stream, body, self._runner.max_depth)
        try:
            return self._check(value, f"item {number}")
        except InvalidArgument as error:
            raise InvalidArgument(error.message, {**error.details, "item": number}) from error

    def arrived(self) -> None:
        """Count what has arrived, and wake the method."""
        self.count()
        self._wake()

    def close(self) -> None:
        """Count nothing any more: the stream was answered, or its connection has ended. Wake the method."""
        self._runner.state.counters.large_bytes += self.held
        self._queue.clear()
        self._queue.has_ended = True
        self.count()
        self.share.leave()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def count(self) -> None:
        """Count what waits, and what was granted, against the memory of the server."""
        held, promised = self._queue.held_bytes, self._queue.promised_bytes
        self.share.count(held - self.held, promised - self.promised)
        self.held, self.promised = held, promised


class StreamRunner:
    """The streams of one connection. Created with the first; `is_blocked` is whether the client does not read."""

    __slots__ = (
        "_connection",
        "_limits",
        "_memory",
        "_part",
        "_queue",
        "_room",
        "_turn",
        "is_blocked",
        "owner",
        "running",
        "state",
    )

    def __init__(self, state: ServerState, connection: ServerConnection, owner: StreamOwner) -> None:
        assert connection.settings.streams is not None, "streams are announced"
        self.state = state
        self._connection = connection
        self.owner = owner
        self._limits = connection.settings.streams
        self._memory = max(self._limits.memory_bytes, LEAST_ITEMS * self._limits.max_item)
        self._part = min(STREAM_TURN_BYTES, self._limits.write_bytes)
        self._room = self._limits.write_bytes  # not yet assigned to a stream, in this turn
        self._turn = 0
        self._queue: list[asyncio.Future[None]] | None = None  # for room; an empty deque takes 600 bytes more
        self.is_blocked = False
        self.running = 0  # streams that have not been answered

    @property
    def max_depth(self) -> int:
        return self._connection.settings.max_depth

    def start(self, stream: ServerStream, work: Coroutine[Any, Any, Any], items: StreamItems | None) -> None:
        """Run the method of a stream that is held."""
        self.running += 1
        self.state.counters.streams_open[stream.method] += 1
        stream.worker = StreamWorker(self, stream, work, items)

    def workers(self) -> list[tuple[ServerStream, StreamWorker]]:
        """Return the streams that have not been answered, with what runs them."""
        streams = self._connection.open_streams()
        return [(stream, stream.worker) for stream in streams if stream.worker is not None]

    def release(self, stream: ServerStream) -> None:
        """Forget the worker and the items of a stream that has been answered."""
        worker, stream.worker = stream.worker, None
        if worker is None:
            return
        self.running -= 1
        self.state.counters.streams_open[stream.method] -= 1
        if worker.items is not None:
            worker.items.close()

    def close(self) -> None:
        """Discard all items, and cancel all methods: the connection has ended."""
        for stream, worker in self.workers():
            self.release(stream)
            worker.cancel()

    # --- the client's items -----------------------------------------------------------------------

    def take_items(self, stream: ServerStream, check: Checker) -> StreamItems | None:
        """Return the client's items of a stream that begins; None if the server holds too many of its user."""
        assert stream.session is not None, "a stream needs one"
        share = self.state.items.join(stream.session.user)
        if share.is_over(self._memory - self._limits.max_item):  # its next item may be too much
            share.leave()
            return None
        queue = self._connection.streams(self.state.clock.now()).take_items(stream)
        return StreamItems(self, stream, queue, check, share)

    def grant(self, stream: ServerStream, queue: ItemQueue, items: StreamItems) -> None:
        """Let the client send more, the less the more its user was promised."""
        most = self._limits.window_items, self._limits.window_bytes
        queue.window = items.share.window(self._memory, most, items.promised)
        if self._connection.grant(stream, self.state.clock.wall()):
            self.owner.flush_soon()

    def items_received(self, stream: ServerStream) -> None:
        """Wake the method, or cut the stream if its user holds too much."""
        items: StreamItems = stream.worker.items
        items.arrived()
        if items.share.is_over(self._memory):
            self.owner.cut_stream(stream, TOO_MUCH_HELD)

    # --- the items of methods ---------------------------------------------------------------------

    async def produce(
        self,
        stream: ServerStream,
        items: AsyncGenerator[Any, None],
        encode: Callable[[Any], bytes],
    ) -> Any:
        """Send the items of a generator; return the result that it ends with."""
        turn, room = -1, 0
        connection, credit, clock = self._connection, stream.credit, self.state.clock
        try:
            async for item in items:
                if item.__class__ is Ended:
                    return item.result
                body = item.body if item.__class__ is TopicEvent else encode(item)
                size = len(body)
                if size > self._limits.max_item - MIN_LENGTH:
                    limit = self._limits.max_item - MIN_LENGTH
                    raise MessageError(
                        f"the item has {size} bytes; at most {limit} fit (streams.max_item_bytes)"
                    )
                # `may_send` inlined: every item passes here
                if credit.sent_items >= credit.items or credit.sent_bytes >= credit.bytes:
                    if stream.is_answered:  # cut, and the generator has ignored its cancellation
                        return None
                    await self._wait_for_credit(stream)
                if room <= 0 or turn != self._turn or self.is_blocked:
                    await self._wait_for_room()
                    turn, room = self._turn, self._part
                    self.owner.flush_soon()  # which ends this turn
                room -= connection.send_item(stream, body, clock.wall())
        finally:
            await items.aclose()  # an item that was refused, or a cut, leaves it at its `yield`
        return None

    async def _wait_for_credit(self, stream: ServerStream) -> None:
        while not stream.credit.may_send:
            now = self.state.clock.now()
            if self._connection.streams(now).wait_for_credit(stream, now):
                self._connection.deadline_moved = True
                self.owner.flush_soon()
            worker: StreamWorker = stream.worker
            worker.waiter = asyncio.get_running_loop().create_future()
            try:
                await worker.waiter
            finally:
                worker.waiter = None

    async def _wait_for_room(self) -> None:
        """Wait until this stream may send its part."""
        self.owner.flush_soon()  # ends the turn
        if self._room > 0 and not (self.is_blocked or self._queue):
            self._room -= self._part
            return
        waiter = asyncio.get_running_loop().create_future()
        if self._queue is None:
            self._queue = []
        self._queue.append(waiter)
        await waiter

    def credit_received(self, stream: ServerStream) -> None:
        """Let a stream go on that waits for credit."""
        waiter = None if stream.worker is None else stream.worker.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def flushed(self, unread: int) -> None:
        """Begin the next turn: let the streams go on that have waited longest, as far as there is room.

        `unread` are the bytes that wait for the client.
        """
        if self.is_blocked:
            return
        self._turn += 1
        self._room = self._part if unread else self._limits.write_bytes
        while self._queue and self._room > 0:
            waiter = self._queue.pop(0)
            if not waiter.done():
                self._room -= self._part
                waiter.set_result(None)
        if self._queue:
            self.owner.flush_soon()
