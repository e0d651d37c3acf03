"""Lay out, encode and validate the header of a frame (zcp1.md, section 5).

    offset  size  field
    0       4     length     bytes that follow this field: 64 + body
    4       1     version    1
    5       1     kind       `Kind`
    6       2     flags      0
    8       4     stream     request id; 0 for the connection itself
    12      8     timestamp  creation time, milliseconds since the Unix epoch
    20      8     salt       nonce, first half: salt of the connection
    28      8     counter    nonce, second half: incremented by each frame
    36      32    token      session token, or zeros
    68      n     body       one msgpack value, or empty

All integers are unsigned and big-endian. Version, kind and flags are read as one 32-bit word, the `head`, so that
the common frame costs one comparison.

It must not know: clocks, sessions, messages.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import Final, NamedTuple

from zcproto.accelerator import accelerated
from zcproto.errors import Code, ProtocolError

VERSION: Final = 1
HEADER: Final = struct.Struct("!IIIQ8sQ32s")  # length, head, stream, timestamp, salt, counter, token
HEADER_SIZE: Final = HEADER.size
LENGTH_SIZE: Final = 4
MIN_LENGTH: Final = HEADER_SIZE - LENGTH_SIZE
SALT_SIZE: Final = 8
TOKEN_SIZE: Final = 32
NO_TOKEN: Final = bytes(TOKEN_SIZE)
MAX_STREAM: Final = 2**32 - 1

UnnumberedFrame = tuple[int, int, int, bytes, bytes]
"""A frame to send: head, stream, timestamp, token, body."""

RawFrame = tuple[int, int, int, int, bytes, int, bytes, bytes]
"""A decoded frame: length, head, stream, timestamp, salt, counter, token, body."""


class Kind(IntEnum):
    """Kinds of frames."""

    WELCOME = 0x01
    REQUEST = 0x02
    RESPONSE = 0x03
    ERROR = 0x04
    CANCEL = 0x05
    PING = 0x06
    PONG = 0x07
    GOAWAY = 0x08
    EVENT = 0x09
    OPEN = 0x10
    ITEM = 0x11
    END = 0x12
    CREDIT = 0x13
    ACCEPTED = 0x14
    CALL = 0x18
    RESULT = 0x19
    FAILURE = 0x1A
    WITHDRAW = 0x1B


class Side(Enum):
    """The two ends of a connection."""

    SERVER = "server"
    CLIENT = "client"


def head_of(kind: Kind) -> int:
    """Return the version, kind and flags of this kind as one 32-bit word."""
    return VERSION << 24 | kind << 16


WELCOME: Final = head_of(Kind.WELCOME)
REQUEST: Final = head_of(Kind.REQUEST)
RESPONSE: Final = head_of(Kind.RESPONSE)
ERROR: Final = head_of(Kind.ERROR)
CANCEL: Final = head_of(Kind.CANCEL)
PING: Final = head_of(Kind.PING)
PONG: Final = head_of(Kind.PONG)
GOAWAY: Final = head_of(Kind.GOAWAY)
EVENT: Final = head_of(Kind.EVENT)
OPEN: Final = head_of(Kind.OPEN)
ITEM: Final = head_of(Kind.ITEM)
END: Final = head_of(Kind.END)
CREDIT: Final = head_of(Kind.CREDIT)
ACCEPTED: Final = head_of(Kind.ACCEPTED)
CALL: Final = head_of(Kind.CALL)
RESULT: Final = head_of(Kind.RESULT)
FAILURE: Final = head_of(Kind.FAILURE)
WITHDRAW: Final = head_of(Kind.WITHDRAW)

MAX_LENGTH: Final = 2**32 - 1


class Accepted(NamedTuple):
    """The heads that one end may receive, and the largest `length` of an ITEM."""

    heads: frozenset[int]
    max_item: int = MAX_LENGTH


ALLOWED: Final = {
    Side.SERVER: Accepted(frozenset({REQUEST, CANCEL, PING, PONG})),
    Side.CLIENT: Accepted(frozenset({WELCOME, RESPONSE, ERROR, PING, PONG, GOAWAY, EVENT})),
}
"""What each side may receive if the server has not announced streams."""

_OF_STREAMS: Final = {
    Side.SERVER: frozenset({OPEN, ITEM, END, CREDIT}),
    Side.CLIENT: frozenset({ITEM, CREDIT}),
}

_OF_CALLS: Final = {
    Side.SERVER: frozenset({RESULT, FAILURE}),
    Side.CLIENT: frozenset({CALL, WITHDRAW}),
}

ON_A_STREAM: Final = frozenset(
    {REQUEST, RESPONSE, CANCEL, OPEN, ITEM, END, CREDIT, ACCEPTED, CALL, RESULT, FAILURE, WITHDRAW}
)
"""Heads whose stream is never 0. ERROR may have any stream; all others have stream 0."""

WITHOUT_BODY: Final = frozenset({CANCEL, PING, PONG, END, WITHDRAW})


def accepted_with_streams(receiver: Side, max_item: int) -> Accepted:
    """Return what a side may receive once the server has announced streams."""
    return Accepted(ALLOWED[receiver].heads | _OF_STREAMS[receiver], max_item)


def accepted_with_durable(accepted: Accepted) -> Accepted:
    """Return what a client may receive once the server has announced durable streams, too."""
    return accepted._replace(heads=accepted.heads | {ACCEPTED})


def accepted_with_calls(receiver: Side, accepted: Accepted) -> Accepted:
    """Return what a side may receive once the server has announced calls, too."""
    return accepted._replace(heads=accepted.heads | _OF_CALLS[receiver])


@accelerated
def encode_frame(
    head: int, stream: int, timestamp: int, salt: bytes, counter: int, token: bytes, body: bytes = b""
) -> bytes:
    """Return the bytes of one frame. The caller respects the peer's limit."""
    return HEADER.pack(MIN_LENGTH + len(body), head, stream, timestamp, salt, counter, token) + body


@accelerated
def encode_frames(frames: list[UnnumberedFrame], salt: bytes, counter: int) -> bytes:
    """Return the bytes of frames with these counters: `counter` and those after it."""
    return b"".join(
        [
            HEADER.pack(MIN_LENGTH + len(body), head, stream, timestamp, salt, number, token) + body
            for number, (head, stream, timestamp, token, body) in enumerate(frames, counter)
        ]
    )


def check_length(length: int, limit: int) -> None:
    """Validate the length before anything is buffered for it. Raises ProtocolError."""
    if length < MIN_LENGTH:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame length below 64")
    if length > limit:
        raise ProtocolError(Code.FRAME_TOO_LARGE, "frame longer than the limit")


def check_head(head: int, stream: int, length: int, accepted: Accepted) -> None:
    """Validate version, kind, flags, stream and the length of an ITEM, in this order. Raises ProtocolError."""
    if head >> 24 != VERSION:
        raise ProtocolError(Code.PROTOCOL_ERROR, "unsupported frame version")
    bare_head = head & 0xFFFF0000
    if bare_head not in accepted.heads:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame kind not allowed here")
    if head & 0xFFFF:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame flags set")
    if bare_head == ERROR:
        return
    if (bare_head in ON_A_STREAM) != (stream != 0):
        raise ProtocolError(Code.PROTOCOL_ERROR, "stream does not fit the frame kind")
    if bare_head == ITEM and length > accepted.max_item:
        raise ProtocolError(Code.FRAME_TOO_LARGE, "item longer than the limit")
