"""The vectors of spec/vectors, and what zcproto.wire makes of their bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import WITHOUT_BODY, Kind, RawFrame, Side
from zcproto.wire.message import (
    MessageError,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    decode_request,
)

SPEC = Path(__file__).resolve().parents[2] / "spec"
FOLDER = SPEC / "vectors"
FRAME_FILES = ("frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments")
SIDES = {side.value: side for side in Side}
Vector = dict[str, Any]
Seen = RawFrame | Code | int
"""What comes out of a decoder: a frame, the code of the fault that ends it, or how many bytes are left over."""


@cache
def document(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def frame_vectors() -> dict[str, Vector]:
    """Every vector of frames by `file/name`."""
    return {
        f"{file}/{vector['name']}": vector for file in FRAME_FILES for vector in document(file)["vectors"]
    }


def decode(vector: Vector, pieces: Iterable[bytes]) -> list[Seen]:
    """Feed a fresh decoder piece by piece."""
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
    """One byte at a time, and in two pieces at every position."""
    yield [data[at : at + 1] for at in range(len(data))]
    if len(data) <= 600:
        for at in range(len(data) + 1):
            yield [data[:at], data[at:]]


def kind_of(frame: RawFrame) -> Kind:
    return Kind(frame[1] >> 16 & 0xFF)


def fields_of(frame: RawFrame) -> dict[str, Any]:
    """A frame in the words of the vectors."""
    length, head, stream, timestamp, salt, counter, token, body = frame
    return {
        "result": "frame",
        "length": length,
        "version": head >> 24,
        "kind": kind_of(frame).name,
        "flags": head & 0xFFFF,
        "stream": stream,
        "timestamp": str(timestamp),
        "salt": salt.hex(),
        "counter": str(counter),
        "token": token.hex(),
        "body": body.hex(),
    }


def message_of(frame: RawFrame, max_depth: int) -> dict[str, Any] | None:
    """What a frame says, in the words of the vectors. Raises MessageError."""
    kind, body = kind_of(frame), frame[7]
    if frame[1] in WITHOUT_BODY:
        if body:
            raise MessageError("this kind has no body")
        return None
    match kind:
        case Kind.REQUEST:
            method, params, meta = decode_request(body, max_depth)
            said = {key: typed(value) for key, value in meta._asdict().items() if value is not None}
            return {"method": method, "params": typed(params), "meta": said}
        case Kind.ERROR:
            error = decode_error(body, max_depth)
            return {"code": error.code, "message": error.message, "details": typed(error.details)}
        case Kind.EVENT:
            name, data = decode_event(body, max_depth)
            return {"name": name, "data": typed(data)}
        case Kind.WELCOME | Kind.GOAWAY:
            return {"map": typed(decode_map(body, max_depth))}
        case _:
            return {"value": typed(decode_body(body, max_depth))}


def expected_message(outcome: Vector) -> dict[str, Any] | None:
    """The message of a vector as zcproto.wire has it: nil params are an empty map, no meta is an empty one."""
    message: dict[str, Any] | None = outcome.get("message")
    if message is None or "method" not in message:
        return message
    return {
        "method": message["method"],
        "params": message["params"] or {"map": {}},
        "meta": message.get("meta", {}),
    }


def typed(value: Any) -> Any:
    """A value as the typed JSON of the vectors."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if abs(value) < 2**53 else {"int": str(value)}
        case float():
            return {"float64": struct.pack("!d", value).hex()}
        case bytes():
            return {"bin": value.hex()}
        case list():
            return [typed(item) for item in value]
        case dict():
            return {"map": {key: typed(item) for key, item in value.items()}}
    raise TypeError(type(value).__name__)
