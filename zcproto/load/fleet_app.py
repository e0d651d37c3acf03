"""The application of a fleet (fleet.py): durable runs that leave a trace, and ask for approvals."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from functools import cache
from typing import Any, Final

from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.errors import CallError

STARTED_VARIABLE: Final = "ZCPROTO_FLEET_STARTED"
"""The file to which all processes append a line for each method that they start: run and process id."""

ANSWER_S: Final = 120.0
EXPIRY_S: Final = 1.0

app = App()


@cache
def _started() -> int:
    return os.open(os.environ[STARTED_VARIABLE], os.O_WRONLY | os.O_APPEND)


@app.method("work", durable=True)
async def work(
    context: Context, run: str, total: int, pause: float, asks: list[int], expires: list[int]
) -> AsyncIterator[Any]:
    """Yield positions, each after a random pause of `pause` seconds on average.

    Before the positions in `asks` and `expires` the client is asked. The item is then the position and the answer,
    or the name of the error.
    """
    os.write(_started(), f"{run} {os.getpid()}\n".encode())  # one write is appended whole
    for position in range(total):
        await asyncio.sleep(random.expovariate(1 / pause))
        if position in asks or position in expires:
            is_silent = position in expires
            try:
                answer = await context.client.call(
                    "approve",
                    run=run,
                    position=position,
                    silent=is_silent,
                    timeout=EXPIRY_S if is_silent else ANSWER_S,
                    pending=True,
                )
            except CallError as error:
                answer = error.code.name
            yield [position, answer]
        else:
            yield position


@app.method("process")
def process() -> int:
    """Return the id of the process that serves this connection."""
    return os.getpid()
