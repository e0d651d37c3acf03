"""A stream of bytes, cut into frames.

Total on any bytes: the next frame, None for 'more is needed', or a ProtocolError. A header is judged as
soon as it is there, so the body of a refused frame is never buffered. However the bytes are cut into
pieces, the frames are the same, and the work stays linear in the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from zcproto.wire.frame import (
    HEADER,
    HEADER_SIZE,
    LENGTH_SIZE,
    MIN_LENGTH,
    REQUEST,
    RESPONSE,
    RawFrame,
    RawHeader,
    Side,
    check_head,
    check_length,
)

_unpack_header = HEADER.unpack_from


class FrameDecoder:
    """Feed it what arrives, then take frames until there is none.

    `limit` is the largest `length` accepted, in bytes. It may be changed at any time and holds from the
    next frame on; a frame whose length was accepted before may still come. After a ProtocolError the decoder
    must not be used again: there is no resynchronising.
    """

    __slots__ = ("_at", "_data", "_missing", "_partial", "_receiver", "_spared", "_usual", "limit")

    def __init__(self, receiver: Side, limit: int) -> None:
        self.limit = limit
        self._receiver = receiver
        self._usual = REQUEST if receiver is Side.SERVER else RESPONSE  # judged by one comparison
        self._data = b""
        self._at = 0
        self._partial: bytearray | None = None  # the beginning of a frame that is not complete yet
        self._missing = 0  # bytes that `_partial` needs before looking at it again can help
        self._spared: bytes | None = None  # begins with a frame accepted before the limit became smaller

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._data) - self._at if self._partial is None else len(self._partial)

    def judge_one(self, data: bytes) -> RawHeader | None:
        """The header of the frame that these bytes are, if they are just one of the usual kind and nothing came
        before it; all behind the header is its body.

        None: `feed` them. Most reads are one frame, and this is a third of what `frames` takes for it.
        """
        if self._partial is None and len(data) >= HEADER_SIZE:
            header = _unpack_header(data)
            length = header[0]
            fits = LENGTH_SIZE + length == len(data) and length <= self.limit
            if fits and header[1] == self._usual and header[2]:
                return header
        return None

    def feed(self, data: bytes) -> None:
        """Take in bytes. All frames of the bytes before must have been taken."""
        partial = self._partial
        if partial is None:
            self._data = data
            self._at = 0
            return
        partial += data
        self._missing -= len(data)
        if self._missing <= 0:
            self._data = bytes(partial)
            self._at = 0
            self._partial = None
            was_judged = len(partial) - len(data) >= LENGTH_SIZE
            if was_judged and int.from_bytes(partial[:LENGTH_SIZE], "big") > self.limit:
                self._spared = self._data

    def next_frame(self) -> RawFrame | None:
        """The next complete frame, or None if more bytes are needed. Raises as `frames` does."""
        return None if self._partial is not None else next(self.frames(), None)

    def frames(self) -> Iterator[RawFrame]:
        """The complete frames of what was fed, one after the other; `limit` is asked anew for each.

        Raises ProtocolError for a header that no frame may have, before its body arrives.
        """
        data = self._data
        at = self._at
        size = len(data)
        usual = self._usual
        while size - at >= HEADER_SIZE:
            length, head, stream, timestamp, salt, counter, token = _unpack_header(data, at)
            if not MIN_LENGTH <= length <= self.limit:
                if at or data is not self._spared:
                    check_length(length, self.limit)
                self._spared = None
            if head != usual or not stream:
                check_head(head, stream, self._receiver)
            end = at + LENGTH_SIZE + length
            if end > size:
                self._keep(at, end - size)
                return
            self._at = end
            yield length, head, stream, timestamp, salt, counter, token, data[at + HEADER_SIZE : end]
            at = end
        if size > at:
            self._keep_header(at, size - at)
        else:
            self._data = b""  # else each idle connection would hold its last read, which may be a large one
            self._at = 0

    def _keep_header(self, at: int, available: int) -> None:
        if available >= LENGTH_SIZE:
            check_length(int.from_bytes(self._data[at : at + LENGTH_SIZE], "big"), self.limit)
            self._keep(at, HEADER_SIZE - available)
        else:
            self._keep(at, LENGTH_SIZE - available)

    def _keep(self, at: int, missing: int) -> None:
        # A bytearray grows in place: a frame that comes byte by byte costs linear time and no list of pieces.
        self._partial = bytearray(memoryview(self._data)[at:])
        self._missing = missing
        self._data = b""
        self._at = 0
