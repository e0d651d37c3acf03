"""Messages between the supervisor and one of its processes: lines of JSON over a pair of sockets; errors in them.

Rules:
- No call waits. A peer that does not read until the buffer of the socket is full counts as gone.
- A message has at most MAX_MESSAGE bytes. A peer that breaks a rule counts as gone.

It must not know: what the messages mean, but for `failed`, the error that has ended a process.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from typing import Any, Final, NamedTuple, Self

from zcproto.errors import CertificateError, ConfigError, LifespanError, ZcprotoError

MAX_MESSAGE: Final = 65_536
"""Bytes of a message; the longest ones list the faults of a configuration."""

_CHUNK: Final = 65_536


class Message(NamedTuple):
    """A message: its name, and values of JSON."""

    name: str
    values: dict[str, Any]


class Channel:
    """One end. Both ends are closed when their processes end, so that each notices the end of the other."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._received = bytearray()

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return the two ends of a new channel."""
        one, other = socket.socketpair()
        return cls(one), cls(other)

    def fileno(self) -> int:
        return self._socket.fileno()

    def end_with_peer(self) -> None:
        """Let the system end this process, whatever it does and also after `exec`, when the other end is closed.

        The signal is SIGIO, which a message of the peer causes as well.
        """
        fcntl.fcntl(self._socket, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._socket, fcntl.F_SETFL, fcntl.fcntl(self._socket, fcntl.F_GETFL) | os.O_ASYNC)

    def outlive_peer(self) -> None:
        """Undo `end_with_peer`: from now on this process reads the channel."""
        fcntl.fcntl(self._socket, fcntl.F_SETFL, fcntl.fcntl(self._socket, fcntl.F_GETFL) & ~os.O_ASYNC)

    def send(self, name: str, **values: Any) -> bool:
        """Send a message. Return False if the peer is gone."""
        text = json.dumps([name, values], ensure_ascii=False, separators=(",", ":"))
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > MAX_MESSAGE:
            raise ValueError(f"the message {name} has {len(line)} bytes; {MAX_MESSAGE} are allowed")
        try:
            return self._socket.send(line, socket.MSG_DONTWAIT) == len(line)
        except OSError:  # the peer has ended, or does not read
            return False

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; None if the peer is gone."""
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if len(rest) >= MAX_MESSAGE:
            return None
        try:
            return [Message(*_checked(json.loads(line))) for line in lines]
        except (ValueError, RecursionError):
            return None

    def close(self) -> None:
        self._socket.close()


def _checked(value: object) -> tuple[str, dict[str, Any]]:
    match value:
        case [str(name), dict(values)]:
            return name, values
    raise ValueError("a message is a name and an object")


MAX_FAULTS: Final = 20
MAX_FAULT: Final = 500
"""Characters of a fault of the configuration: with six bytes for each, all of them fit into a message."""


class ChildFailed(ZcprotoError):
    """A process of the server failed by an error of its own that has no message for the operator, or was ended."""


_ERRORS: Final = {"certificate": CertificateError, "lifespan": LifespanError, "process": ChildFailed}
"""Errors with one sentence for the operator, by the `kind` of the message `failed`."""


def failure_of(error: BaseException) -> dict[str, Any]:
    """Return the values of the message `failed`, of which `failure_from` makes the error again."""
    if isinstance(error, ConfigError):
        return {"kind": "config", "text": [fault[:MAX_FAULT] for fault in error.faults[:MAX_FAULTS]]}
    for kind, error_type in _ERRORS.items():
        if isinstance(error, error_type):
            return {"kind": kind, "text": [str(error)[:4000]]}
    return {"kind": "other", "text": [type(error).__name__]}


def failure_from(process: str, values: dict[str, Any]) -> ZcprotoError:
    """Return the error that a process has reported."""
    kind, text = values.get("kind"), values.get("text")
    lines = [str(each) for each in text] if isinstance(text, list) and text else ["(no text)"]
    if kind == "config":
        return ConfigError(lines)
    if kind in _ERRORS:
        return _ERRORS[kind](lines[0])
    return ChildFailed(
        f"the process {process} raised {lines[0]}; the log has the traceback under server.fault"
    )
