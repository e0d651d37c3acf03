"""Frames to decode, and what decoding them takes."""

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
    """A REQUEST with a body of so many bytes, which is no message."""
    return encode_frame(REQUEST, stream, 5, SALT, stream, NO_TOKEN, b"x" * size)


def take_all(decoder: FrameDecoder) -> list[int]:
    """The streams of all frames that are there."""
    streams = []
    while (frame := decoder.next_frame()) is not None:
        streams.append(frame[2])
    return streams


def peak_of(decode: Callable[[bytes], Any], body: bytes) -> int:
    """Bytes allocated at most while a body is decoded, whatever comes of it."""
    tracemalloc.start()
    with contextlib.suppress(MessageError):
        decode(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
