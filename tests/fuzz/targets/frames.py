"""Fuzz the frame decoder: any bytes are frames, a partial frame, or a ProtocolError, for every division."""

from __future__ import annotations

from tests.fuzz.target import Target, divisions
from tests.wire.fast_path import check_cut, check_requests, compiled
from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    ALLOWED,
    LENGTH_SIZE,
    MIN_LENGTH,
    REQUEST,
    RESPONSE,
    RawFrame,
    Side,
    check_head,
    encode_frame,
)
from zcproto.wire.request_fast_path import DECODING

SIDES = (Side.SERVER, Side.CLIENT)
LIMITS = (300, 16_384)


def decode(decoder: FrameDecoder, pieces: list[bytes]) -> tuple[list[RawFrame], tuple[Code, str] | int]:
    """Return the frames, and the fault or the number of remaining bytes."""
    frames: list[RawFrame] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            frames += decoder.frames()
    except ProtocolError as error:
        return frames, (error.code, error.reason)
    return frames, decoder.buffered


def decode_input(data: bytes) -> tuple[Side, int, bytes]:
    """Return side, frame limit (both selected by the first byte) and bytes."""
    first = data[0] if data else 0
    return SIDES[first & 1], LIMITS[first >> 1 & 1], data[1:]


def run(data: bytes) -> None:
    side, limit, stream = decode_input(data)
    decode(FrameDecoder(side, limit), [stream])


def check(data: bytes) -> None:
    side, limit, stream = decode_input(data)
    frames: list[RawFrame] = []
    decoder = FrameDecoder(side, limit)
    fault: tuple[Code, str] | None = None
    try:
        decoder.feed(stream)
        while (frame := decoder.next_frame()) is not None:
            frames.append(frame)
    except ProtocolError as error:
        fault = (error.code, error.reason)
    assert fault is None or fault[0] in {Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE}
    taken = sum(LENGTH_SIZE + frame[0] for frame in frames)
    assert b"".join(encode_frame(*frame[1:]) for frame in frames) == stream[:taken]
    for length, head, number, *_, body in frames:
        assert MIN_LENGTH <= length <= limit
        assert len(body) == length - MIN_LENGTH
        check_head(head, number, length, ALLOWED[side])
    if fault is None:
        assert decoder.buffered == len(stream) - taken < LENGTH_SIZE + limit
    for pieces in divisions(stream):
        found, rest = decode(FrameDecoder(side, limit), pieces)
        assert found == frames
        assert rest == (decoder.buffered if fault is None else fault)
    if compiled is not None and frames:
        check_fast_path(REQUEST if side is Side.SERVER else RESPONSE, limit, stream, frames[0])


def check_fast_path(head: int, limit: int, stream: bytes, first: RawFrame) -> None:
    """What is read in C, by the header of the first frame, is what the decoder reads."""
    _, _, _, wall, salt, counter, token, _ = first
    last = max(counter, 1) - 1
    check_cut(stream, limit, head, salt, last, token, wall, 0, 32)
    if head == REQUEST:
        check_requests(stream, 0, (limit, REQUEST, salt, token, 0, 32, None, DECODING), last, wall)


TARGET = Target("frames", run, check)
