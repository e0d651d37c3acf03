"""What the modules that `zcproto stubs` writes need: calls and streams whose results and items are checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from zcproto.client.blocking import BlockingSessionClient, BlockingStream
from zcproto.client.client import UNSET, SessionClient
from zcproto.client.streams import SentItems, Stream
from zcproto.common.misuse import wrong_use

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["UNSET", "BlockingTypedClient", "BlockingTypedStream", "TypedClient", "TypedStream"]

SentItem = TypeVar("SentItem")
Result = TypeVar("Result")
Untyped = TypeVar("Untyped", Stream, BlockingStream)


class _Checked(Generic[Untyped, SentItem, Result]):
    """What typed streams of both kinds have."""

    def __init__(self, stream: Untyped, item: TypeAdapter[SentItem], result: TypeAdapter[Result]) -> None:
        self._stream: Final[Untyped] = stream
        self._item: Final[TypeAdapter[SentItem]] = item
        self._result: Final[TypeAdapter[Result]] = result

    @property
    def result(self) -> Result:
        """The result of the method. Raises RuntimeError before the items have ended."""
        return self._result.validate_python(self._stream.result)

    @property
    def id(self) -> str | None:
        """The id of a durable stream, for `client.resume`; None of another one."""
        return self._stream.id

    @property
    def position(self) -> int | None:
        """How many items of a durable stream were received, for `client.resume`; None of another one."""
        return self._stream.position

    def close(self) -> None:
        """Cancel the stream, or leave a durable one, unless it has ended. Idempotent."""
        self._stream.close()


class TypedStream(_Checked[Stream, SentItem, Result]):
    """A stream of a method, with the types of its items and of its result.

    Take the items with `async for`, inside `async with` to leave early. Raises like `client.stream`, and
    pydantic.ValidationError for an item or result of another type.
    """

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stream.__aexit__(*exception)

    if not TYPE_CHECKING:
        __enter__ = __exit__ = wrong_use("write async with")
        __iter__ = wrong_use("write async for")
        __await__ = wrong_use("read it by async for, or open it by async with")

    async def __aiter__(self) -> AsyncIterator[SentItem]:
        async for item in self._stream:
            yield self._item.validate_python(item)

    async def cancel(self) -> bool:
        """Cancel the method of a durable stream. Return whether it was running."""
        return await self._stream.cancel()


class TypedClient:
    """Base of the classes that `zcproto stubs` writes.

    A param that is `UNSET` is not sent: the server has a default.
    """

    def __init__(self, client: SessionClient) -> None:
        """Call the methods by `client`: a `zcproto.Client` or one of its sessions."""
        if not isinstance(client, SessionClient):
            raise TypeError(
                "give a client of zcproto.connect, or write this module by zcproto stubs --blocking"
            )
        self._client = client

    async def _call(
        self,
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        *,
        timeout: float | None,  # noqa: ASYNC109  it is sent
        idempotency_key: str | None,
    ) -> Result:
        answer = await self._client.call(
            method, _given(params), timeout=timeout, idempotency_key=idempotency_key
        )
        return result.validate_python(answer)

    async def _send(
        self,
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        items: SentItems,
        *,
        timeout: float | None,  # noqa: ASYNC109  it is sent
    ) -> Result:
        async with self._client.stream(method, _given(params), items=items, timeout=timeout) as stream:
            return result.validate_python(await stream.finished())

    def _stream(
        self,
        item: TypeAdapter[SentItem],
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        items: SentItems | None = None,
        *,
        timeout: float | None,
        durable: bool = False,
    ) -> TypedStream[SentItem, Result]:
        stream = self._client.stream(method, _given(params), items=items, timeout=timeout, durable=durable)
        return TypedStream(stream, item, result)


class BlockingTypedStream(_Checked[BlockingStream, SentItem, Result]):
    """A stream for programs without an event loop; otherwise like `TypedStream`."""

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.__exit__(*exception)

    def __iter__(self) -> Iterator[SentItem]:
        return map(self._item.validate_python, self._stream)

    def cancel(self) -> bool:
        """Cancel the method of a durable stream. Return whether it was running."""
        return self._stream.cancel()


class BlockingTypedClient:
    """Base of the classes that `zcproto stubs --blocking` writes; otherwise like `TypedClient`."""

    def __init__(self, client: BlockingSessionClient) -> None:
        """Call the methods by `client`: a `zcproto.BlockingClient` or one of its sessions."""
        if not isinstance(client, BlockingSessionClient):
            raise TypeError(
                "give a client of zcproto.connect_blocking, or write this module without --blocking"
            )
        self._client = client

    def _call(
        self,
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        *,
        timeout: float | None,
        idempotency_key: str | None,
    ) -> Result:
        answer = self._client.call(method, _given(params), timeout=timeout, idempotency_key=idempotency_key)
        return result.validate_python(answer)

    def _send(
        self,
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        items: Iterable[Any],
        *,
        timeout: float | None,
    ) -> Result:
        with self._client.stream(method, _given(params), items=items, timeout=timeout) as stream:
            return result.validate_python(stream.finished())

    def _stream(
        self,
        item: TypeAdapter[SentItem],
        result: TypeAdapter[Result],
        method: str,
        params: Mapping[str, Any],
        items: Iterable[Any] | None = None,
        *,
        timeout: float | None,
        durable: bool = False,
    ) -> BlockingTypedStream[SentItem, Result]:
        stream = self._client.stream(method, _given(params), items=items, timeout=timeout, durable=durable)
        return BlockingTypedStream(stream, item, result)


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not UNSET}
