"""Number and encode the frames that one end of a connection sends (sans-IO; zcp1.md, section 5)."""

from __future__ import annotations

from zcproto.wire.frame import encode_frame


class Outbox:
    """The frames that wait to be sent. `salt` is that of the connection, `counter` that of the next frame."""

    __slots__ = ("_frames", "_is_closed", "counter", "salt")

    def __init__(self, salt: bytes, counter: int) -> None:
        self.salt = salt
        self.counter = counter
        self._frames: list[bytes] = []
        self._is_closed = False

    def send(self, head: int, stream: int, token: bytes, body: bytes, timestamp: int) -> None:
        """Queue a frame, unless the outbox is closed."""
        if self._is_closed:
            return
        counter = self.counter
        self.counter = counter + 1
        self._frames.append(encode_frame(head, stream, timestamp, self.salt, counter, token, body))

    def close(self) -> None:
        """Queue nothing more. What is queued is still sent."""
        self._is_closed = True

    def take(self) -> bytes:
        """Return and clear what is queued."""
        data = b"".join(self._frames)
        self._frames.clear()
        return data
