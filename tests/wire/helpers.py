"""Build frames and measure the memory of decoding."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from typing import Any

from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import NO_TOKEN, REQUEST, encode_frame
from zcproto.wire.message import MessageError

SALT = b"a salt.."
MIB = 1 << 20


def request(size: int, stream: int = 1) -> bytes:
    """Return a REQUEST with `size` bytes of body, not valid msgpack."""
    return encode_frame(REQUEST, stream, 5, SALT, stream, NO_TOKEN, b"x" * size)


def read_streams(decoder: FrameDecoder) -> list[int]:
    """Return the streams of all complete frames."""
    streams = []
    while (frame := decoder.next_frame()) is not None:
        streams.append(frame[2])
    return streams


def peak_of(decode: Callable[[bytes], Any], body: bytes) -> int:
    """Return the peak of bytes allocated while decoding a body, valid or not."""
    tracemalloc.start()
    with contextlib.suppress(MessageError):
        decode(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
