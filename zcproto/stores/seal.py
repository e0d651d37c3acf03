"""Seal the pair of a refresh, so that another process can repeat it (zcp1.md, section 9.6).

Decides how a pair is encrypted. Only the holder of the spent refresh token can open it; a copy of the store gives
no access.

It must not know: stores, time.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from zcproto.sessions.token import TOKEN_SIZE

_LABEL: Final = b"zcp/1 sealed pair\0"
_NONCE: Final = bytes(12)  # each key seals one pair


def _cipher(spent_token: bytes, token_digest: bytes) -> AESGCM:
    return AESGCM(hmac.digest(spent_token, _LABEL + token_digest, "sha256"))


def seal_pair(spent_token: bytes, token_digest: bytes, token: bytes, refresh_token: bytes) -> bytes:
    """Encrypt a new pair for the holder of the spent refresh token. `token_digest` is of the new access token."""
    return _cipher(spent_token, token_digest).encrypt(_NONCE, bytes(token + refresh_token), None)


def open_pair(spent_token: bytes, token_digest: bytes, sealed: bytes) -> tuple[bytes, bytes] | None:
    """Reverse `seal_pair`. Return None if the pair was sealed for another token, or is damaged."""
    try:
        pair = _cipher(spent_token, token_digest).decrypt(_NONCE, sealed, None)
    except (InvalidTag, ValueError):
        return None
    return pair[:TOKEN_SIZE], pair[TOKEN_SIZE:]
