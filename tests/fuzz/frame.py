"""Build invalid frames from a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.target import Script
from tests.helpers import SALT
from zcproto.wire.frame import LENGTH_SIZE

COUNTERS = (0, 1, 2, 2**32, 2**64 - 1)


def any_frame(
    script: Script, make: Callable[..., bytes], *, token: bytes, heads: Sequence[int], streams: int
) -> bytes:
    """Return a frame with arbitrary fields, whole or truncated.

    `make` builds a frame from head, stream and body, and from fields that replace the valid ones.
    """
    fields: dict[str, Any] = {"token": token}
    choices = script.byte()
    if choices & 1:
        fields["counter"] = script.choose(COUNTERS)
    if choices & 2:
        fields["timestamp"] = script.number(8)
    if choices & 4:
        fields["salt"] = SALT[:-1] + bytes([script.byte()])
    frame = make(script.choose(heads), script.byte() % streams, script.bytes(), **fields)
    if choices & 8:
        frame = script.number(4).to_bytes(4, "big") + frame[LENGTH_SIZE:]
    return frame[: script.byte()] if choices & 16 else frame
