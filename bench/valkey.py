"""A Valkey server that can be hurt."""

from __future__ import annotations

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
_START_S: Final = 300.0
DEAD_PORT: Final = 1
"""Where nothing listens: a replica of it gets no writes."""


def require_program(name: str = VALKEY) -> None:
    """Raise ConfigError unless a program of this name is installed."""
    if not shutil.which(name):
        raise ConfigError([f"{name} is not installed; on Debian: apt install {name}"])


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
        require_program(self._program)
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
        self.command("REPLICAOF", "127.0.0.1", DEAD_PORT)

    def become_primary(self) -> None:
        self.command("REPLICAOF", "NO", "ONE")

    def command(self, *words: str | int) -> None:
        """Send a command. Raises redis.RedisError."""
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=_START_S) as client:
            client.execute_command(*words)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
