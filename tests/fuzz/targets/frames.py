"""Fuzz the frame decoder: any bytes are frames, a partial frame, or a ProtocolError, for every division."""

from __future__ import annotations

from tests.fuzz.target import Target, divisions
from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    ACCEPTED,
    LENGTH_SIZE,
    MIN_LENGTH,
    REQUEST,
    RESPONSE,
    RawFrame,
    Side,
    check_head,
    encode_frame,
)
from zcproto.wire.message import MessageError, decode_body, decode_request, unpack
from zcproto.wire.usual import DECODING, cut_values, read_request

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
        check_head(head, number, length, ACCEPTED[side])
    if fault is None:
        assert decoder.buffered == len(stream) - taken < LENGTH_SIZE + limit
    for pieces in divisions(stream):
        found, rest = decode(FrameDecoder(side, limit), pieces)
        assert found == frames
        assert rest == (decoder.buffered if fault is None else fault)
    check_usual(side, limit, stream, frames)


def check_usual(side: Side, limit: int, stream: bytes, frames: list[RawFrame]) -> None:
    """The usual frames, by the header of the first frame, are the first frames until one differs from it."""
    if not frames:
        return
    head = REQUEST if side is Side.SERVER else RESPONSE
    _, _, _, wall, salt, counter, token, _ = frames[0]
    last = max(counter, 1) - 1
    rules = limit, head, salt, last, token, wall, 0
    usual: list[tuple[int, int, bytes, int]] = []
    end = 0
    for length, its_head, number, timestamp, its_salt, counter, its_token, body in frames:
        same = (its_head, timestamp, its_salt, its_token) == (head, wall, salt, token)
        if not same or counter <= last:
            break
        end += LENGTH_SIZE + length
        last = counter
        usual.append((number, counter, body, end))
    values = []
    for number, counter, body, end in usual:
        try:
            values.append((number, counter, decode_body(body, 32), end))
        except MessageError:
            break
    assert repr(cut_values(stream, *rules, 32, unpack)) == repr(values)  # NaN equals nothing
    if head == REQUEST:
        check_requests(limit, stream, frames[0], usual)


def check_requests(
    limit: int, stream: bytes, first: RawFrame, usual: list[tuple[int, int, bytes, int]]
) -> None:
    """A usual request is a usual frame with a well-formed body and no past deadline."""
    _, _, _, wall, salt, counter, token, _ = first
    rules = limit, REQUEST, salt, token, 0, 32, None, DECODING
    at, last = 0, max(counter, 1) - 1
    for number, counter, body, end in usual:
        try:
            message = decode_request(body, 32)
        except MessageError:
            expected = None
        else:
            is_late = message[2].deadline_ms is not None and message[2].deadline_ms <= 0
            expected = None if is_late else ((number, token, None, *message), counter, end % len(stream))
        assert repr(read_request(stream, at, rules, last, wall)) == repr(expected)  # NaN equals nothing
        at, last = end, counter
    assert read_request(stream, at, rules, last, wall) is None


TARGET = Target("frames", run, check)
