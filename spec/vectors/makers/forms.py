"""Bytes by hand: frames, and every form that msgpack has for a value.

Written from the specification alone, with `struct` and nothing else, so that an error in zcproto.wire or
in a msgpack library does not make the vectors wrong in the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

NOW = 1_767_225_600_000  # 2026-01-01T00:00:00Z
TOLERANCE_MS = 30_000
SALT = bytes.fromhex("a1b2c3d4e5f60718")
NO_TOKEN = bytes(32)
TOKEN = bytes(range(1, 33))
OTHER_TOKEN = bytes(range(101, 133))
LIMIT = 1_048_576
LIMIT_BEFORE_SESSION = 16_384

KINDS = {
    "WELCOME": 0x01,
    "REQUEST": 0x02,
    "RESPONSE": 0x03,
    "ERROR": 0x04,
    "CANCEL": 0x05,
    "PING": 0x06,
    "PONG": 0x07,
    "GOAWAY": 0x08,
    "EVENT": 0x09,
}

STREAM_KINDS = {
    "OPEN": 0x10,
    "ITEM": 0x11,
    "END": 0x12,
    "CREDIT": 0x13,
    "ACCEPTED": 0x14,
    "CALL": 0x18,
    "RESULT": 0x19,
    "FAILURE": 0x1A,
    "WITHDRAW": 0x1B,
}
ALL_KINDS = KINDS | STREAM_KINDS

CODES = {
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
    "PROTOCOL_ERROR": 64,
    "FRAME_TOO_LARGE": 65,
    "REPLAYED": 66,
    "STALE_TIMESTAMP": 67,
    "TOKEN_EXPIRED": 68,
    "TOKEN_REVOKED": 69,
    "SESSION_REPLACED": 70,
}


@dataclass(frozen=True)
class Frame:
    """The fields of one frame. `length` is computed unless it is given."""

    kind: int
    stream: int = 0
    body: bytes = b""
    token: bytes = NO_TOKEN
    counter: int = 1
    timestamp: int = NOW
    salt: bytes = SALT
    version: int = 1
    flags: int = 0
    length: int | None = None

    @property
    def real_length(self) -> int:
        return 64 + len(self.body) if self.length is None else self.length

    def encode(self) -> bytes:
        return (
            struct.pack(
                "!IBBHIQ", self.real_length, self.version, self.kind, self.flags, self.stream, self.timestamp
            )
            + self.salt
            + struct.pack("!Q", self.counter)
            + self.token
            + self.body
        )

    def but(self, **changes: Any) -> Frame:
        """Return the same frame with other fields."""
        return replace(self, **changes)


# msgpack, form by form. Functions that end in a width take that form even where a shorter one exists.


def uint8(n: int) -> bytes:
    return struct.pack("!BB", 0xCC, n)


def uint16(n: int) -> bytes:
    return struct.pack("!BH", 0xCD, n)


def uint32(n: int) -> bytes:
    return struct.pack("!BI", 0xCE, n)


def uint64(n: int) -> bytes:
    return struct.pack("!BQ", 0xCF, n)


def int8(n: int) -> bytes:
    return struct.pack("!Bb", 0xD0, n)


def int16(n: int) -> bytes:
    return struct.pack("!Bh", 0xD1, n)


def int32(n: int) -> bytes:
    return struct.pack("!Bi", 0xD2, n)


def int64(n: int) -> bytes:
    return struct.pack("!Bq", 0xD3, n)


def float32(x: float) -> bytes:
    return struct.pack("!Bf", 0xCA, x)


def float64(x: float) -> bytes:
    return struct.pack("!Bd", 0xCB, x)


def fixstr(raw: bytes) -> bytes:
    return bytes([0xA0 | len(raw)]) + raw


def str8(raw: bytes) -> bytes:
    return struct.pack("!BB", 0xD9, len(raw)) + raw


def str16(raw: bytes) -> bytes:
    return struct.pack("!BH", 0xDA, len(raw)) + raw


def str32(raw: bytes) -> bytes:
    return struct.pack("!BI", 0xDB, len(raw)) + raw


def bin8(raw: bytes) -> bytes:
    return struct.pack("!BB", 0xC4, len(raw)) + raw


def bin16(raw: bytes) -> bytes:
    return struct.pack("!BH", 0xC5, len(raw)) + raw


def bin32(raw: bytes) -> bytes:
    return struct.pack("!BI", 0xC6, len(raw)) + raw


def fixarray(*items: bytes) -> bytes:
    return bytes([0x90 | len(items)]) + b"".join(items)


def array16(*items: bytes) -> bytes:
    return struct.pack("!BH", 0xDC, len(items)) + b"".join(items)


def array32(*items: bytes) -> bytes:
    return struct.pack("!BI", 0xDD, len(items)) + b"".join(items)


def fixmap(*pairs: bytes) -> bytes:
    """Return a map of alternating keys and values."""
    return bytes([0x80 | len(pairs) // 2]) + b"".join(pairs)


def map16(*pairs: bytes) -> bytes:
    return struct.pack("!BH", 0xDE, len(pairs) // 2) + b"".join(pairs)


def map32(*pairs: bytes) -> bytes:
    return struct.pack("!BI", 0xDF, len(pairs) // 2) + b"".join(pairs)


def pack(value: Any) -> bytes:
    """Return a value in its shortest form."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return _pack_int(value)
        case float():
            return float64(value)
        case str():
            raw = value.encode()
            return _shortest(len(raw), ((32, fixstr), (2**8, str8), (2**16, str16), (2**32, str32)))(raw)
        case bytes():
            return _shortest(len(value), ((2**8, bin8), (2**16, bin16), (2**32, bin32)))(value)
        case list():
            items = [pack(item) for item in value]
            return _shortest(len(items), ((16, fixarray), (2**16, array16), (2**32, array32)))(*items)
        case dict():
            pairs = [pack(part) for pair in value.items() for part in pair]
            return _shortest(len(value), ((16, fixmap), (2**16, map16), (2**32, map32)))(*pairs)
    raise TypeError(type(value).__name__)


def _pack_int(n: int) -> bytes:
    if n >= 0:
        if n < 128:
            return bytes([n])
        return _shortest(n, ((2**8, uint8), (2**16, uint16), (2**32, uint32), (2**64, uint64)))(n)
    if n >= -32:
        return bytes([n + 256])
    return _shortest(-n - 1, ((2**7, int8), (2**15, int16), (2**31, int32), (2**63, int64)))(n)


def _shortest(size: int, forms: tuple[tuple[int, Callable[..., bytes]], ...]) -> Callable[..., bytes]:
    return next(form for bound, form in forms if size < bound)
