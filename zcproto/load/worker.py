"""The process of a generator: `python -m zcproto.load.worker`, controlled by lines of JSON.

Standard input: the share of the plan, then one command per line: connect, load, verify, close. `stop` ends the
current command. Keys are sent here and not as arguments, which other users can see.

Standard output: `{"progress": {...}}` several times per second, and `{"done": COMMAND, ...}` at the start and after
each command, with the record after the last one.

The process exits when standard input ends, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from typing import Any, Final

from zcproto.common.process import new_event_loop
from zcproto.load.generator import Generator
from zcproto.load.plan import Share

PROGRESS_PERIOD: Final = 0.2
LINE_LIMIT: Final = 256 * 1024 * 1024
"""Maximum bytes of a line; the longest are shares with many keys and records of long runs."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sends `stop`
    # No reference cycles are created while it runs, and a collection would visit 10,000 connections.
    gc.disable()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())


async def serve() -> None:
    """Execute commands until standard input ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=LINE_LIMIT)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    try:
        share = await commands.readline()
        if share:
            await execute_all(Generator(Share.from_json(json.loads(share)), loop), commands)
    finally:
        pipe.close()


async def execute_all(generator: Generator, commands: asyncio.StreamReader) -> None:
    report({"done": "start"})
    async with asyncio.TaskGroup() as phases:  # an exception in a phase ends the process
        phase: asyncio.Task[None] | None = None
        while line := await commands.readline():
            command = line.decode().strip()
            if command == "stop":
                generator.stop()
            else:
                phase = phases.create_task(execute(generator, command))
        if phase is not None:
            phase.cancel()


async def execute(generator: Generator, command: str) -> None:
    """Run one phase and report its progress and its end."""
    phases = {
        "connect": generator.connect,
        "load": generator.load,
        "verify": generator.verify,
        "close": generator.close,
    }
    ticker = asyncio.create_task(report_progress(generator))
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
    report({"progress": generator.progress()})
    report(done)


async def report_progress(generator: Generator) -> None:
    while True:
        await asyncio.sleep(PROGRESS_PERIOD)
        report({"progress": generator.progress()})


def report(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
