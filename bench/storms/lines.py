"""A helper's process: commands in lines of JSON on its standard input, an answer to each on its standard output.

Keys come by standard input, never as arguments, which others can see. When standard input ends, so does the
process: its parent has what it wants, or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Self

from zcproto.common.event_loop import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.processes import module_command, module_environment, on_processor
from zcproto.load.worker import LINE_LIMIT

END_TIMEOUT: Final = 5.0
"""Seconds that a process has to end."""

Answer = dict[str, Any]
Commands = Mapping[str, Callable[..., Awaitable[Answer]]]


class Helper:
    """The process, as its parent sees it: an async context manager that leaves none behind."""

    def __init__(self, module: str, share: Mapping[str, Any]) -> None:
        self._module = module
        self._share = share
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        with on_processor(1):
            self._process = await asyncio.create_subprocess_exec(
                *module_command(self._module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=module_environment(),
                limit=LINE_LIMIT,
                start_new_session=True,  # Ctrl-C is the parent's
            )
        self._say(dict(self._share))
        self._reader = asyncio.create_task(self._read(self._process))
        return self

    async def __aexit__(self, *error: object) -> None:
        process, reader = self._process, self._reader
        assert process is not None
        assert process.stdin is not None
        assert reader is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader

    async def ask(self, command: str, **params: Any) -> Answer:
        """Have one command carried out; its answer. Raises ZcprotoError if the process dies."""
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        self._say({"number": number, "do": command, **params})
        assert self._reader is not None
        if self._reader.done():
            self._fail_all()
        return await answer

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has just died, which the reader tells
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message: Answer = json.loads(line)
            answer = self._pending.pop(message.pop("number"), None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        self._fail_all()

    def _fail_all(self) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(ZcprotoError(f"a helper's process has ended by itself: {self._module}"))


def run_helper(begin: Callable[[Answer], Commands], niceness: int = 0) -> None:
    """The program of a helper: `begin` is called in the loop with the share, and gives its commands."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(niceness)
    gc.disable()  # nothing here makes cycles that matter, and a collection would walk 10,000 connections
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_obey(begin))


async def _obey(begin: Callable[[Answer], Commands]) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=LINE_LIMIT)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    try:
        share = await lines.readline()
        if not share:
            return
        commands = begin(json.loads(share))
        async with asyncio.TaskGroup() as running:  # what goes wrong in one ends the process, visibly
            tasks = []
            while line := await lines.readline():
                tasks.append(running.create_task(_carry_out(commands, json.loads(line))))
            for task in tasks:
                task.cancel()
    finally:
        pipe.close()


async def _carry_out(commands: Commands, message: Answer) -> None:
    number, command = message.pop("number"), message.pop("do")
    answer = await commands[command](**message)
    sys.stdout.write(json.dumps({"number": number, **answer}) + "\n")
    sys.stdout.flush()
