"""An object in a process of its own, whose coroutine methods its parent calls.

Clients that are measured, or that load a server hard, need a process of their own. Arguments and results travel
by a socket pair as pickles, keys among them, which no other process can read. When the parent ends or closes
its side, the process ends.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from bench.stage import CLIENT_CPU, bench_environment
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.processes import module_command, on_processor

END_S: Final = 5.0
"""Seconds that a process has to end before it is killed."""


class Helper:
    """The process, as its parent sees it: an async context manager."""

    constants: ClassVar[dict[str, Any]] = {}
    """Values of constants in the process, by their dotted names. Tests replace limits that are short."""

    def __init__(
        self, factory: type, *arguments: Any, niceness: int = 0, processor: int | None = CLIENT_CPU
    ) -> None:
        """`factory(*arguments)` is called in the process, in its event loop.

        The process is bound to one processor, unless `processor` is None.
        """
        self._processor = processor
        self._start = (factory.__module__, factory.__name__, arguments, niceness, self.constants)
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Self:
        parent, child = socket.socketpair()
        with child, nullcontext() if self._processor is None else on_processor(self._processor):
            self._process = subprocess.Popen(  # noqa: ASYNC220 - starting it takes a millisecond
                module_command(__name__, str(child.fileno())),
                pass_fds=[child.fileno()],
                env=bench_environment(),
                start_new_session=True,  # Ctrl-C is for the parent
            )
        self._pipe = Connection(parent.detach())
        self._pipe.send(self._start)
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)
        # uvloop made it non-blocking; a large message comes in pieces.
        os.set_blocking(self._pipe.fileno(), True)
        return self

    async def __aexit__(self, *error: object) -> None:
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        try:
            await asyncio.to_thread(self._process.wait, END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._fail_all()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self._process.send_signal(number)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object. Raises ZcprotoError if the process dies."""
        number = next(self._numbers)
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send((number, method, arguments))
        except OSError:
            self._fail_all()
        return await answer

    def _receive(self) -> None:
        try:
            number, result = self._pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._fail_all()
            return
        answer = self._pending.pop(number)
        if not answer.done():
            answer.set_result(result)

    def _fail_all(self) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(ZcprotoError(f"the process of {self._start[1]} ended unexpectedly"))


async def _serve(pipe: Connection, factory: type, arguments: tuple[Any, ...]) -> None:
    """Carry out calls, several at once, until the parent closes its side. An error ends the process."""
    made, loop, closed = factory(*arguments), asyncio.get_running_loop(), asyncio.Event()

    async def carry_out(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        pipe.send((number, await getattr(made, method)(*arguments)))

    async with asyncio.TaskGroup() as running:

        def receive() -> None:
            try:
                call = pipe.recv()
            except (EOFError, OSError):
                loop.remove_reader(pipe.fileno())
                closed.set()
                return
            tasks.append(running.create_task(carry_out(*call)))

        tasks: list[asyncio.Task[None]] = []
        loop.add_reader(pipe.fileno(), receive)
        os.set_blocking(pipe.fileno(), True)
        await closed.wait()
        for task in tasks:
            task.cancel()


def _lower_priority(niceness: int) -> None:
    """Lower the priority of this process and, where Linux schedules sessions as groups, of its session."""
    os.nice(niceness)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(os.nice(0)))


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(descriptor)
    module, name, arguments, niceness, constants = pipe.recv()
    for constant, value in constants.items():
        holder, _, attribute = constant.rpartition(".")
        setattr(importlib.import_module(holder), attribute, value)
    _lower_priority(niceness)
    gc.disable()  # nothing here makes cycles that matter, and a collection would walk 10,000 connections
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(pipe, getattr(importlib.import_module(module), name), arguments))


if __name__ == "__main__":
    main(int(sys.argv[1]))
