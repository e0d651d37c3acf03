"""Public keys and signatures of Ed25519 (RFC 8032).

What this file decides: which bytes are a public key that stands for a secret at all. A point of small order has
signatures that anyone can make; bytes that are no point have none.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from zcproto.wire.signing import PUBLIC_KEY_SIZE

_P: Final = 2**255 - 19
_D: Final = -121665 * pow(121666, -1, _P) % _P
_SIGN: Final = 1 << 255
_ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER: Final = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})
"""The y of the eight points whose order divides 8."""


def is_public_key(data: bytes) -> bool:
    """Whether bytes are a point of the curve, written in the one right way, that is none of small order."""
    if len(data) != PUBLIC_KEY_SIZE:
        return False
    y = int.from_bytes(data, "little") & ~_SIGN
    if y >= _P or y in _SMALL_ORDER:
        return False
    x_squared = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    return pow(x_squared, (_P - 1) // 2, _P) == 1


def is_signed(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether a signature over a message is one by the public key's owner."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
