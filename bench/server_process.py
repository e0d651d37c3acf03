"""Valkey and Redis servers, sentinels and members of clusters in processes on ports of loopback."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import redis

from zcproto.errors import ZcprotoError

_START_S: Final = 300.0


_ports: Final = iter(random.SystemRandom().sample(range(10_000, 22_000), 12_000))


def free_port() -> int:
    """Return a free port whose port 10,000 above, the bus of a cluster, is free too, another one each time.

    Both are below the ports that the system gives to sockets, so that no other program takes them while a server is
    down.
    """
    while True:
        port = next(_ports)
        with suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
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
                raise ZcprotoError(
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
        connect: Any = redis.Connection
        connection = connect(host="127.0.0.1", port=self.port, socket_timeout=_START_S, protocol=2)
        try:
            connection.send_command(*words)
            return connection.read_response()
        finally:
            connection.disconnect()
