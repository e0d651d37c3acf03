"""The items that a client sends to a method."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Items(AsyncIterator[Item], Generic[Item]):
    """The client's items: a method takes them with `async for` from a parameter annotated `Items[T]`.

        @app.method("upload")
        async def upload(name: str, chunks: Items[bytes]) -> int:
            return sum([len(chunk) async for chunk in chunks])

    The client sends only as much as the method takes. An item that is not a `T` raises InvalidArgument.
    """

    __slots__ = ()
