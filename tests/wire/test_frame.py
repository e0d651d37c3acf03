"""Test the layout of a frame and the validation of its header."""

from __future__ import annotations

import struct

import pytest

from tests.wire.vectors import document
from zcproto.errors import Code, ProtocolError
from zcproto.wire import frame as wire
from zcproto.wire.frame import (
    ALLOWED,
    HEADER_SIZE,
    MIN_LENGTH,
    NO_TOKEN,
    REQUEST,
    Accepted,
    Kind,
    Side,
    accepted_with_durable,
    accepted_with_streams,
    check_head,
    check_length,
    encode_frame,
    head_of,
)

SALT = b"a salt.."
TOKEN = bytes(range(32))


def test_fields_are_at_the_specified_offsets() -> None:
    data = encode_frame(REQUEST, 0x01020304, 0x1112131415161718, SALT, 0x2122232425262728, TOKEN, b"body")
    assert data[0:4] == struct.pack("!I", len(data) - 4)
    assert data[4:6] == b"\x01\x02"
    assert data[6:8] == b"\x00\x00"
    assert data[8:12] == b"\x01\x02\x03\x04"
    assert data[12:20] == b"\x11\x12\x13\x14\x15\x16\x17\x18"
    assert data[20:28] == SALT
    assert data[28:36] == b"\x21\x22\x23\x24\x25\x26\x27\x28"
    assert data[36:68] == TOKEN
    assert data[68:] == b"body"


def test_frame_without_body_is_68_bytes() -> None:
    data = encode_frame(wire.PING, 0, 5, SALT, 1, NO_TOKEN)
    assert len(data) == HEADER_SIZE == 68
    assert int.from_bytes(data[:4], "big") == MIN_LENGTH == 64


def test_stream_field_holds_32_bits() -> None:
    assert encode_frame(REQUEST, wire.MAX_STREAM, 5, SALT, 1, NO_TOKEN)[8:12] == b"\xff" * 4


def test_kind_numbers_match_specification() -> None:
    kinds = document("tables")["kinds"] | document("streaming/tables")["kinds"]
    assert {kind.name: kind.value for kind in Kind} == kinds


def test_code_numbers_match_specification() -> None:
    assert {code.name: code.value for code in Code} == document("tables")["codes"]


def test_every_kind_has_a_head_constant() -> None:
    for kind in Kind:
        assert getattr(wire, kind.name) == head_of(kind) == 0x01000000 | kind << 16


def test_only_ping_and_pong_are_accepted_by_both_sides() -> None:
    server, client = (ALLOWED[side].heads for side in (Side.SERVER, Side.CLIENT))
    assert server & client == {wire.PING, wire.PONG}
    assert server | client == {head_of(kind) for kind in Kind if kind < Kind.OPEN}


def test_item_and_credit_are_accepted_by_both_sides_with_streams() -> None:
    server, client = (accepted_with_streams(side, 1_000).heads for side in (Side.SERVER, Side.CLIENT))
    assert server & client == {wire.PING, wire.PONG, wire.ITEM, wire.CREDIT}
    assert server | client == {head_of(kind) for kind in Kind if kind < Kind.ACCEPTED}
    durable = accepted_with_durable(accepted_with_streams(Side.CLIENT, 1_000))
    assert durable.heads == client | {wire.ACCEPTED}


@pytest.mark.parametrize("side", Side)
def test_item_longer_than_max_item_is_frame_too_large(side: Side) -> None:
    accepted = accepted_with_streams(side, 1_000)
    check_head(wire.ITEM, 1, 1_000, accepted)
    check_head(wire.CREDIT, 1, 1_001, accepted)
    with pytest.raises(ProtocolError) as caught:
        check_head(wire.ITEM, 1, 1_001, accepted)
    assert caught.value.code is Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("length", [0, 1, 63])
def test_length_below_header_is_protocol_error(length: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_length(length, 1000)
    assert caught.value.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("length", [64, 65, 999, 1000])
def test_length_up_to_limit_is_accepted(length: int) -> None:
    check_length(length, 1000)


@pytest.mark.parametrize("length", [1001, 2**31, 2**32 - 1])
def test_length_above_limit_is_frame_too_large(length: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_length(length, 1000)
    assert caught.value.code is Code.FRAME_TOO_LARGE


STREAMS = {
    Side.SERVER: {Kind.REQUEST: {1}, Kind.CANCEL: {1}, Kind.PING: {0}, Kind.PONG: {0}},
    Side.CLIENT: {
        Kind.WELCOME: {0},
        Kind.RESPONSE: {1},
        Kind.ERROR: {0, 1},
        Kind.PING: {0},
        Kind.PONG: {0},
        Kind.GOAWAY: {0},
        Kind.EVENT: {0},
    },
}
"""Streams (0 or another) on which each side may receive a kind, written independently of the code."""


OF_STREAMS = {
    Side.SERVER: {Kind.OPEN: {1}, Kind.ITEM: {1}, Kind.END: {1}, Kind.CREDIT: {1}},
    Side.CLIENT: {Kind.ITEM: {1}, Kind.CREDIT: {1}},
}


def is_accepted(head: int, stream: int, receiver: Side, accepted: Accepted | None = None) -> bool:
    try:
        check_head(head, stream, 64, accepted or ALLOWED[receiver])
    except ProtocolError as error:
        if error.code is not Code.PROTOCOL_ERROR:
            raise
        return False
    return True


@pytest.mark.parametrize("receiver", Side)
@pytest.mark.parametrize("stream", [0, 1])
def test_only_listed_kinds_are_accepted_on_their_streams(receiver: Side, stream: int) -> None:
    for kind in range(256):
        allowed = stream in STREAMS[receiver].get(kind, set())
        assert is_accepted(0x01000000 | kind << 16, stream, receiver) is allowed, hex(kind)
        announced = {**STREAMS[receiver], **OF_STREAMS[receiver]}
        allowed = stream in announced.get(kind, set())
        accepted = accepted_with_streams(receiver, 64)
        assert is_accepted(0x01000000 | kind << 16, stream, receiver, accepted) is allowed, hex(kind)


@pytest.mark.parametrize("receiver", Side)
def test_unknown_version_is_refused(receiver: Side) -> None:
    for version in range(256):
        assert is_accepted(version << 24 | Kind.PING << 16, 0, receiver) is (version == 1)


@pytest.mark.parametrize(("kind", "stream"), [(Kind.REQUEST, 1), (Kind.PING, 0)])
def test_flags_are_refused(kind: Kind, stream: int) -> None:
    assert is_accepted(head_of(kind), stream, Side.SERVER)
    for bit in range(16):
        assert not is_accepted(head_of(kind) | 1 << bit, stream, Side.SERVER), bit


@pytest.mark.parametrize(
    ("head", "stream", "reason"),
    [
        (0x02FF0001, 0, "unsupported frame version"),
        (0x01FF0001, 0, "frame kind not allowed here"),
        (0x01020001, 0, "frame flags set"),
        (0x01020000, 0, "stream does not fit the frame kind"),
    ],
)
def test_header_is_checked_in_order_version_kind_flags_stream(head: int, stream: int, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_head(head, stream, 64, ALLOWED[Side.SERVER])
    assert caught.value.reason == reason
