"""Define tokens, the stored digests of them, and their text forms.

Decides the format of access tokens, refresh tokens and session ids, and how each is derived from random bytes.

- An access token is 32 random bytes. Only its SHA-256 is stored; a plain hash is enough for 256 random bits (OWASP
  ASVS 5.0, 6.5.2).
- A refresh token is 32 random bytes too: a *family* of 16 that is constant for the life of a session, then 16 that
  are new at each refresh. Stored are the SHA-256 of the whole and, as the session id, a digest of the family.
  Every refresh token of a session thus leads to that session without storing spent tokens: the right family with
  the wrong rest is a spent token (RFC 9700 section 4.14.2 allows encoding the grant in the token). The family is
  as secret as the rest, and the holder of an older token still has to guess 128 bits in one attempt.
- A session id is 16 bytes of a digest with its own label, so an id from a log or a list is not a credential.

It must not know: users, time, the source of random bytes.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from hashlib import sha256
from typing import Final

TOKEN_SIZE: Final = 32
DIGEST_SIZE: Final = 32
FAMILY_SIZE: Final = 16
ID_SIZE: Final = 16

_ID_LABEL: Final = b"zcp/1 session id\0"

# `base64` needs two more calls for the same; every login makes three of these texts.
_TO_URL_ALPHABET: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL_ALPHABET: Final = bytes.maketrans(b"-_+/", b"+/..")  # a dot is in no alphabet
_TOKEN_LENGTH: Final = 43
_ID_LENGTH: Final = 22
# The last character carries 2 or 4 unused bits, which are 0 (RFC 4648 section 3.5).
_TOKEN_ENDS: Final = frozenset("AEIMQUYcgkosw048")
_ID_ENDS: Final = frozenset("AQgw")


def digest_of(token: bytes) -> bytes:
    """Return the stored digest of a token: its SHA-256."""
    return sha256(token).digest()


def id_of(family: bytes) -> bytes:
    """Return the session id (16 bytes) of a family of refresh tokens."""
    return sha256(_ID_LABEL + family).digest()[:ID_SIZE]


def token_from_text(text: str) -> bytes | None:
    """Return the 32 bytes of a token's text, or None for text that `token_text` does not produce. Never raises."""
    return _bytes(text, b"=") if len(text) == _TOKEN_LENGTH and text[-1] in _TOKEN_ENDS else None


def id_text(session_id: bytes) -> str:
    """Return a session id as text: base64url without padding, 22 characters for 16 bytes."""
    # `translate` could also delete the padding, but takes twice as long then.
    return b2a_base64(session_id, newline=False).rstrip(b"=").translate(_TO_URL_ALPHABET).decode("ascii")


token_text: Final = id_text
"""Returns a token as text in the same form, 43 characters for 32 bytes."""


def id_from_text(text: str) -> bytes | None:
    """Return the 16 bytes of an id's text, or None for text that `id_text` does not produce. Never raises."""
    return _bytes(text, b"==") if len(text) == _ID_LENGTH and text[-1] in _ID_ENDS else None


def _bytes(text: str, padding: bytes) -> bytes | None:
    try:
        return a2b_base64(text.encode("ascii").translate(_FROM_URL_ALPHABET) + padding, strict_mode=True)
    except ValueError:
        return None
