"""The parent's side of the generator processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from zcproto.errors import ZcprotoError
from zcproto.load.plan import Share
from zcproto.load.processes import module_command, module_environment
from zcproto.load.record import Record, merge_records
from zcproto.load.worker import LINE_LIMIT

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
