"""Test properties of frames and messages for any bytes and values.

Any bytes give frames, the prefix of one, or a ProtocolError; any body gives a message or a MessageError; encoding
round-trips; and the split of the bytes makes no difference.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from zcproto.errors import Code, ProtocolError
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import ALLOWED, HEADER_SIZE, MIN_LENGTH, RawFrame, Side, check_head, encode_frame
from zcproto.wire.message import (
    MessageError,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    decode_request,
    encode_body,
    encode_error,
    encode_request,
)

LIMIT = 300
quick = settings(max_examples=40, deadline=None, database=None)

sides = st.sampled_from(Side)
uint64 = st.integers(0, 2**64 - 1)


@st.composite
def good_frames(draw: st.DrawFn, receiver: Side) -> bytes:
    head = draw(st.sampled_from(sorted(ALLOWED[receiver].heads)))
    try:
        check_head(head, 0, MIN_LENGTH, ALLOWED[receiver])
        stream = 0
    except ProtocolError:
        stream = draw(st.integers(1, 2**32 - 1))
    salt, token = draw(st.binary(min_size=8, max_size=8)), draw(st.binary(min_size=32, max_size=32))
    body = draw(st.binary(max_size=40))
    return encode_frame(head, stream, draw(uint64), salt, draw(uint64), token, body)


@st.composite
def streams_of_bytes(draw: st.DrawFn, receiver: Side) -> bytes:
    """Generate valid frames, often with a changed byte, a removed piece, or noise between them."""
    data = bytearray(b"".join(draw(st.lists(good_frames(receiver), max_size=4))))
    match draw(st.sampled_from(["as it is", "byte", "cut", "noise"])):
        case "byte" if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case "cut" if data:
            at = draw(st.integers(0, len(data)))
            del data[at : at + draw(st.integers(1, 80))]
        case "noise":
            at = draw(st.integers(0, len(data)))
            data[at:at] = draw(st.binary(max_size=80))
    return bytes(data)


def decode(receiver: Side, pieces: list[bytes]) -> tuple[list[RawFrame], Code | int]:
    """Return the frames, then the code of the error or the number of bytes left over."""
    decoder = FrameDecoder(receiver, LIMIT)
    frames: list[RawFrame] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            while (frame := decoder.next_frame()) is not None:
                frames.append(frame)
    except ProtocolError as error:
        return frames, error.code
    return frames, decoder.buffered


@quick
@given(st.data(), sides)
def test_any_bytes_give_frames_a_prefix_or_protocol_error(data: st.DataObject, receiver: Side) -> None:
    stream = data.draw(st.one_of(streams_of_bytes(receiver), st.binary(max_size=300)))
    frames, rest = decode(receiver, [stream])
    taken = sum(4 + frame[0] for frame in frames)
    assert b"".join(encode_frame(*frame[1:]) for frame in frames) == stream[:taken]
    for length, head, number, *_ in frames:
        assert MIN_LENGTH <= length <= LIMIT
        check_head(head, number, length, ALLOWED[receiver])
    if isinstance(rest, Code):
        assert rest in {Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE}
    else:
        assert rest == len(stream) - taken < 4 + LIMIT


@quick
@given(st.data(), sides)
def test_any_split_gives_same_frames(data: st.DataObject, receiver: Side) -> None:
    stream = data.draw(streams_of_bytes(receiver))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(receiver, pieces) == decode(receiver, [stream])


@quick
@given(st.data(), sides)
def test_any_frame_round_trips(data: st.DataObject, receiver: Side) -> None:
    written = data.draw(st.lists(good_frames(receiver), min_size=1, max_size=5))
    frames, rest = decode(receiver, [b"".join(written)])
    assert rest == 0
    assert [encode_frame(*frame[1:]) for frame in frames] == written
    assert [frame[7] for frame in frames] == [data[HEADER_SIZE:] for data in written]


numbers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False))
texts = st.text(max_size=20)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=15,
)
params = st.dictionaries(texts, values, max_size=4)


def same(one: Any, other: Any) -> bool:
    """Compare value and type, distinguishing -0.0 from 0.0."""
    if type(one) is not type(other):
        return False
    match one:
        case float():
            return one == other and math.copysign(1, one) == math.copysign(1, other)
        case list():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return bool(one == other)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@quick
@given(values, st.integers(0, 8))
def test_any_value_round_trips_or_is_too_deep(value: Any, limit: int) -> None:
    body = encode_body(value)
    assert same(decode_body(body), value)
    try:
        decode_body(body, limit)
        assert depth_of(value) <= limit
    except MessageError:
        assert depth_of(value) > limit


@quick
@given(st.binary(max_size=600), params, st.text("abc.", min_size=1, max_size=10))
def test_any_request_round_trips(filler: bytes, arguments: dict[str, Any], method: str) -> None:
    arguments["filler"] = filler
    read_method, read_params, _ = decode_request(encode_request(method, arguments))
    assert read_method == method
    assert same(read_params, arguments)


@quick
@given(st.integers(-(2**31), 2**31), texts, params)
def test_any_error_round_trips(code: int, text: str, details: dict[str, Any]) -> None:
    error = decode_error(encode_error(code, text, details))
    assert (error.code, error.message) == (code, text)
    assert same(error.details, details)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Generate messages, often with a changed or removed byte, after padding of any size; or noise."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=60))
    filler = b"x" * draw(st.sampled_from([0, 1000]))
    message = draw(
        st.sampled_from([["m", {"x": filler}], ["m", None, {"deadline_ms": 5}], [5, "m", {}], {"a": filler}])
    )
    data = bytearray(encode_body(message))
    if draw(st.booleans()):
        data[draw(st.integers(0, min(len(data), 30) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: len(data) - draw(st.sampled_from([0, 0, 1, 5]))])


@settings(quick, max_examples=100)
@given(bodies(), st.integers(1, 40))
def test_any_body_gives_message_or_message_error(body: bytes, max_depth: int) -> None:
    for decoder in (decode_body, decode_request, decode_error, decode_event, decode_map):
        with contextlib.suppress(MessageError):  # any other exception is a bug
            decoder(body, max_depth)


@settings(quick, max_examples=100)
@given(bodies())
def test_decoded_body_encodes_to_same_value(body: bytes) -> None:
    try:
        value = decode_body(body)
    except MessageError:
        return
    again = encode_body(value)
    assert len(again) <= max(len(body), 9 * len(body))
    assert encode_body(decode_body(again)) == again
