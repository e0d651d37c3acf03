"""Post messages to a webhook: one signed POST each, by HTTP/1.1 over TLS.

    Zcproto-Signature: t=1767225600,v1=HEX
    HEX = HMAC-SHA256(secret, b"1767225600" + b"." + body)

Rules:
- The secret is the text of its file in UTF-8. The time is signed with the body, so that a captured message cannot
  be replayed later. Of several `v1` one must match, so that a secret can be rotated. Unknown parts of the header
  are ignored. Comparisons take constant time.
- A message is delivered if the status is 200 to 299; the rest of the response is not read. How it is sent:
  zcproto/common/https.py, with the CAs of the system or of `alerts.webhook_ca_file`.

It must not know: the content of a message.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Final

from zcproto.alerts.sinks import Undelivered
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.https import Endpoint, Unreachable, verifying_context
from zcproto.common.secret import Secret

HEADER: Final = "Zcproto-Signature"
TOLERANCE_S: Final = 300
"""Maximum age of a signature, and maximum time in the future, in seconds."""

MAX_HEADER: Final = 1024
_TIME: Final = re.compile(r"[0-9]{1,12}")
REFUSED_TRIES: Final = 3
"""Attempts for a message that the receiver refuses: it may be misconfigured only briefly."""

USER_AGENT: Final = "zcproto-alerts/1"
_RETRIED: Final = frozenset({408, 425, 429})


class Webhook:
    """A sink that posts messages to a validated URL.

    `secret` signs them; None for no signature. Raises ConfigError for an invalid CA file.
    """

    name = "webhook"

    def __init__(
        self, url: str, secret: Secret | None, *, ca_file: Path | None, timeout: float, clock: Clock
    ) -> None:
        is_tls = url.startswith("https:")
        context = verifying_context(ca_file, "alerts.webhook_ca_file") if is_tls else None
        self._endpoint = Endpoint(url, context)
        self.where = self._endpoint.where
        self._secret = secret
        self._timeout = timeout
        self._clock = clock

    async def deliver(self, body: bytes) -> str:
        headers = [("User-Agent", USER_AGENT), ("Content-Type", "application/json")]
        if self._secret is not None:
            headers.append((HEADER, sign(self._secret, body, self._clock.wall())))
        try:
            response = await self._endpoint.send("POST", headers, body, timeout=self._timeout)
        except Unreachable as error:
            raise Undelivered(str(error)) from error
        host, status = self._endpoint.host, response.status
        if 200 <= status < 300:
            return f"{host} answered {status}"
        why = ": redirects are not followed" if 300 <= status < 400 else ""
        is_refused = status < 500 and status not in _RETRIED
        raise Undelivered(f"{host} answered {status}{why}", tries=REFUSED_TRIES if is_refused else None)


# --- signatures ----------------------------------------------------------------------------------------------


def sign(secret: Secret, body: bytes, wall: int) -> str:
    """Return the value of the header for a body sent now."""
    seconds = wall // MS_PER_SECOND
    return f"t={seconds},v1={_digest(secret, body, str(seconds))}"


def check_signature(
    secret: Secret, body: bytes, header: str, wall: int, tolerance_s: int = TOLERANCE_S
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
    age_s = wall // MS_PER_SECOND - int(times[0])
    if abs(age_s) > tolerance_s:
        return f"the signature is {age_s} s old: {tolerance_s} s are allowed"
    return ""


def _digest(secret: Secret, body: bytes, seconds: str) -> str:
    signed = seconds.encode("ascii") + b"." + body
    return hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()
