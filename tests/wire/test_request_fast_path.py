"""Test which requests and answers are read in C. `test_accelerator.py` compares them with the decoder."""

from __future__ import annotations

from typing import Any

import pytest

from tests.wire.fast_path import needs_compiled
from zcproto import accelerator
from zcproto.wire.frame import HEADER_SIZE, LENGTH_SIZE, PING, REQUEST, encode_frame
from zcproto.wire.message import NO_META, RequestMeta, encode_body, unpack, well_formed_methods
from zcproto.wire.request_fast_path import DECODING, ReadRequest, RequestRules, cut_values, read_requests

SALT = b"saltsalt"
TOKEN = bytes(range(32))
WALL = 1_700_000_000_000
TOLERANCE = 30_000
LIMIT = HEADER_SIZE - LENGTH_SIZE + 10


def data_of(size: int) -> bytes:
    """Return the body of such a size that is one value: 0, or bytes."""
    return bytes((0xC4, size - 2)) + bytes(size - 2) if size > 1 else bytes(size)


def frame(
    *,
    head: int = REQUEST,
    stream: int = 7,
    timestamp: int = WALL,
    salt: bytes = SALT,
    counter: int = 6,
    token: bytes = TOKEN,
    size: int = 10,
    body: bytes | None = None,
) -> bytes:
    body = data_of(size) if body is None else body
    return encode_frame(head, stream, timestamp, salt, counter, token, body)


SESSION = object()
REQUEST_RULES = (LIMIT, REQUEST, SALT, TOKEN, TOLERANCE, 3, SESSION, DECODING)
BODY = encode_body(["m", {"a": 1}])


def read_from(data: bytes, at: int = 0, rules: RequestRules = REQUEST_RULES) -> list[ReadRequest]:
    assert read_requests is not None
    return read_requests(data, at, rules, 5, WALL)


def cut_from(data: bytes) -> list[tuple[int, int, Any, int]]:
    return cut_values(data, LIMIT, REQUEST, SALT, 5, TOKEN, WALL, TOLERANCE, 2, unpack)


OTHERS = {
    "nothing": b"",
    "half a header": frame()[:30],
    "a frame without its end": frame()[:-1],
    "another kind": frame(head=PING),
    "stream 0": frame(stream=0),
    "a frame above the limit": frame(size=11),
    "a length below the header": bytes(4) + frame()[4:],
    "another salt": frame(salt=b"SALTSALT"),
    "a repeated counter": frame(counter=5),
    "another token": frame(token=bytes(32)),
    "too old": frame(timestamp=WALL - TOLERANCE - 1),
    "too new": frame(timestamp=WALL + TOLERANCE + 1),
    "a timestamp above 63 bits": frame(timestamp=2**64 - 1),
}


@needs_compiled
def test_frame_within_the_rules_is_read() -> None:
    well_formed_methods.add("m")
    for size, value in ((1, 0), (2, b""), (10, bytes(8))):
        data = frame(size=size, counter=2**64 - 1)
        assert cut_from(data) == [(7, 2**64 - 1, value, len(data))]
    for edge in (WALL - TOLERANCE, WALL + TOLERANCE):
        assert len(cut_from(frame(timestamp=edge))) == 1
        assert len(read_from(frame(timestamp=edge, body=BODY))) == 1


@needs_compiled
def test_several_frames_are_cut_up_to_the_first_other_one() -> None:
    first, second = frame(counter=6), frame(counter=8, stream=9, size=1)
    size = len(first)
    expected = [(7, 6, bytes(8), size), (9, 8, 0, size + len(second))]
    assert cut_from(first + second) == expected
    for what, data in OTHERS.items():
        assert cut_from(data) == [], what
        assert cut_from(first + second + data) == expected, what
    assert cut_from(first + first) == expected[:1]  # the counter must grow
    for body in (b"", b"\xc0\xc0", b"\xd4\x05\x00", b"\xa1\xff", b"\x91\x91\x90", b"\x81\x01\x01"):
        assert cut_from(first + second + frame(counter=9, body=body)) == expected, body


@needs_compiled
def test_requests_are_read_up_to_the_first_other_frame() -> None:
    well_formed_methods.add("m")
    data, next_ = frame(counter=8, body=BODY), frame(counter=9, stream=8, body=BODY)
    event, size = (7, TOKEN, SESSION, "m", {"a": 1}, NO_META), len(data)
    assert read_from(data) == [(event, 8, 0)]
    assert read_from(data + next_) == [(event, 8, size), ((8, *event[1:]), 9, 0)]
    assert read_from(frame() + data, len(frame())) == [(event, 8, 0)]
    assert read_from(data, len(data)) == []
    assert read_from(data + data) == [(event, 8, size)]  # the counter must grow
    for what, other in OTHERS.items():
        assert read_from(other) == [], what
        assert read_from(data + other + b"x") == [(event, 8, size)], what


@needs_compiled
def test_batch_of_requests_is_bounded() -> None:
    rules = (100_000, *REQUEST_RULES[1:])
    small = [frame(counter=6 + number, body=BODY) for number in range(40)]
    assert len(read_from(b"".join(small))) == 16
    large = [frame(counter=6 + number, body=encode_body(["m", {"a": bytes(1_500)}])) for number in range(9)]
    assert len(read_from(b"".join(large), rules=rules)) == 3
    assert len(read_from(frame(counter=6, body=encode_body(["m", {"a": bytes(9_000)}])), rules=rules)) == 1


@needs_compiled
def test_request_of_a_method_whose_name_is_not_known_is_left() -> None:
    well_formed_methods.discard("new.method")
    data, rules = frame(body=encode_body(["new.method", {}])), (1_000, *REQUEST_RULES[1:])
    assert read_from(data, rules=rules) == []
    well_formed_methods.add("new.method")
    assert len(read_from(data, rules=rules)) == 1


@needs_compiled
def test_requests_with_metadata_are_read_unless_their_deadline_has_passed() -> None:
    rules = (1_000, *REQUEST_RULES[1:])
    well_formed_methods.update(("m", "a.method"))

    def decoded(value: Any) -> tuple[Any, ...] | None:
        found = read_from(frame(body=encode_body(value)), rules=rules)
        return found[0][0][3:] if found else None

    for meta, expected in (
        ({"deadline_ms": 1}, RequestMeta(1)),
        ({"deadline_ms": 2**64 - 1}, RequestMeta(2**64 - 1)),
        ({"deadline_ms": None}, NO_META),
        ({"deadline_ms": 5, "other": 1}, RequestMeta(5)),
        ({"idempotency_key": "k"}, RequestMeta(None, "k")),
        ({"other": 1}, NO_META),
        ({}, NO_META),
    ):
        found = decoded(["a.method", {"x": [1]}, meta])
        assert found == ("a.method", {"x": [1]}, expected)
        assert type(found[2]) is RequestMeta
    assert decoded(["m", None]) == ("m", {}, NO_META)
    for value in (
        *({"m": {}}, [], ["m"], ["m", {}, {}, {}], ["m", []], ["M", {}], [5, {}], [["m"], {}]),
        *(["m", {}, None], ["m", {}, {"deadline_ms": 0}], ["m", {}, {"deadline_ms": -1}]),
        *(["m", {}, {"deadline_ms": True}], ["m", {}, {"deadline_ms": 1.5}], ["m", {"x": [[1]]}]),
    ):
        assert decoded(value) is None, value
    for body in (b"", BODY + b"\xc0", b"\x92\xa1m\x81\x05\xc0", b"\x92\xa1m\x81\xa1\xff\xc0"):
        assert read_from(frame(body=body), rules=rules) == [], body


@pytest.mark.skipif(accelerator.compiled is not None, reason="the accelerator is in use")
def test_nothing_is_read_without_the_accelerator() -> None:
    assert read_requests is None
    assert cut_from(frame()) == []
