"""Recognise the usual frames of a read, which nearly all reads consist of, at less cost than `FrameDecoder`.

A usual frame has the receiver's common kind, a length up to the limit, the salt of the connection, a counter above
the last one, a timestamp within the tolerance, and the expected token. Nothing is decided about any other frame.
A usual request has a well-formed body and no past deadline, too.

It must not know: what a session is, what is in flight.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from zcproto.accelerator import accelerated, twins
from zcproto.wire.frame import HEADER, HEADER_SIZE, LENGTH_SIZE, MIN_LENGTH
from zcproto.wire.message import (
    NO_META,
    MessageError,
    RequestMeta,
    decode_body,
    decode_meta,
    decode_request,
    unpack,
    well_formed_methods,
)

UsualFrame = tuple[int, int, Any, int]
"""Stream, counter, the value of the body, and where the frame ends in its read."""

UsualRequest = tuple[tuple[int, bytes, Any, str, dict[str, Any], RequestMeta], int, int]
"""The event of a request (`RawRequest`), its counter, and where the next frame begins, 0 if nothing follows."""

RequestRules = tuple[int, int, bytes, bytes, int, int, Any, tuple[Any, ...]]
"""What makes a request usual: limit, head, salt, token, tolerance and largest depth.

The session becomes part of the event. The last part is `DECODING`.
"""

_unpack_header = HEADER.unpack_from


@accelerated
def read_request(data: bytes, at: int, rules: RequestRules, counter: int, wall: int) -> UsualRequest | None:
    """Return the usual request that begins at `at`, or None.

    `counter` is that of the last frame; `wall` is in milliseconds.
    """
    size = len(data)
    limit, head, salt, token, tolerance, max_depth, session, _ = rules
    try:
        length, its_head, stream, timestamp, its_salt, its_counter, its_token = _unpack_header(data, at)
    except struct.error:  # too short
        return None
    end = at + LENGTH_SIZE + length
    if (
        end > size
        or its_head != head
        or length > limit
        or length < MIN_LENGTH
        or its_token != token
        or its_salt != salt
        or its_counter <= counter
        or not stream
        or not -tolerance <= wall - timestamp <= tolerance
    ):
        return None
    try:
        method, params, meta = decode_request(data[at + HEADER_SIZE : end], max_depth)
    except MessageError:
        return None
    if meta is not NO_META and meta.deadline_ms is not None and meta.deadline_ms <= 0:
        return None
    return (stream, token, session, method, params, meta), its_counter, end % size


# The constructor of a NamedTuple is a function in Python around it.
_make_meta = partial(tuple.__new__, RequestMeta)
DECODING: Final = (unpack, well_formed_methods, NO_META, _make_meta, decode_meta, twins["read_request"])
"""What `_accelerator.c` makes requests with, and what reads a request with any other body."""


@accelerated
def cut_values(
    data: bytes,
    limit: int,
    head: int,
    salt: bytes,
    counter: int,
    token: bytes,
    wall: int,
    tolerance: int,
    max_depth: int,
    decoder: Callable[[bytes], Any],
) -> list[UsualFrame]:
    """Return the usual frames that `data` begins with, up to the first other one, or one with an invalid body.

    `counter` is that of the last frame; `wall` and `tolerance` are milliseconds. `decoder` is `unpack`, which
    `_accelerator.c` calls.
    """
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
        try:
            value = decode_body(data[at + HEADER_SIZE : end], max_depth)
        except MessageError:
            break
        frames.append((stream, its_counter, value, end))
        counter, at = its_counter, end
    return frames
