"""Build the messages that a device signs and a server verifies (zcp1.md, section 9).

`salt` is the salt of the connection and `leaf` the SHA-256 of its server certificate (DER), so a signature is
not valid on another connection or relayed through another server.
"""

from __future__ import annotations

from typing import Final

SIGNATURE_SIZE: Final = 64
PUBLIC_KEY_SIZE: Final = 32

_OPEN: Final = b"zcp/1 open\0"
_ATTACH: Final = b"zcp/1 attach\0"


def open_message(salt: bytes, leaf: bytes, device: str) -> bytes:
    """Return the message that opens a session."""
    return _OPEN + salt + leaf + device.encode("utf-8", "surrogatepass")


def attach_message(salt: bytes, leaf: bytes, token: bytes) -> bytes:
    """Return the message that attaches a bound token to another connection."""
    return _ATTACH + salt + leaf + token
