"""A Valkey server that can be hurt, and a link to it that can be slow or cut."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final, Self

import redis

from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.processes import uninterrupted

VALKEY: Final = "valkey-server"
_START_S: Final = 10.0
_DEAD_PORT: Final = 1


class Valkey:
    """A server on a Unix socket in a folder. With `fsync` "always" every change is on the disk when it answers."""

    def __init__(self, folder: Path, program: str = VALKEY, fsync: str = "always") -> None:
        self.socket = folder / "socket"
        self._folder = folder
        self._program = program
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def __enter__(self) -> Self:
        if shutil.which(self._program) is None:
            raise ConfigError([f"{self._program} is not installed; on Debian: apt install {self._program}"])
        self._folder.mkdir(exist_ok=True)
        try:
            with uninterrupted():
                self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it on the data in its folder, and wait until it answers."""
        self._process = subprocess.Popen(
            [
                *(self._program, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder)),
                *("--save", "", "--appendonly", "yes", "--appendfsync", self._fsync),
                *("--maxmemory-policy", "noeviction", "--logfile", str(self._folder / "log")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        end = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(redis.ConnectionError):  # it does not listen yet, or reads its file
                self.command("PING")
                return
            if self._process.poll() is not None or time.monotonic() > end:
                raise ZcprotoError(f"{self._program} does not start: see {self._folder / 'log'}")
            time.sleep(0.005)

    def kill(self) -> None:
        if self._process is not None:
            self.resume()
            self._process.kill()
            self._process.wait()
            self._process = None

    def delete_data(self) -> None:
        """Remove its data, while it does not run."""
        shutil.rmtree(self._folder / "appendonlydir")

    def hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def become_replica(self) -> None:
        """Refuse writes, as a primary that was made a replica."""
        self.command("REPLICAOF", "127.0.0.1", _DEAD_PORT)

    def become_primary(self) -> None:
        self.command("REPLICAOF", "NO", "ONE")

    def command(self, *words: str | int) -> None:
        """Send a command. Raises redis.RedisError."""
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=_START_S) as client:
            client.execute_command(*words)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Link:
    """A TCP link on loopback to the server. `delay_s` is added each way."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self.delay_s = 0.0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def restore(self) -> None:
        self._is_cut = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(self._socket)
        except OSError:  # the server does not run
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # one side is gone, and the other follows
        finally:
            self._writers.discard(sink)
            sink.transport.abort()
