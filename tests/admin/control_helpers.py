"""A client of the control socket that shares no code with zcproto/cli/control.py."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

from tests.limits import TIMEOUT


class Answered(NamedTuple):
    status: int
    head: str
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)


def connect(path: Path) -> socket.socket:
    """Connect, also for a path beyond the system's limit."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with open_folder(path.parent) as folder:
            connection.connect(f"/proc/self/fd/{folder}/{path.name}")  # it blocks while the backlog is full
    except BaseException:
        connection.close()
        raise
    connection.settimeout(TIMEOUT)
    return connection


class open_folder:  # noqa: N801 - it is used as a function
    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def exchange(path: Path, request: bytes) -> bytes:
    """Send bytes and return everything until the server closes."""
    with connect(path) as connection:
        received = b""
        try:
            connection.sendall(request)
            while part := connection.recv(65_536):
                received += part
        except ConnectionError:  # the server has refused the rest of the request
            pass
    return received


def ask(path: Path, method: str, target: str, fields: Any = None) -> Answered:
    """Send one request on a new connection. `fields` is bytes, or encoded as JSON."""
    body = b"" if fields is None else fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    request = (
        f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    head, _, rest = exchange(path, request.encode() + body).partition(b"\r\n\r\n")
    text = head.decode("ascii")
    return Answered(int(text.split()[1]), text, rest)
