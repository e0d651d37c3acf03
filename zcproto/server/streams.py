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
from typing import Any, Final

from zcproto.app.app import Context
from zcproto.app.items import Items
from zcproto.app.topics import TopicEvent
from zcproto.common.parameters import Checker
from zcproto.connection.credit import ItemQueue
from zcproto.connection.events import Request, ServerStream
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_streams import read_item
from zcproto.errors import Cancelled, InvalidArgument
from zcproto.server.state import ServerState
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import MessageError, encode_body

STREAM_TURN_BYTES: Final = 16_384
"""Most bytes of one stream in one turn of the loop, but for its last item."""

Ended = Callable[[ServerStream, Any, BaseException | None], None]
"""Called with the result of a stream's method, or with its exception."""


class StreamWorker:
    """The task of one stream's method."""

    __slots__ = ("_limits", "_runner", "_stream", "task")

    def __init__(self, runner: StreamRunner, stream: ServerStream, work: Coroutine[Any, Any, Any]) -> None:
        state = runner.state
        self._runner = runner
        self._stream = stream
        self._limits = state.request_limits if state.request_limits.counts_running else None
        if self._limits is not None:
            self._limits.begin(*self._owner())
        self.task = state.tasks.start_task(work, self._task_ended)

    def _owner(self) -> tuple[str | None, str]:
        session = self._stream.session
        return None if session is None else session.user, self._runner.peer

    def cancel(self) -> None:
        """Raise CancelledError in the method where it waits."""
        self.task.cancel()

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._runner.state.tasks.forget_task(task)
        if self._limits is not None:
            self._limits.end(*self._owner())
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._runner.ended(self._stream, None if error is not None else task.result(), error)
        self._runner.release(self._stream)


class StreamItems(Items[Any]):
    """The client's items of one stream, as its method takes them."""

    __slots__ = ("_check", "_counted", "_queue", "_runner", "_stream", "_waiter")

    def __init__(self, runner: StreamRunner, stream: ServerStream, queue: ItemQueue, check: Checker) -> None:
        self._runner = runner
        self._stream = stream
        self._queue = queue
        self._check = check
        self._counted = 0  # in `item_bytes` of the server
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
            self._runner.grant(self._stream, queue)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        number, body = queue.taken, queue.take()
        self.count()
        self._runner.grant(self._stream, queue)
        value = read_item(self._stream, body, self._runner.max_depth)
        try:
            return self._check(value, f"item {number}")
        except InvalidArgument as error:
            raise InvalidArgument(error.message, {"item": number}) from error

    def arrived(self) -> None:
        """Count what has arrived, and wake the method."""
        self.count()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def discard(self) -> None:
        """Discard what waits."""
        self._queue.clear()
        self.count()

    def count(self) -> None:
        """Count what waits against the memory of the server."""
        held = self._queue.held_bytes
        self._runner.state.item_bytes += held - self._counted
        self._counted = held


class StreamRunner:
    """The streams of one connection. Created with the first; `is_blocked` is whether the client does not read."""

    __slots__ = (
        "_connection",
        "_flush_soon",
        "_items",
        "_limits",
        "_part",
        "_queue",
        "_room",
        "_turn",
        "_waiting",
        "ended",
        "is_blocked",
        "peer",
        "state",
    )

    def __init__(
        self,
        state: ServerState,
        connection: ServerConnection,
        peer: str,
        flush_soon: Callable[[], None],
        ended: Ended,
    ) -> None:
        assert connection.settings.streams is not None, "streams are announced"
        self.state = state
        self._connection = connection
        self.peer = peer
        self._flush_soon = flush_soon
        self.ended = ended
        self._limits = connection.settings.streams
        self._items: dict[Request, StreamItems] = {}  # of methods that take them
        self._part = min(STREAM_TURN_BYTES, self._limits.write_bytes)
        self._room = self._limits.write_bytes  # not yet assigned to a stream, in this turn
        self._turn = 0
        self._waiting: dict[ServerStream, asyncio.Future[None]] = {}  # for credit
        self._queue: list[asyncio.Future[None]] = []  # for room; an empty deque takes 600 bytes more
        self.is_blocked = False

    @property
    def max_depth(self) -> int:
        return self._connection.settings.max_depth

    # --- the client's items -----------------------------------------------------------------------

    def take_items(self, stream: ServerStream, check: Checker) -> StreamItems | None:
        """Return the client's items of a stream that begins; None if the server holds too many."""
        if self.state.item_bytes >= self._limits.memory_bytes:
            return None
        queue = self._connection.streams(self.state.clock.now()).take_items(stream)
        items = self._items[stream] = StreamItems(self, stream, queue, check)
        return items

    def grant(self, stream: ServerStream, queue: ItemQueue) -> None:
        """Let the client send more, one item at a time while the server holds too many."""
        is_full = self.state.item_bytes >= self._limits.memory_bytes
        queue.window = (1, 1) if is_full else (self._limits.window_items, self._limits.window_bytes)
        if self._connection.grant(stream, self.state.clock.wall()):
            self._flush_soon()

    def items_received(self, stream: ServerStream) -> None:
        self._items[stream].arrived()

    def release(self, stream: Request) -> None:
        """Forget the items of a stream that has been answered."""
        items = self._items.pop(stream, None)
        if items is not None:
            items.arrived()

    def close(self) -> None:
        """Discard all items: the connection has ended."""
        while self._items:
            _, items = self._items.popitem()
            items.discard()

    # --- the items of methods ---------------------------------------------------------------------

    async def produce(
        self, stream: ServerStream, items: AsyncGenerator[Any, None], context: Context | None
    ) -> Any:
        """Send the items of a generator; return the result that its context holds."""
        turn, room = -1, 0
        try:
            async for item in items:
                body = item.body if item.__class__ is TopicEvent else encode_body(item)
                if len(body) > self._limits.max_item - MIN_LENGTH:
                    limit = self._limits.max_item - MIN_LENGTH
                    raise MessageError(f"the item has {len(body)} bytes; at most {limit} fit")
                if not stream.credit.may_send:
                    if stream.is_answered:  # cut, and the generator has ignored its cancellation
                        return None
                    await self._wait_for_credit(stream)
                if room <= 0 or turn != self._turn or self.is_blocked:
                    await self._wait_for_room()
                    turn, room = self._turn, self._part
                self._connection.send_item(stream, body, self.state.clock.wall())
                room -= MIN_LENGTH + len(body)
                self._flush_soon()
        finally:
            await items.aclose()  # an item that was refused, or a cut, leaves it at its `yield`
        return getattr(context, "result", None)

    async def _wait_for_credit(self, stream: ServerStream) -> None:
        while not stream.credit.may_send:
            now = self.state.clock.now()
            if self._connection.streams(now).wait_for_credit(stream, now):
                self._connection.deadline_moved = True
                self._flush_soon()
            waiter = self._waiting[stream] = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                del self._waiting[stream]

    async def _wait_for_room(self) -> None:
        """Wait until this stream may send its part."""
        self._flush_soon()  # ends the turn
        if self._room > 0 and not (self.is_blocked or self._queue):
            self._room -= self._part
            return
        waiter = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        await waiter

    def credit_received(self, stream: ServerStream) -> None:
        """Let a stream go on that waits for credit."""
        waiter = self._waiting.get(stream)
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
            self._flush_soon()
