"""A program with a durable method, and how a client reads its run.

The method `count` yields numbers. Those from `hold` on wait until the home has a file `go`; the file `started`
has a line for each method that was run.
"""

from __future__ import annotations

from typing import Any

import msgpack

from tests.server.helpers import Client
from zcproto.wire.frame import Kind

APP = """
import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from zcproto import App

app = App()


@app.method("pid")
def pid() -> int:
    return os.getpid()


@app.method("count", durable=True)
async def count(total: int, hold: int) -> AsyncIterator[int]:
    with open("started", "a") as file:
        print(os.getpid(), file=file)
    for number in range(total):
        while number >= hold and not Path("go").exists():
            await asyncio.sleep(0.01)
        yield number
"""


def attach(client: Client, position: int = 0, params: Any = None, *, id: str = "one") -> int:
    """Open the stream, and return its number."""
    client.stream += 1
    meta = {"credit": [1_000, 1 << 20], "resume": {"id": id, "from": position}}
    client.send(client.frame(Kind.OPEN, msgpack.packb(["count", params, meta]), stream=client.stream))
    return client.stream


def read(client: Client, count: int) -> list[Any]:
    """Return so many items."""
    found: list[Any] = []
    while len(found) < count:
        frame = client.receive()
        if frame.kind == Kind.ITEM:
            found.append(frame.value)
        else:
            assert frame.kind == Kind.ACCEPTED, frame
    return found
