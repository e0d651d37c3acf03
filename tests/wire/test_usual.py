from __future__ import annotations

from typing import Any

from zcproto.wire.frame import HEADER_SIZE, LENGTH_SIZE, PING, REQUEST, encode_frame
from zcproto.wire.message import NO_META, RequestMeta, encode_body, unpack
from zcproto.wire.usual import DECODING, RequestRules, UsualRequest, cut_values, read_request

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


def read_from(data: bytes, at: int = 0, rules: RequestRules = REQUEST_RULES) -> UsualRequest | None:
    return read_request(data, at, rules, 5, WALL)


def cut_from(data: bytes) -> list[tuple[int, int, Any, int]]:
    return cut_values(data, LIMIT, REQUEST, SALT, 5, TOKEN, WALL, TOLERANCE, 2, unpack)


UNUSUAL = {
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


def test_usual_frame_is_recognised() -> None:
    for size, value in ((1, 0), (2, b""), (10, bytes(8))):
        data = frame(size=size, counter=2**64 - 1)
        assert cut_from(data) == [(7, 2**64 - 1, value, len(data))]
    for edge in (WALL - TOLERANCE, WALL + TOLERANCE):
        assert len(cut_from(frame(timestamp=edge))) == 1
        assert read_from(frame(timestamp=edge, body=BODY)) is not None


def test_unusual_frame_is_left_to_the_decoder() -> None:
    for what, data in UNUSUAL.items():
        assert read_from(data) is None, what
        assert cut_from(data) == [], what


def test_several_frames_are_cut_up_to_the_first_unusual_one() -> None:
    first, second = frame(counter=6), frame(counter=8, stream=9, size=1)
    size = len(first)
    expected = [(7, 6, bytes(8), size), (9, 8, 0, size + len(second))]
    assert cut_from(first + second) == expected
    for what, data in UNUSUAL.items():
        assert cut_from(first + second + data) == expected, what
    assert cut_from(first + first) == expected[:1]  # the counter must grow
    for body in (b"", b"\xc0\xc0", b"\xd4\x05\x00", b"\xa1\xff", b"\x91\x91\x90", b"\x81\x01\x01"):
        assert cut_from(first + second + frame(counter=9, body=body)) == expected, body


def test_usual_request_is_decoded_where_it_begins() -> None:
    data = frame(counter=8, body=BODY)
    event = (7, TOKEN, SESSION, "m", {"a": 1}, NO_META)
    assert read_from(data) == (event, 8, 0)
    assert read_from(data + frame()) == (event, 8, len(data))
    assert read_from(frame() + data, len(frame())) == (event, 8, 0)
    assert read_from(frame() + data + b"x", len(frame())) == (event, 8, len(frame() + data))
    assert read_from(data, len(data)) is None
    assert read_request(data, 0, REQUEST_RULES, 8, WALL) is None  # the counter must grow
    for what in ("another token", "too old", "stream 0"):
        start, end = UNUSUAL[what][:HEADER_SIZE], len(BODY) - 10
        assert read_from(bytes((*start[:3], start[3] + end)) + start[4:] + BODY) is None, what


def test_every_well_formed_request_without_a_past_deadline_is_usual() -> None:
    rules = (1_000, *REQUEST_RULES[1:])

    def decoded(value: Any) -> tuple[Any, ...] | None:
        found = read_from(frame(body=encode_body(value)), rules=rules)
        return found and found[0][3:]

    for meta, expected in (
        ({"deadline_ms": 1}, RequestMeta(1)),
        ({"deadline_ms": 2**64 - 1}, RequestMeta(2**64 - 1)),
        ({"deadline_ms": None}, NO_META),
        ({"deadline_ms": 5, "other": 1}, RequestMeta(5)),
        ({"idempotency_key": "k"}, RequestMeta(None, "k")),
        ({"other": 1}, NO_META),
        ({}, NO_META),
    ):
        for _ in range(2):  # a method becomes known with its first request
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
        assert read_from(frame(body=body), rules=rules) is None, body
