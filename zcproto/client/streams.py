"""A stream of the client: items as they come, then a result.

    async with client.stream("tokens", prompt="hi") as stream:
        async for piece in stream:
            print(piece)
        print(stream.result)

Decides: when an item is taken, and so when the server may send more; that leaving early cancels the stream; that it
is opened again only while the server has certainly not begun it.

Must not know: when connections are made, which errors are retried.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from zcproto.client.protocol import PendingStream
from zcproto.client.retry import Attempt
from zcproto.errors import CallError, ConnectionClosed, DeadlineExceeded
from zcproto.wire.message import Credit

DEFAULT_WINDOW: Final[Credit] = (64, 262_144)


@dataclass(frozen=True, slots=True, repr=False)
class StreamRequest:
    """What a stream asks for. `deadline` is in the loop's time, or infinite."""

    method: str
    params: Mapping[str, Any]
    window: Credit
    deadline: float
    traceparent: str | None
    attempt: Attempt


class StreamOpener(Protocol):
    """The client, as its streams use it: `after_stream_error` returns if a stream may be opened again."""

    @property
    def open_stream(self) -> Callable[[StreamRequest], Awaitable[PendingStream]]: ...
    @property
    def after_stream_error(
        self,
    ) -> Callable[[CallError | ConnectionClosed, StreamRequest, PendingStream], Awaitable[None]]: ...


class Stream:
    """A stream of one method. Create it with `client.stream`; it belongs to one task at a time."""

    def __init__(self, opener: StreamOpener, request: StreamRequest, item_timeout: float | None) -> None:
        self._opener = opener
        self._request = request
        self._item_timeout = item_timeout
        self._pending: PendingStream | None = None
        self._is_receiving = False
        self._has_ended = False
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
    def draining(self) -> bool:
        """Whether the server is going away: the stream goes on for a while; open the next one elsewhere."""
        return self._pending is not None and self._pending.connection.draining

    async def __aenter__(self) -> Self:
        if self._pending is not None:
            raise RuntimeError("this stream was opened before; create a new one")
        self._pending = await self._opener.open_stream(self._request)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the stream unless it has ended. Idempotent."""
        pending = self._pending
        if pending is not None:
            pending.leave()

    def __aiter__(self) -> AsyncIterator[Any]:
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
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self._is_receiving = False

    async def _receive(self) -> Any:
        while True:
            pending = self._pending
            if pending is None:
                raise RuntimeError("open the stream first: async with client.stream(...) as stream")
            if pending.half.items.held:
                return pending.take_item()
            if pending.done():
                try:
                    self._result = pending.result()
                except (CallError, ConnectionClosed) as error:
                    if pending.half.was_answered_to:
                        raise
                    await self._opener.after_stream_error(error, self._request, pending)
                    self._pending = await self._opener.open_stream(self._request)
                    continue
                self._has_ended = True
                raise EOFError("the stream has ended")
            try:
                async with asyncio.timeout(self._item_timeout):
                    await pending.wait()
            except TimeoutError:
                raise DeadlineExceeded("no item within item_timeout") from None
