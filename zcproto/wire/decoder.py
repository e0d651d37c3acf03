"""Split a byte stream into frames.

Every input gives a frame, None ("more bytes needed") or a ProtocolError. A header is validated as soon as it is
complete, so the body of a refused frame is never buffered. The frames do not depend on how the bytes were split,
and the work is linear in the number of bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from zcproto.wire.frame import (
    ALLOWED,
    HEADER,
    HEADER_SIZE,
    LENGTH_SIZE,
    MIN_LENGTH,
    REQUEST,
    RESPONSE,
    RawFrame,
    Side,
    check_head,
    check_length,
)

LARGE: Final = 131_072
"""Size of a frame, in bytes, from which an incomplete one is kept outside the heap."""

MAX_SPARE: Final = 4 << 20
"""The largest mapping kept for the next large frame, in bytes."""

_unpack_header = HEADER.unpack_from
_spare: list[mmap.mmap] = []  # at most one for each thread


def _take_buffer(size: int) -> mmap.mmap:
    """Return separate memory for a large frame, of at least `size` bytes.

    A buffer that grows on the heap is copied many times and leaves gaps that do not return to the system. A mapping
    takes pages as bytes arrive, and returns all of them when it is released. The last one is kept: pages that the
    kernel has to clear cost more than all that is done with the bytes.
    """
    try:
        spare = _spare.pop()
    except IndexError:
        pass
    else:
        if len(spare) >= size:
            return spare
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        buffer.madvise(mmap.MADV_NOHUGEPAGE)  # otherwise the first byte may take 2 MiB
    return buffer


def _return_buffer(buffer: mmap.mmap) -> None:
    if not _spare and len(buffer) <= MAX_SPARE:
        buffer.seek(0)
        _spare.append(buffer)


class FrameDecoder:
    """Decode frames from a byte stream: `feed` received bytes, then read frames until None.

    `limit` is the largest accepted `length`, in bytes. A new value applies from the next frame on; a frame whose
    length was already accepted is still decoded. `accepted` is what the peer may send. Do not use the decoder after
    a ProtocolError: the stream cannot be resynchronised.
    """

    __slots__ = (
        "_accepted_before",
        "_at",
        "_common",
        "_data",
        "_filled",
        "_header",
        "_missing",
        "_whole",
        "accepted",
        "limit",
        "partial",
    )

    def __init__(self, receiver: Side, limit: int) -> None:
        self.limit = limit
        self.accepted = ALLOWED[receiver]
        self._common = (
            REQUEST if receiver is Side.SERVER else RESPONSE
        )  # the common kind costs one comparison
        self._data = b""
        self._at = 0
        self.partial: bytearray | mmap.mmap | None = None  # an incomplete frame
        self._filled = 0  # bytes of it that have arrived
        self._missing = 0  # bytes that `partial` needs before it is worth parsing again
        self._header: tuple[int, int, int, int, bytes, int, bytes] | None = None  # of the incomplete frame
        # Bytes that begin with a frame accepted under an earlier, larger limit.
        self._accepted_before: bytes | None = None
        self._whole: RawFrame | None = None  # the frame that the last bytes completed

    @property
    def buffered(self) -> int:
        """Return the number of bytes held of an incomplete frame."""
        return len(self._data) - self._at if self.partial is None else self._filled

    @property
    def expected(self) -> int:
        """Return the number of bytes of the incomplete frame, as far as its header has arrived; 0 without one."""
        return 0 if self.partial is None else self._filled + self._missing

    def feed(self, data: bytes) -> None:
        """Add received bytes. All frames of the previous bytes must have been read."""
        partial = self.partial
        if partial is None:
            self._data = data
            self._at = 0
            return
        filled, missing = self._filled, self._missing
        part, rest = data[:missing], data[missing:]
        if isinstance(partial, bytearray):
            partial += part
        else:
            partial.write(part)
        self._filled = filled + len(part)
        self._missing = missing - len(part)
        if self._missing:
            return
        self.partial = None
        self._at = 0
        if self._header is None:
            self._data = bytes(partial) + rest
            if filled >= LENGTH_SIZE and int.from_bytes(partial[:LENGTH_SIZE], "big") > self.limit:
                self._accepted_before = self._data
            return
        with memoryview(partial) as view:
            self._whole = (*self._header, bytes(view[HEADER_SIZE : self._filled]))
        if not isinstance(partial, bytearray):
            _return_buffer(partial)
        self._header = None
        self._data = rest

    def next_frame(self) -> RawFrame | None:
        """Return the next complete frame, or None if more bytes are needed. Raises as `frames` does."""
        return None if self.partial is not None else next(self.frames(), None)

    def frames(self) -> Iterator[RawFrame]:
        """Yield the complete frames in order; `limit` is read again for each.

        Raises:
            ProtocolError: an invalid header, before its body arrives.
        """
        if self._whole is not None:
            whole, self._whole = self._whole, None
            yield whole
        data = self._data
        at = self._at
        size = len(data)
        common = self._common
        while size - at >= HEADER_SIZE:
            length, head, stream, timestamp, salt, counter, token = _unpack_header(data, at)
            if not MIN_LENGTH <= length <= self.limit:
                if at or data is not self._accepted_before:
                    check_length(length, self.limit)
                self._accepted_before = None
            if head != common or not stream:
                check_head(head, stream, length, self.accepted)
            end = at + LENGTH_SIZE + length
            if end > size:
                self._header = _unpack_header(data, at)
                self._keep(at, end - size)
                return
            self._at = end
            yield length, head, stream, timestamp, salt, counter, token, data[at + HEADER_SIZE : end]
            at = end
        if size > at:
            self._keep_header(at, size - at)
        else:
            self._data = b""  # an idle connection must not hold its last read, which may be large
            self._at = 0

    def _keep_header(self, at: int, available: int) -> None:
        if available >= LENGTH_SIZE:
            check_length(int.from_bytes(self._data[at : at + LENGTH_SIZE], "big"), self.limit)
            self._keep(at, HEADER_SIZE - available)
        else:
            self._keep(at, LENGTH_SIZE - available)

    def _keep(self, at: int, missing: int) -> None:
        # A bytearray grows in place: a frame that arrives byte by byte costs linear time.
        start = memoryview(self._data)[at:]
        self._filled, self._missing = len(start), missing
        if self._filled + missing >= LARGE:
            self.partial = _take_buffer(self._filled + missing)
            self.partial.write(start)
        else:
            self.partial = bytearray(start)
        self._data = b""
        self._at = 0
