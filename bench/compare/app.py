"""The compared methods: the same echo, plain and async."""

from __future__ import annotations

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
