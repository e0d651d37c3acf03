"""Recognise the usual frames of a read, which nearly all reads consist of, at less cost than `FrameDecoder`.

A usual frame has the receiver's common kind, a length up to the limit, the salt of the connection, a counter above
the last one, a timestamp within the tolerance, and the expected token. Nothing is decided about any other frame.

It must not know: sessions, messages, what is in flight.
"""

from __future__ import annotations

from zcproto.accelerator import accelerated
from zcproto.wire.frame import HEADER, HEADER_SIZE, LENGTH_SIZE, MIN_LENGTH

UsualFrame = tuple[int, int, bytes, int]
"""Stream, counter, body, and where the frame ends in its read."""

_unpack_header = HEADER.unpack_from


@accelerated
def judge(
    data: bytes, limit: int, head: int, salt: bytes, counter: int, token: bytes, wall: int, tolerance: int
) -> tuple[int, int, bytes] | None:
    """Return stream, counter and body if `data` is exactly one usual frame, else None.

    `counter` is that of the last frame; `wall` and `tolerance` are milliseconds.
    """
    size = len(data)
    if size >= HEADER_SIZE:
        length, its_head, stream, timestamp, its_salt, its_counter, its_token = _unpack_header(data)
        if (
            LENGTH_SIZE + length == size
            and its_head == head
            and length <= limit
            and its_token == token
            and its_salt == salt
            and its_counter > counter
            and stream
            and -tolerance <= wall - timestamp <= tolerance
        ):
            return stream, its_counter, data[HEADER_SIZE:]
    return None


@accelerated
def cut(
    data: bytes, limit: int, head: int, salt: bytes, counter: int, token: bytes, wall: int, tolerance: int
) -> list[UsualFrame]:
    """Return the usual frames that `data` begins with, up to the first other one. Arguments as for `judge`."""
    frames: list[UsualFrame] = []
    at, end, last = 0, HEADER_SIZE, len(data) - HEADER_SIZE
    while at <= last:
        length, its_head, stream, timestamp, its_salt, its_counter, its_token = _unpack_header(data, at)
        end = at + LENGTH_SIZE + length
        if (
            end > len(data)
            or its_head != head
            or not MIN_LENGTH <= length <= limit
            or its_token != token
            or its_salt != salt
            or its_counter <= counter
            or not stream
            or not -tolerance <= wall - timestamp <= tolerance
        ):
            break
        frames.append((stream, its_counter, data[at + HEADER_SIZE : end], end))
        counter, at = its_counter, end
    return frames
