"""Keep the frames that one end of a connection sends, and number them (sans-IO; zcp1.md, section 5)."""

from __future__ import annotations

from zcproto.wire.frame import UnnumberedFrame, encode_frames


class _Closed(list[UnnumberedFrame]):
    """What is queued when an outbox is closed: no frame is added."""

    def append(self, frame: UnnumberedFrame) -> None:
        """Drop a frame."""


class Outbox:
    """The frames that wait to be sent. `salt` is that of the connection, `counter` that of the first of them.

    A frame may also be appended to `frames` directly. The list is another one once the outbox was closed.
    """

    __slots__ = ("counter", "frames", "salt")

    def __init__(self, salt: bytes, counter: int) -> None:
        self.salt = salt
        self.counter = counter
        self.frames: list[UnnumberedFrame] = []

    def send(self, head: int, stream: int, token: bytes, body: bytes, timestamp: int) -> None:
        """Queue a frame. It is not sent if the outbox is closed."""
        self.frames.append((head, stream, timestamp, token, body))

    def close(self) -> None:
        """Send what is queued, and nothing more."""
        self.frames = _Closed(self.frames)

    def take(self) -> bytes:
        """Return and clear what is queued."""
        frames = self.frames
        data = encode_frames(frames, self.salt, self.counter)
        self.counter += len(frames)
        frames.clear()
        return data
