"""Load the vectors of spec/vectors and decode them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import RawFrame, Side
from zcproto_conformance.frames import fields_of, message_of
from zcproto_conformance.values import typed

__all__ = ["fields_of", "message_of", "typed"]

SPEC = Path(__file__).resolve().parents[2] / "spec"
FOLDER = SPEC / "vectors"
FRAME_FILES = ("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments")
SIDES = {side.value: side for side in Side}
Vector = dict[str, Any]
Seen = RawFrame | Code | int
"""One outcome of a decoder: a frame, the code of a fatal error, or the number of bytes left over."""


@cache
def document(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def frame_vectors() -> dict[str, Vector]:
    """Return all frame vectors by `file/name`."""
    return {
        f"{file}/{vector['name']}": vector for file in FRAME_FILES for vector in document(file)["vectors"]
    }


def decode(vector: Vector, pieces: Iterable[bytes]) -> list[Seen]:
    """Feed a new decoder piece by piece and return its outcomes."""
    decoder = FrameDecoder(SIDES[vector["receiver"]], vector["context"]["limit"])
    seen: list[Seen] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            for frame in decoder.frames():
                seen.append(frame)
    except ProtocolError as error:
        seen.append(error.code)
    else:
        if decoder.buffered:
            seen.append(decoder.buffered)
    return seen


def ways_to_cut(data: bytes) -> Iterator[list[bytes]]:
    """Yield the data byte by byte, and in two pieces at every position."""
    yield [data[at : at + 1] for at in range(len(data))]
    if len(data) <= 600:
        for at in range(len(data) + 1):
            yield [data[:at], data[at:]]


def expected_message(outcome: Vector) -> dict[str, Any] | None:
    """Return the message of a vector as zcproto.wire decodes it: nil params and missing meta are empty maps."""
    message: dict[str, Any] | None = outcome.get("message")
    if message is None or "method" not in message:
        return message
    return {
        "method": message["method"],
        "params": message["params"] or {"map": {}},
        "meta": message.get("meta", {}),
    }
