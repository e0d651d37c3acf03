from __future__ import annotations

from zcproto.wire.frame import HEADER_SIZE, LENGTH_SIZE, PING, REQUEST, encode_frame
from zcproto.wire.usual import cut, judge

SALT = b"saltsalt"
TOKEN = bytes(range(32))
WALL = 1_700_000_000_000
TOLERANCE = 30_000
LIMIT = HEADER_SIZE - LENGTH_SIZE + 10


def frame(
    *,
    head: int = REQUEST,
    stream: int = 7,
    timestamp: int = WALL,
    salt: bytes = SALT,
    counter: int = 6,
    token: bytes = TOKEN,
    size: int = 10,
) -> bytes:
    return encode_frame(head, stream, timestamp, salt, counter, token, bytes(size))


def judged(data: bytes) -> tuple[int, int, bytes] | None:
    return judge(data, LIMIT, REQUEST, SALT, 5, TOKEN, WALL, TOLERANCE)


def cut_from(data: bytes) -> list[tuple[int, int, bytes, int]]:
    return cut(data, LIMIT, REQUEST, SALT, 5, TOKEN, WALL, TOLERANCE)


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
    for size in (0, 1, 10):
        data = frame(size=size, counter=2**64 - 1)
        assert judged(data) == (7, 2**64 - 1, bytes(size))
        assert cut_from(data) == [(7, 2**64 - 1, bytes(size), len(data))]
    for edge in (WALL - TOLERANCE, WALL + TOLERANCE):
        assert judged(frame(timestamp=edge)) is not None


def test_unusual_frame_is_left_to_the_decoder() -> None:
    for what, data in UNUSUAL.items():
        assert judged(data) is None, what
        assert cut_from(data) == [], what


def test_several_frames_are_cut_up_to_the_first_unusual_one() -> None:
    first, second = frame(counter=6), frame(counter=8, stream=9, size=0)
    size = len(first)
    expected = [(7, 6, bytes(10), size), (9, 8, b"", size + len(second))]
    assert cut_from(first + second) == expected
    assert judged(first + second) is None
    for what, data in UNUSUAL.items():
        assert cut_from(first + second + data) == expected, what
    assert cut_from(first + first) == expected[:1]  # the counter must grow
