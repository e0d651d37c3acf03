"""What a client does after an error: the table of the contract's section 7, as data.

This module decides only; waiting, refreshing and sending again are done by who asks.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from zcproto.errors import CallError, Code
from zcproto.tls.failure import TlsFailure


class Then(Enum):
    """What comes next."""

    TELL = "tell"  # the application; never again by itself
    LATER = "later"  # again after `retry_after_ms` with jitter, as often as the call's timeout allows
    AT_ONCE = "at_once"  # again at once, once
    RENEW = "renew"  # refresh or open the session, then again, once
    REOPEN = "reopen"  # open another session, then again, once
    ATTACH = "attach"  # prove the session's key on this connection, then again, once


_BY_CODE: Final = {
    Code.UNAVAILABLE: Then.LATER,
    Code.RESOURCE_EXHAUSTED: Then.LATER,
    Code.STALE_TIMESTAMP: Then.AT_ONCE,
    Code.TOKEN_EXPIRED: Then.RENEW,
}

MAX_RETRY_AFTER_MS: Final = 3_600_000

SESSION_IS_OVER: Final = frozenset({Code.TOKEN_REVOKED, Code.SESSION_REPLACED})
"""After one of these a client neither opens a session nor connects again by itself: two clients of one user
would throw each other out for ever."""


def what_next(error: CallError) -> Then:
    """What a client does after a call was answered with an error."""
    if error.code is Code.RESOURCE_EXHAUSTED and "limit" in error.details:
        return Then.TELL  # the user has as many sessions as allowed: waiting does not change that
    if error.code is Code.UNAUTHENTICATED and error.details.get("attach") is True:
        return Then.ATTACH
    if error.code is Code.UNAUTHENTICATED and error.details.get("certificate") is True:
        return Then.REOPEN  # the session belongs to the certificate that was shown before
    return _BY_CODE.get(error.code, Then.TELL)


def retry_after_ms(details: dict[str, Any]) -> int:
    """The delay that a server asks for; 0 if it does not, or not sensibly. At most an hour."""
    value = details.get("retry_after_ms")
    return min(value, MAX_RETRY_AFTER_MS) if value.__class__ is int and value > 0 else 0


_PASSING: Final = frozenset(
    failure.value
    for failure in (
        TlsFailure.HANDSHAKE_TIMEOUT,
        TlsFailure.DISCONNECTED,
        TlsFailure.CONNECTION_RESET,
        TlsFailure.TRUNCATED,
        TlsFailure.BAD_RECORD,
        TlsFailure.PEER_ALERT,
        TlsFailure.OTHER,
    )
)


def may_pass(failure: str) -> bool:
    """Whether a TLS failure can go away by itself. A wrong certificate, pin or peer does not: it is told."""
    return failure in _PASSING
