"""A generator's process: `python -m zcproto.load.worker`, talking in lines of JSON.

Standard input: the share, then one command a line: connect, load, verify, close; `stop` ends the one under way.
Standard output: `{"progress": {...}}` a few times a second, `{"done": COMMAND, ...}` at the start and after each
command, with the last one the record. Keys come by standard input, never as arguments, which others can see.
When standard input ends, so does the process: its parent has what it wants, or is gone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from typing import Any, Final

from zcproto.common.event_loop import new_event_loop
from zcproto.load.generator import Generator
from zcproto.load.plan import Share

PROGRESS_PERIOD: Final = 0.2
LINE_LIMIT: Final = 256 * 1024 * 1024
"""Bytes of one line; the longest are shares with many keys and records of long runs."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which says `stop`
    # Nothing here makes cycles while it runs, and a collection would walk 10,000 connections.
    gc.disable()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())


async def serve() -> None:
    """Carry out commands until there are no more."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=LINE_LIMIT)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    try:
        share = await commands.readline()
        if share:
            await obey(Generator(Share.from_json(json.loads(share)), loop), commands)
    finally:
        pipe.close()


async def obey(generator: Generator, commands: asyncio.StreamReader) -> None:
    tell({"done": "start"})
    async with asyncio.TaskGroup() as phases:  # what goes wrong in one ends the process, visibly
        phase: asyncio.Task[None] | None = None
        while line := await commands.readline():
            command = line.decode().strip()
            if command == "stop":
                generator.stop()
            else:
                phase = phases.create_task(carry_out(generator, command))
        if phase is not None:
            phase.cancel()


async def carry_out(generator: Generator, command: str) -> None:
    """One phase, with its progress and its end told."""
    phases = {
        "connect": generator.connect,
        "load": generator.load,
        "verify": generator.verify,
        "close": generator.close,
    }
    ticker = asyncio.create_task(tell_progress(generator))
    try:
        await phases[command]()
    finally:
        ticker.cancel()
    record = generator.record
    done: dict[str, Any] = {
        "done": command,
        "ready": record.ready,
        "sessions": record.sessions,
        "requests": record.requests_sent,
    }
    if command == "close":
        done["record"] = record.as_json()
    tell({"progress": generator.progress()})
    tell(done)


async def tell_progress(generator: Generator) -> None:
    while True:
        await asyncio.sleep(PROGRESS_PERIOD)
        tell({"progress": generator.progress()})


def tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
