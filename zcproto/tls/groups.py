"""Read the group of the key exchange from a ServerHello, which no API of Python before 3.15 reports.

The bytes are those of our own OpenSSL, so that their lengths are correct.
"""

from __future__ import annotations

import struct
from typing import Final

NAMES: Final = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x0019: "secp521r1",
    0x001D: "x25519",
    0x001E: "x448",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
}
"""Names of the IANA registry "TLS Supported Groups"."""

_HANDSHAKE_RECORD: Final = 22
_SERVER_HELLO: Final = 2
_KEY_SHARE: Final = 51
_MESSAGE_AT: Final = 5
_SESSION_ID_AT: Final = _MESSAGE_AT + 4 + 2 + 32
_AFTER_SESSION_ID: Final = 2 + 1 + 2
"""Bytes of the cipher suite, the compression method and the length of the extensions."""

_uint16: Final = struct.Struct("!H").unpack_from
_extension_header: Final = struct.Struct("!HH").unpack_from


def group_of(data: bytes) -> int:
    """Return the group in a ServerHello or HelloRetryRequest (RFC 8446 section 4.1.3); 0 for other records."""
    if data[0] != _HANDSHAKE_RECORD or data[_MESSAGE_AT] != _SERVER_HELLO:
        return 0
    at = _SESSION_ID_AT + 1 + data[_SESSION_ID_AT] + _AFTER_SESSION_ID
    end = _MESSAGE_AT + _uint16(data, _MESSAGE_AT - 2)[0]
    while at < end:
        kind, size = _extension_header(data, at)
        at += 4
        if kind == _KEY_SHARE:
            return int(_uint16(data, at)[0])
        at += size
    return 0


def group_name(group: int) -> str:
    """Return the name of a group, or its number if it has no name here."""
    return NAMES.get(group) or f"0x{group:04x}"
