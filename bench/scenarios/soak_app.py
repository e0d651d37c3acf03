"""The application of the scenario `soak_clients`, and the clock of its server, which can be set.

The folder of SOAK_FOLDER has the file `clock`, by how many nanoseconds the clock of every process is off, and the
file `runs`, in which each process notes the requests that it has run.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import AsyncIterator
from mmap import mmap
from pathlib import Path
from typing import Final

from zcproto.app.app import default_app
from zcproto.app.context import Context
from zcproto.common.clock import NS_PER_MS, system_clock
from zcproto.common.parameters import Ended

FOLDER: Final = "SOAK_FOLDER"
OFFSET: Final = struct.Struct("=q")

app = default_app()


def open_offset(path: Path) -> mmap:
    """Map the file of the clock's offset, so that all processes see a change at once."""
    with path.open("r+b") as file:
        return mmap(file.fileno(), OFFSET.size)


def step_clock(offset: mmap) -> None:
    """Let the system's clock of this process be off."""

    def stepped() -> int:
        return (time.time_ns() + int(OFFSET.unpack_from(offset)[0])) // NS_PER_MS

    system_clock.wall = stepped


if FOLDER in os.environ:
    step_clock(open_offset(Path(os.environ[FOLDER]) / "clock"))
    runs = os.open(Path(os.environ[FOLDER]) / "runs", os.O_WRONLY | os.O_APPEND)


@app.method("soak.run")
def run(name: str, number: int) -> int:
    """Note that this request has run, and return its number."""
    os.write(runs, f"{name}\n".encode())
    return number


@app.method("soak.count")
async def count(first: int, items: int) -> AsyncIterator[int | Ended[int]]:
    """Send consecutive numbers, and return how many."""
    for number in range(first, first + items):
        yield number
    yield Ended(items)


@app.method("soak.ask")
async def ask(context: Context, number: int) -> object:
    """Call the caller's method `soak.answer`, and return its answer."""
    return await context.client.call("soak.answer", number=number)
