"""How a receiver knows that a message is from here, and that it is no old one.

    Zcproto-Signature: t=1767225600,v1=HEX
    HEX = HMAC-SHA256(secret, b"1767225600" + b"." + body)

Rules: the secret is the text of its file, as UTF-8. The time is signed with the body, so that who has seen a
message cannot send it again later. Several `v1` may stand there, of which one must be right: so a secret can be
changed. What is not known in the header is passed over. All is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

from zcproto.common.secret import Secret

HEADER: Final = "Zcproto-Signature"
TOLERANCE_S: Final = 300
"""How old, or how far in the future, a signature may be for `check_signature`."""

MAX_HEADER: Final = 1024
_TIME: Final = re.compile(r"[0-9]{1,12}")
_MS: Final = 1000


def sign(secret: Secret[str], body: bytes, wall: int) -> str:
    """The value of the header for a body that is sent now."""
    seconds = wall // _MS
    return f"t={seconds},v1={_digest(secret, body, str(seconds))}"


def check_signature(
    secret: Secret[str], body: bytes, header: str, wall: int, tolerance_s: int = TOLERANCE_S
) -> str:
    """What is wrong with a message; empty if it is good. Any header may be given."""
    if len(header) > MAX_HEADER or not header.isascii():
        return "the header is no signature"
    pairs = [pair.strip().partition("=") for pair in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    digests = [value for name, _, value in pairs if name == "v1"]
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not digests:
        return "the header is no signature"
    right = _digest(secret, body, times[0])
    # All are compared, so that the time says nothing of which one was right.
    if not sum(hmac.compare_digest(right, each) for each in digests):
        return "the signature is not right: another secret, or another body"
    age_s = wall // _MS - int(times[0])
    if abs(age_s) > tolerance_s:
        return f"the signature is {age_s} s old: {tolerance_s} s are allowed"
    return ""


def _digest(secret: Secret[str], body: bytes, seconds: str) -> str:
    signed = seconds.encode("ascii") + b"." + body
    return hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()
