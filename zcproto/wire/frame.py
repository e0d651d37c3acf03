"""One frame: where its fields are, how it is written, and what its header alone must satisfy.

    offset  size  field
    0       4     length     bytes that follow this field: 64 + body
    4       1     version    1
    5       1     kind       what the frame says (`Kind`)
    6       2     flags      0
    8       4     stream     request id; 0 speaks of the connection
    12      8     timestamp  when the frame was made, milliseconds since the Unix epoch
    20      8     salt       nonce, first half: the connection's salt
    28      8     counter    nonce, second half: counts up
    36      32    token      the session's token, or zeros
    68      n     body       one msgpack value, or nothing

All integers are unsigned and big-endian. Version, kind and flags are read as one 32-bit word, the `head`,
so that the common frame costs one comparison. This module knows the layout; it knows no clock, no session
and no message.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import Final

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
MAX_COUNTER: Final = 2**64 - 1

RawHeader = tuple[int, int, int, int, bytes, int, bytes]
"""A header as decoded: length, head, stream, timestamp, salt, counter, token."""

RawFrame = tuple[int, int, int, int, bytes, int, bytes, bytes]
"""A frame as decoded: length, head, stream, timestamp, salt, counter, token, body."""


class Kind(IntEnum):
    """What a frame says."""

    WELCOME = 0x01
    REQUEST = 0x02
    RESPONSE = 0x03
    ERROR = 0x04
    CANCEL = 0x05
    PING = 0x06
    PONG = 0x07
    GOAWAY = 0x08
    EVENT = 0x09


class Side(Enum):
    """The two ends of a connection."""

    SERVER = "server"
    CLIENT = "client"


def head_of(kind: Kind) -> int:
    """The word that version, kind and flags make in a frame of this kind."""
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

ACCEPTED: Final = {
    Side.SERVER: frozenset({REQUEST, CANCEL, PING, PONG}),
    Side.CLIENT: frozenset({WELCOME, RESPONSE, ERROR, PING, PONG, GOAWAY, EVENT}),
}
"""The heads that each side may receive."""

ON_A_STREAM: Final = frozenset({REQUEST, RESPONSE, CANCEL})
"""Heads whose stream is never 0. ERROR may speak of either; all others have stream 0."""

WITHOUT_BODY: Final = frozenset({CANCEL, PING, PONG})


def encode_frame(
    head: int, stream: int, timestamp: int, salt: bytes, counter: int, token: bytes, body: bytes = b""
) -> bytes:
    """The bytes of one frame. The caller keeps to the limit of the peer."""
    return HEADER.pack(MIN_LENGTH + len(body), head, stream, timestamp, salt, counter, token) + body


def check_length(length: int, limit: int) -> None:
    """Refuse a length from the first four bytes alone, before anything is buffered for it."""
    if length < MIN_LENGTH:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame length below 64")
    if length > limit:
        raise ProtocolError(Code.FRAME_TOO_LARGE, "frame longer than the limit")


def check_head(head: int, stream: int, receiver: Side) -> None:
    """Say what is wrong with version, kind, flags and stream, in this order; return if nothing is."""
    if head >> 24 != VERSION:
        raise ProtocolError(Code.PROTOCOL_ERROR, "unsupported frame version")
    bare_head = head & 0xFFFF0000
    if bare_head not in ACCEPTED[receiver]:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame kind not allowed here")
    if head & 0xFFFF:
        raise ProtocolError(Code.PROTOCOL_ERROR, "frame flags set")
    if bare_head == ERROR:
        return
    if (bare_head in ON_A_STREAM) != (stream != 0):
        raise ProtocolError(Code.PROTOCOL_ERROR, "stream does not fit the frame kind")
