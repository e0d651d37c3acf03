"""Sign messages, so that a receiver can verify their origin and age.

    Zcproto-Signature: t=1767225600,v1=HEX
    HEX = HMAC-SHA256(secret, b"1767225600" + b"." + body)

Rules: the secret is the text of its file in UTF-8. The time is signed with the body, so that a captured message
cannot be replayed later. Of several `v1` one must match, so that a secret can be rotated. Unknown parts of the
header are ignored. Comparisons take constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

from zcproto.common.secret import Secret

HEADER: Final = "Zcproto-Signature"
TOLERANCE_S: Final = 300
"""Maximum age of a signature, and maximum time in the future, in seconds."""

MAX_HEADER: Final = 1024
_TIME: Final = re.compile(r"[0-9]{1,12}")
_MS: Final = 1000


def sign(secret: Secret[str], body: bytes, wall: int) -> str:
    """Return the value of the header for a body sent now."""
    seconds = wall // _MS
    return f"t={seconds},v1={_digest(secret, body, str(seconds))}"


def check_signature(
    secret: Secret[str], body: bytes, header: str, wall: int, tolerance_s: int = TOLERANCE_S
) -> str:
    """Return the reason why a message is invalid, or an empty string. Accepts any header."""
    if len(header) > MAX_HEADER or not header.isascii():
        return "the header is not a signature"
    pairs = [pair.strip().partition("=") for pair in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    digests = [value for name, _, value in pairs if name == "v1"]
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not digests:
        return "the header is not a signature"
    right = _digest(secret, body, times[0])
    # Compare all, so that the time does not reveal which one matched.
    if not sum(hmac.compare_digest(right, each) for each in digests):
        return "the signature does not match: wrong secret or changed body"
    age_s = wall // _MS - int(times[0])
    if abs(age_s) > tolerance_s:
        return f"the signature is {age_s} s old: {tolerance_s} s are allowed"
    return ""


def _digest(secret: Secret[str], body: bytes, seconds: str) -> str:
    signed = seconds.encode("ascii") + b"." + body
    return hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()
