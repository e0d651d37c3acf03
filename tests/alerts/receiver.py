"""Run a real HTTPS server in threads as the receiver of a webhook."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from tests.server.helpers import TIMEOUT, eventually

Answer = bytes | Callable[[ssl.SSLSocket | socket.socket, threading.Event], None]
"""The bytes of a response, or a function that handles the connection until the event is set."""


def answer(status: int, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Received(NamedTuple):
    """A received request."""

    line: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answer requests with `answers` in turn, repeating the last. Without `certificate` it speaks plain HTTP."""

    def __init__(self, certificate: tuple[Path, Path] | None, *answers: Answer) -> None:
        self.answers: list[Answer] = list(answers) or [answer(204)]
        self.received: list[Received] = []
        self.connections = 0
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._served: list[socket.socket] = []
        self.port = self._socket.getsockname()[1]
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://localhost:{self.port}/hook?team=ops"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for connection in self._served:  # wakes a sender, which the loop may be waiting for
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # wakes accept
            socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT).close()
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._socket.close()

    def until(self, count: int) -> list[Received]:
        """Wait until `count` requests have arrived."""
        eventually(lambda: len(self.received) >= count)
        return self.received

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            raw, _ = self._socket.accept()
            self.connections += 1
            self._start(lambda raw=raw: self._serve(raw))  # type: ignore[misc]

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(TIMEOUT)
        with raw, contextlib.suppress(OSError):
            connection = raw if self._context is None else self._context.wrap_socket(raw, server_side=True)
            with connection:
                self._served.append(connection)
                request = _read(connection)
                if request is None:
                    return
                self.received.append(request)
                what = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if isinstance(what, bytes):
                    connection.sendall(what)
                else:
                    what(connection, self._ended)


def _read(connection: socket.socket) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(65_536)):
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        if not (part := connection.recv(65_536)):
            return None
        body += part
    return Received(line, headers, body)


def hang(connection: socket.socket, ended: threading.Event) -> None:
    """Never answer."""
    ended.wait(TIMEOUT)


def drip(connection: socket.socket, ended: threading.Event) -> None:
    """Send an endless head, one byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while not ended.wait(0.01):
        connection.sendall(b"x")


def flood(connection: socket.socket, ended: threading.Event) -> None:
    """Send invalid responses without end."""
    while not ended.is_set():
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)


def vanish(connection: socket.socket, ended: threading.Event) -> None:
    """Close without a response."""
