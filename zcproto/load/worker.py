"""The processes of generators, `python -m zcproto.load.worker`, and the pool that controls them by lines of JSON.

Standard input: the share of the plan, then one command per line: connect, load, verify, close. `stop` ends the
current command. Keys are sent here and not as arguments, which other users can see.

Standard output: `{"progress": {...}}` several times per second, and `{"done": COMMAND, ...}` at the start and after
each command, with the record after the last one.

A process exits when standard input ends, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.generator import Generator
from zcproto.load.plan import Share
from zcproto.load.processes import module_command, module_environment
from zcproto.load.record import Record, merge_records

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


END_TIMEOUT: Final = 5.0
"""Seconds for a process to exit after its last command."""

Progress = Callable[[dict[str, int]], None]


class WorkerPool:
    """All generator processes of a run, as an async context manager that ends them."""

    def __init__(self, shares: Sequence[Share], on_progress: Progress) -> None:
        self._shares = shares
        self._on_progress = on_progress
        self._processes: list[asyncio.subprocess.Process] = []
        self._progress: list[dict[str, int]] = [{} for _ in shares]

    async def __aenter__(self) -> Self:
        try:
            for share in self._shares:
                process = await _start()
                self._processes.append(process)
                self._send(process, json.dumps(share.as_json()))
            await self._all_done("start")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._end()

    async def run(self, command: str) -> list[dict[str, Any]]:
        """Execute a command in all processes and return their reports. Raises ZcprotoError if one exits."""
        for process in self._processes:
            self._send(process, command)
        return await self._all_done(command)

    def stop(self) -> None:
        """End the current command early, so that `run` returns."""
        for process in self._processes:
            with contextlib.suppress(OSError):  # it has exited, which `run` reports
                self._send(process, "stop")

    async def close(self) -> Record:
        """Close all sessions and connections and return the sum of the records."""
        return merge_records(Record.from_json(each["record"]) for each in await self.run("close"))

    async def _all_done(self, command: str) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._done(number, command) for number in range(len(self._processes))))

    async def _done(self, number: int, command: str) -> dict[str, Any]:
        process = self._processes[number]
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if message.get("done") == command:
                return message
            self._progress[number] = message["progress"]
            keys = self._progress[number].keys()
            self._on_progress({key: sum(each.get(key, 0) for each in self._progress) for key in keys})
        code = await process.wait()
        raise ZcprotoError(f"a generator process exited with code {code}; its error is above")

    def _send(self, process: asyncio.subprocess.Process, line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")

    async def _end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                async with asyncio.timeout(END_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *module_command("zcproto.load.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=module_environment(),
        limit=LINE_LIMIT,
    )


if __name__ == "__main__":
    main()
