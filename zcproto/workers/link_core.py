"""The messages between processes of one server: bytes in, messages out, and which calls wait for an answer.

Decides: what a message is, which ones end a connection, and when an answer is late.

Rules:
- A message is its length in four bytes, and a msgpack list of its kind and fields. One of more than `max_message`
  bytes, or of another shape, ends the connection.
- HELLO comes first and has the version. A peer that is older than MIN_VERSION is refused.
- Time is counted in ticks of the caller's event loop: one that was blocked reads what has arrived before a call is
  late.

It must not know: sockets, what a topic is for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

import msgpack

from zcproto.errors import ZcprotoError

VERSION: Final = 1
MIN_VERSION: Final = 1
"""The oldest version of a peer: during a rolling restart, two versions of the package talk to each other."""

MAX_MESSAGE: Final = 64 << 20
TICKS: Final = 4
"""Ticks within the silence of a client."""

HELLO, CALL, ANSWER, ERROR, NOTICE, PING, PONG = range(7)

_LENGTH: Final = struct.Struct("!I")
_SHAPES: Final[dict[int, tuple[type, ...]]] = {
    HELLO: (int, str, dict),  # version, name, facts
    CALL: (int, str, list),  # number, topic, arguments
    ANSWER: (int, object),  # number, result
    ERROR: (int, int, str, dict),  # number, code, message, details
    NOTICE: (str, list),  # topic, arguments
    PING: (),
    PONG: (),
}

Message = tuple[Any, ...]
"""One of HELLO to PONG, and its fields as in _SHAPES."""


class LinkLost(ZcprotoError):
    """A call got no answer. It may have been executed. `reason` is for the operator's log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LinkViolation(ZcprotoError):
    """The peer sent something that is not a message of this version."""


def pack(*message: Any) -> bytes:
    """Return the bytes of a message. Raises TypeError, ValueError or OverflowError for what msgpack has not."""
    body: bytes = msgpack.packb(message, unicode_errors="surrogatepass")
    return _LENGTH.pack(len(body)) + body


class LinkCore:
    """One end of a connection: bytes in, messages out. Call `receive`, and `tick` while `is_due`.

    `waiting` has the calls that wait for an answer: whatever the caller has stored, by number.
    """

    def __init__(self, *, max_message: int = MAX_MESSAGE, silence: int | None = None) -> None:
        self._max_message = max_message
        self._silence = silence
        self._buffer = bytearray()
        self._number = 0
        self._ticks = 0
        self._heard_at = 0
        self._is_pinged = False
        self._waiting: dict[int, tuple[Any, int]] = {}
        self.is_greeted = False

    @property
    def waiting(self) -> int:
        """The number of calls that wait for an answer."""
        return len(self._waiting)

    @property
    def is_due(self) -> bool:
        """Whether the peer is to send something, so that time is counted."""
        return bool(self._waiting) or self._is_pinged or not self.is_greeted

    def receive(self, data: bytes) -> list[Message]:
        """Return the messages that are complete. Raises LinkViolation, after which the connection is unusable."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start, size = 0, len(buffer)
        while size - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._max_message:
                raise LinkViolation(f"a message of {length} bytes is over the limit of {self._max_message}")
            end = start + _LENGTH.size + length
            if end > size:
                break
            messages.append(self._read(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        self._heard_at = self._ticks
        return messages

    def _read(self, body: bytearray) -> Message:
        try:
            message = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise LinkViolation(f"a message cannot be read: {type(error).__name__}") from error
        kind = message[0] if isinstance(message, list) and message else None
        shape = _SHAPES.get(kind) if type(kind) is int else None
        if shape is None or len(message) != len(shape) + 1 or not all(map(isinstance, message[1:], shape)):
            raise LinkViolation("a message has another shape than those of this version")
        if kind == PONG:
            self._is_pinged = False
        if self.is_greeted is (kind == HELLO):
            raise LinkViolation("HELLO is the first message, once")
        if kind == HELLO:
            if message[1] < MIN_VERSION:
                raise LinkViolation(
                    f"the peer has version {message[1]} of the link, this process needs {MIN_VERSION} or later"
                )
            self.is_greeted = True
        return tuple(message)

    def call(self, topic: str, arguments: Iterable[Any], waiting: Any, ticks: int) -> bytes:
        """Return the bytes of a call, for which `waiting` waits for so many ticks. Raises as `pack`."""
        number = self._number + 1
        data = self.pack(CALL, number, topic, arguments)
        self._number = number
        self._waiting[number] = waiting, self._ticks + ticks
        return data

    def pack(self, *message: Any) -> bytes:
        """Return the bytes of a message as `pack`. Raises ValueError if it is too large, too."""
        data = pack(*message)
        if len(data) - _LENGTH.size > self._max_message:
            raise ValueError(f"a message of {len(data)} bytes is over the limit of {self._max_message}")
        return data

    def ping(self) -> bytes:
        """Return the bytes of a ping; none if the answer to the last one is due."""
        if self._is_pinged:
            return b""
        self._is_pinged = True
        return pack(PING)

    def take(self, number: int) -> Any:
        """Return who waits for a call, once; None if it does not wait any more."""
        return self._waiting.pop(number, (None, 0))[0]

    def take_all(self) -> list[Any]:
        """Return who waits for all calls."""
        return [self.take(number) for number in list(self._waiting)]

    def tick(self) -> list[Any]:
        """Count time. Return those whose calls are late. Raises LinkLost if the peer was silent for too long."""
        self._ticks += 1
        if self._silence is not None and self._ticks - self._heard_at > self._silence:
            raise LinkLost("the other process does not answer")
        return [self.take(number) for number, (_, due) in list(self._waiting.items()) if due <= self._ticks]

    def rest(self) -> None:
        """Count no silence for the time until the next tick: nothing was due."""
        self._heard_at = self._ticks
