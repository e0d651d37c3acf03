"""Real Valkey and Redis servers in processes on loopback, and a proxy with faults."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

PROGRAMS = ("valkey-server", "redis-server")
"""The programs that the tests of a server run with."""

_START_S = 30.0
_UNTIL_S = 30.0


def is_installed(program: str) -> bool:
    return shutil.which(program) is not None


def needs(program: str) -> None:
    """Skip the test if this machine lacks a program."""
    if not is_installed(program):
        pytest.skip(f"{program} is not installed")


def free_port() -> int:
    """Return a free port whose port 10,000 above, the bus of a cluster, is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            with suppress(OSError, OverflowError):
                bus.bind(("127.0.0.1", port + 10_000))
                return port


class ServerProcess:
    """One server, listening on a port of 127.0.0.1, with its files in `folder`."""

    def __init__(self, program: str, folder: Path, *options: str, port: int | None = None) -> None:
        self.program = program
        self.folder = folder
        self.port = free_port() if port is None else port
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it listens and has loaded its data."""
        arguments = [self.program]
        if self.options[:1] == ("--sentinel",):
            config = self.folder / "sentinel.conf"
            config.write_text("\n".join([f"port {self.port}", "bind 127.0.0.1", *self.options[1:]]) + "\n")
            arguments += [str(config), "--sentinel"]
        else:
            ports = [] if "--tls-port" in self.options else ["--port", str(self.port)]
            arguments += ["--bind", "127.0.0.1", *ports, "--save", "", "--dir", str(self.folder)]
            arguments += ["--repl-diskless-sync-delay", "0", *self.options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + _START_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                if "--tls-port" in self.options:
                    return
                probe.sendall(b"PING\r\n")
                if not probe.recv(64).startswith(b"-LOADING"):
                    return
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"{self.program} does not start:\n{(self.folder / 'log').read_text()[-2000:]}"
                )
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the server."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Stop the process, so that the server hangs."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def command(self, *words: str | bytes | int) -> Any:
        """Send a command and return the reply. Retried if the server is closing its connections."""
        for _ in range(20):
            with suppress(redis.ConnectionError):
                return self._command(*words)
            time.sleep(0.05)
        return self._command(*words)

    def _command(self, *words: str | bytes | int) -> Any:
        connection = redis.Connection(host="127.0.0.1", port=self.port, socket_timeout=5, protocol=2)
        try:
            connection.send_command(*words)
            return connection.read_response()
        finally:
            connection.disconnect()


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


class Proxy:
    """A proxy to a server that can delay, drop or cut connections."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.delay = 0.0
        self.silent = False
        """Whether everything is dropped, as by a network that loses packets."""
        self.refuses = False
        self.accepted = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refuses:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers |= {writer, there_writer}
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._pump(source, sink))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not self.silent:
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(sink)
            sink.transport.abort()


def wait_for(condition: Callable[[], bool], within: float = _UNTIL_S) -> None:
    """Wait until a function returns True."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, f"not within {within} s"
        time.sleep(0.01)


async def until(condition: object, what: str = "", within: float = _UNTIL_S) -> float:
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
        assert loop.time() - begin < within, f"not within {within} s: {what or condition}"
        await asyncio.sleep(0.005)


def resident_memory(process: subprocess.Popen[bytes]) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
