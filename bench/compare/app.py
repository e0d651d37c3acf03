"""The compared methods: the same echo, plain and async, and as the items of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from zcproto.app.app import App

app = App()


@app.method("echo")
def echo(**params: Any) -> dict[str, Any]:
    """Return the params."""
    return params


@app.method("echo_async")
async def echo_async(**params: Any) -> dict[str, Any]:
    """Return the params, from a coroutine that does not wait."""
    return params


@app.method("echo_items")
async def echo_items(n: int, **params: Any) -> AsyncIterator[dict[str, Any]]:
    """Send the params `n` times."""
    for _ in range(n):
        yield params
