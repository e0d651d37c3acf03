"""Real Valkey and Redis servers in processes on loopback, and a proxy with faults."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.server_process import ServerProcess, free_port
from tests.limits import TIMEOUT

__all__ = [
    "PROGRAMS",
    "VALKEY_FIRST",
    "ServerProcess",
    "free_port",
    "is_installed",
    "needs",
    "running",
    "until",
    "wait_for",
]

PROGRAMS = ("valkey-server", "redis-server")
"""The programs that the tests of a server run with."""

VALKEY_FIRST = (PROGRAMS[0], pytest.param(PROGRAMS[1], marks=pytest.mark.slow))
"""For tests of faults and connections. Redis has the contract of stores by default, and all else with `--all`."""


def is_installed(program: str) -> bool:
    return shutil.which(program) is not None


def needs(program: str) -> None:
    """Skip the test if this machine lacks a program."""
    if not is_installed(program):
        pytest.skip(f"{program} is not installed")


@contextmanager
def running(program: str, folder: Path, *options: str, port: int | None = None) -> Iterator[ServerProcess]:
    """Run a server during the block."""
    needs(program)
    server = ServerProcess(program, folder, *options, port=port)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a function returns True."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


async def until(condition: object, what: str = "") -> float:
    """Wait until a function or coroutine function returns True. Return the seconds it took."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while True:
        assert callable(condition)
        holds = condition()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return loop.time() - begin
        assert loop.time() - begin < TIMEOUT, f"it did not happen: {what or condition}"
        await asyncio.sleep(0.005)


def resident_memory(process: subprocess.Popen[bytes]) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
