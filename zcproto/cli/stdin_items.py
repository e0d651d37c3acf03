"""The items that `zcproto call` sends: lines of JSON on standard input, read as the method wants them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any

import click

from zcproto.cli.json_values import parse_json


async def stdin_items() -> AsyncGenerator[Any, None]:
    """Yield the JSON value of each line. Raises click.ClickException for another line."""
    number = 0
    async for line in _lines(sys.stdin.fileno()):
        number += 1
        if line.strip():
            try:
                yield parse_json(line)
            except click.UsageError as error:
                raise click.ClickException(f"line {number} of standard input: {error.message}") from error


async def _lines(descriptor: int) -> AsyncGenerator[str, None]:
    """Yield lines as they come, reading one ahead.

    They are read in a daemon thread: Ctrl-C does not wait for the next line. Not by the event loop, which would
    make the terminal non-blocking for other programs, and not from `sys.stdin`, whose lock the thread would hold
    when the interpreter ends.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[str | None] = asyncio.Queue()
    wanted = threading.Semaphore(0)

    def read() -> None:
        with (
            contextlib.suppress(RuntimeError),  # the loop was closed
            open(descriptor, encoding="utf-8", errors="replace", closefd=False) as lines,
        ):
            for line in lines:
                loop.call_soon_threadsafe(found.put_nowait, line)
                wanted.acquire()
            loop.call_soon_threadsafe(found.put_nowait, None)

    threading.Thread(target=read, name="standard input", daemon=True).start()
    while (line := await found.get()) is not None:
        wanted.release()
        yield line
