"""What a device signs (the contract's section 6): the same bytes for whoever signs and whoever verifies.

`salt` is the connection's, `leaf` the SHA-256 of the server's certificate (DER) as it was shown there: so a
signature is worth nothing on another connection, or relayed through another server.
"""

from __future__ import annotations

from typing import Final

SIGNATURE_SIZE: Final = 64
PUBLIC_KEY_SIZE: Final = 32

_OPEN: Final = b"zcp/1 open\0"
_ATTACH: Final = b"zcp/1 attach\0"


def open_message(salt: bytes, leaf: bytes, device: str) -> bytes:
    """To open a session."""
    return _OPEN + salt + leaf + device.encode("utf-8", "surrogatepass")


def attach_message(salt: bytes, leaf: bytes, token: bytes) -> bytes:
    """To use a bound token on a further connection."""
    return _ATTACH + salt + leaf + token
