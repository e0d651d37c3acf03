"""The application of the scenario `attacks`: a method that blocks, and methods that take items."""

from __future__ import annotations

import asyncio
import time

from zcproto.app.app import Items, default_app

app = default_app()


@app.method("attack.block", thread=True)
def block(seconds: float) -> float:
    """Block the thread for so long."""
    time.sleep(seconds)
    return seconds


@app.method("attack.upload")
async def upload(chunks: Items[bytes]) -> int:
    """Return the bytes of all items."""
    return sum([len(chunk) async for chunk in chunks])


@app.method("attack.hoard")
async def hoard(chunks: Items[bytes]) -> None:
    """Take one item, and none of those that the client may send then."""
    await anext(chunks)
    await asyncio.Event().wait()
