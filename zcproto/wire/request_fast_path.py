"""Read in C what nearly all reads consist of: requests at a server, answers at a client (`_accelerator.c`).

A frame is read here if it has the receiver's common kind, a length up to the limit, the salt of the connection, a
counter above the last one, a timestamp within the tolerance, the expected token, and a well-formed body without a
past deadline. Nothing is decided about any other frame, nor about those after it: the general path of the
connection processes them. Without the accelerator it processes all frames.

It must not know: what a session is, what is in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from zcproto.accelerator import compiled
from zcproto.wire.message import NO_META, RequestMeta, decode_meta, unpack, well_formed_methods

RequestRules = tuple[int, int, bytes, bytes, int, int, Any, tuple[Any, ...]]
"""What requests must have: limit, head, salt, token, tolerance and largest depth.

The session becomes part of the event. The last part is `DECODING`.
"""

ReadRequest = tuple[tuple[int, bytes, Any, str, dict[str, Any], RequestMeta], int, int]
"""The event of a request (`RawRequest`), its counter, and where the next frame begins, 0 if nothing follows."""

FastAnswer = tuple[int, int, Any, int]
"""Stream, counter, the value of the body, and where the frame ends in its read."""

# The constructor of a NamedTuple is a function in Python around it.
_make_meta = partial(tuple.__new__, RequestMeta)
DECODING: Final = (unpack, well_formed_methods, NO_META, _make_meta, decode_meta)
"""What requests are made with."""

read_requests: Final[Callable[[bytes, int, RequestRules, int, int], list[ReadRequest]] | None] = getattr(
    compiled, "read_requests", None
)
"""Return the requests from a position on, up to the first other frame, 16 or 4,096 bytes at most.

Arguments: the bytes of a read, the position, the rules, the counter of the last frame, wall time in milliseconds.
"""

cut_values: Final[Callable[..., list[FastAnswer]]] = getattr(compiled, "cut_values", lambda *_: [])
"""Return the frames that a read begins with, up to the first other one.

Arguments: the bytes, limit, head, salt, the last counter, token, wall time, tolerance, largest depth, `unpack`.
"""
