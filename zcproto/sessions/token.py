"""Tokens, the digests that are kept of them, and their text forms.

What this file decides: the shape of access tokens, refresh tokens and session ids, and how each follows
from random bytes.

- An access token is 32 random bytes. Only its SHA-256 is kept. A plain hash is enough: nothing can be
  searched in 256 random bits (OWASP ASVS 5.0, 6.5.2).
- A refresh token is 32 random bytes too: a *family* of 16 that stays the same for the whole life of a
  session, then 16 that are new at each refresh. Kept are the SHA-256 of the whole and, as the session's
  id, a digest of the family. So every refresh token that a session ever had leads to that session, with
  nothing stored for the spent ones: whoever shows the right family with the wrong rest holds a spent
  token (RFC 9700 section 4.14.2 allows to encode the grant in the token). The family is as secret as the
  rest: nobody can make one up, and who has an older token of the family still has to guess 128 bits, in
  one try.
- A session's id is 16 bytes of a digest under a label of its own, so that an id seen in a log or in a
  list gives nothing to try.

It must not know: users, time, where the random bytes come from.
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

# `base64` has the same in two more calls each; every login makes three of these texts.
_TO_URL_ALPHABET: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL_ALPHABET: Final = bytes.maketrans(b"-_", b"+/")
_TOKEN_LENGTH: Final = 43
_ID_LENGTH: Final = 22


def digest_of(token: bytes) -> bytes:
    """What is kept of a token: its SHA-256."""
    return sha256(token).digest()


def id_of(family: bytes) -> bytes:
    """The session id (16 bytes) that belongs to a family of refresh tokens."""
    return sha256(_ID_LABEL + family).digest()[:ID_SIZE]


def token_text(token: bytes) -> str:
    """A token as text: base64url without padding, 43 characters for the 32 bytes."""
    return _text(token)


def token_from_text(text: str) -> bytes | None:
    """The 32 bytes of a token's text, or None for any text that `token_text` does not write. Never raises."""
    return _bytes(text, b"=") if len(text) == _TOKEN_LENGTH else None


def id_text(session_id: bytes) -> str:
    """A session id as text: base64url without padding, 22 characters for the 16 bytes."""
    return _text(session_id)


def id_from_text(text: str) -> bytes | None:
    """The 16 bytes of an id's text, or None for any text that `id_text` does not write. Never raises."""
    return _bytes(text, b"==") if len(text) == _ID_LENGTH else None


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).translate(_TO_URL_ALPHABET, b"=").decode("ascii")


def _bytes(text: str, padding: bytes) -> bytes | None:
    try:
        data = a2b_base64(text.encode("ascii").translate(_FROM_URL_ALPHABET) + padding)
    except ValueError:
        return None
    # The decoder passes over what it does not know, and over the unused bits of the last character (RFC 4648
    # section 3.5). Each of these has one text only.
    return data if _text(data) == text else None
