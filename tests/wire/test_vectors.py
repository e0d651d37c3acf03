"""Test every vector of the specification: whole, byte by byte, in two pieces, and with trailing bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.wire.vectors import (
    Seen,
    Vector,
    decode,
    document,
    expected_message,
    fields_of,
    frame_vectors,
    message_of,
    ways_to_cut,
)
from zcproto.errors import Code
from zcproto.wire.frame import PING, Side, encode_frame
from zcproto.wire.message import MessageError, parse_traceparent

VECTORS = frame_vectors()
TRAILING_PING = encode_frame(PING, 0, 1, b"another.", 2, bytes(32))


def judge_all(seen: list[Seen], vector: Vector) -> None:
    """Assert that the decoder gave exactly the outcomes of the vector."""
    expected = vector["expect"]
    for got, outcome in zip(seen, expected, strict=False):
        judge(got, outcome, vector["context"]["max_depth"])
    if not any(outcome.get("fatal") for outcome in expected):
        assert len(seen) == len(expected)
    else:  # an error found by the conversation does not stop the decoder
        assert len(seen) >= len(expected)


def judge(seen: Seen, outcome: Vector, max_depth: int) -> None:
    """Assert one outcome, as far as the bytes alone determine it."""
    match outcome["result"]:
        case "incomplete":
            assert seen == outcome["have"]
        case "error" if outcome["stage"] == "header":
            assert seen is Code[outcome["name"]]
        case _:
            assert isinstance(seen, tuple), seen
            judge_frame(seen, outcome, max_depth)


def judge_frame(frame: Any, outcome: Vector, max_depth: int) -> None:
    if outcome["result"] == "frame":
        assert fields_of(frame) == {key: value for key, value in outcome.items() if key != "message"}
        assert message_of(frame, max_depth) == expected_message(outcome)
    elif outcome.get("stage") == "deadline":
        message = message_of(frame, max_depth)
        deadline = message["meta"]["deadline_ms"]
        assert int(deadline["int"] if isinstance(deadline, dict) else deadline) <= 0
    elif outcome.get("stage") == "body":
        with pytest.raises(MessageError):
            message_of(frame, max_depth)


@pytest.mark.parametrize("name", VECTORS)
def test_decoder_follows_vector(name: str) -> None:
    """Whole, in pieces, and with trailing bytes."""
    vector = VECTORS[name]
    data = bytes.fromhex(vector["bytes"])
    whole = decode(vector, [data])
    judge_all(whole, vector)
    for pieces in ways_to_cut(data):
        assert decode(vector, pieces) == whole
    if whole and isinstance(whole[-1], Code):
        assert decode(vector, [data + b"\xff" * 100]) == whole
        assert decode(vector, [data[:-1], data[-1:] + b"\x00" * 100]) == whole
    elif not whole or isinstance(whole[-1], tuple):
        assert decode(vector, [data + TRAILING_PING]) == [
            *whole,
            (64, PING, 0, 1, b"another.", 2, bytes(32), b""),
        ]


def test_header_error_is_found_in_first_68_bytes() -> None:
    for name, vector in VECTORS.items():
        if name.startswith("headers/"):
            data = bytes.fromhex(vector["bytes"])
            assert isinstance(decode(vector, [data[:68]])[-1], Code), name


def test_length_error_is_found_in_first_4_bytes() -> None:
    for name, vector in VECTORS.items():
        if name.startswith("headers/length"):
            data = bytes.fromhex(vector["bytes"])
            assert isinstance(decode(vector, [data[:4]])[-1], Code), name


def test_every_kind_and_both_receivers_have_vectors() -> None:
    covered = {
        (vector["receiver"], outcome["kind"])
        for vector in VECTORS.values()
        for outcome in vector["expect"]
        if outcome["result"] == "frame"
    }
    to_the_client = {"WELCOME", "RESPONSE", "ERROR", "PING", "PONG", "GOAWAY", "EVENT"}
    to_the_server = {"REQUEST", "CANCEL", "PING", "PONG"}
    wanted = {(Side.SERVER.value, kind) for kind in to_the_server}
    assert covered == wanted | {(Side.CLIENT.value, kind) for kind in to_the_client}


TRACEPARENTS = [vector for vector in document("text")["vectors"] if vector["type"] == "traceparent"]


@pytest.mark.parametrize("vector", TRACEPARENTS, ids=[vector["name"] for vector in TRACEPARENTS])
def test_traceparent_follows_vector(vector: Vector) -> None:
    assert parse_traceparent(vector["text"]) == (vector["text"] if vector["expect"]["valid"] else None)
