"""Retries: what a client does after an error, as a table (zcp1.md, section 11.1), and how long it waits.

Decides only; the callers wait, refresh and send again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from zcproto.common.backoff import FULL, backoff_s
from zcproto.errors import CallError, Code, ConnectionClosed
from zcproto.tls.failure import TlsFailure

FIRST_DELAY: Final = 0.1
MAX_DELAY: Final = 30.0
MAX_RETRY_AFTER_MS: Final = 3_600_000
MAX_DEADLINE_MS: Final = 2**53
_MS: Final = 1000


class Then(Enum):
    """The next step after an error."""

    RAISE = "raise"  # to the application; never retry automatically
    LATER = "later"  # retry after `retry_after_ms` and jitter, until the call's timeout
    AT_ONCE = "at_once"  # retry at once, once
    RENEW = "renew"  # refresh or open the session, then retry once
    REOPEN = "reopen"  # open another session, then retry once
    REPLACE = "replace"  # the server has lost the session: open another after a delay, then retry once
    ATTACH = "attach"  # prove the session's key on this connection, then retry once
    CATCH_UP = "catch_up"  # retry at once with the present token, once
    KEEP = "keep"  # of a renewal: go on with the present token, and renew it later


class Shown(Enum):
    """Which token a request had."""

    PRESENT = "present"
    EARLIER = "earlier"  # replaced since then, by a refresh or by another session
    NONE = "none"


_BY_CODE: Final = {
    Code.UNAVAILABLE: Then.LATER,
    Code.RESOURCE_EXHAUSTED: Then.LATER,
    Code.STALE_TIMESTAMP: Then.AT_ONCE,
    Code.TOKEN_EXPIRED: Then.RENEW,
}

SESSION_IS_OVER: Final = frozenset({Code.TOKEN_REVOKED, Code.SESSION_REPLACED})
"""After one of these a client neither opens a session nor reconnects automatically: two clients of one user would
replace each other's sessions forever."""

ENDED_BY_REFUSAL: Final = SESSION_IS_OVER | {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED}
"""Answers to a session method after which the session cannot go on."""

_MAYBE_RUN: Final = frozenset({Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN})

MAX_LOST: Final = 3
"""Maximum of lost answers to `session.open` in a row: each may leave a session that counts towards the limit."""

_TRANSIENT: Final = frozenset(
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


def what_next(error: CallError) -> Then:
    """Return the next step after a call got this error."""
    if error.code is Code.RESOURCE_EXHAUSTED and "limit" in error.details:
        return Then.RAISE  # the user has the maximum of sessions: waiting does not change that
    if error.code is Code.UNAUTHENTICATED and error.details.get("attach") is True:
        return Then.ATTACH
    if error.code is Code.UNAUTHENTICATED and error.details.get("certificate") is True:
        return Then.REOPEN  # the session is bound to the previous client certificate
    if error.code is Code.UNAUTHENTICATED and error.details.get("reason") == "unknown_token":
        return Then.REPLACE
    return _BY_CODE.get(error.code, Then.RAISE)


_INTERRUPTED: Final = frozenset({"draining", "stale"})


def is_interruption(error: CallError | ConnectionClosed, was_lost: bool) -> bool:
    """Return whether a stream ended because of its connection, and not because of its method or session.

    `was_lost`: the client itself found a frame of the stream stale. A method may answer with DATA_LOSS, too.
    """
    if isinstance(error, CallError) and error.details.get("detached") is True:
        return not is_resumed_elsewhere(error)
    return (
        isinstance(error, ConnectionClosed)
        or (error.code is Code.DATA_LOSS and was_lost)
        or (error.code is Code.CANCELLED and error.details.get("reason") in _INTERRUPTED)
    )


def is_resumed_elsewhere(error: CallError) -> bool:
    """Return whether a newer attachment has taken over a durable stream."""
    return error.details.get("detached") is True and error.details.get("reason") == "resumed_elsewhere"


def is_transient(failure: str) -> bool:
    """Return whether a TLS failure may go away without a change: not for a wrong certificate, pin or peer."""
    return failure in _TRANSIENT


def retry_after_ms(details: dict[str, Any]) -> int:
    """Return the delay that a server asks for, at most an hour; 0 if it is missing or invalid."""
    value = details.get("retry_after_ms")
    return min(value, MAX_RETRY_AFTER_MS) if value.__class__ is int and value > 0 else 0


Random = Callable[[], float]
"""Returns a number from 0 up to, but not including, 1."""


class Backoff:
    """Random delays between 0 and a limit that doubles from 100 ms to at most 30 s."""

    __slots__ = ("_failures", "_random")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._failures = 0

    def next(self, retry_after_ms: int = 0) -> float:
        """Return the next delay in seconds. The server's `retry_after_ms` is added in full."""
        self._failures += 1
        return retry_after_ms / _MS + backoff_s(self._failures, FIRST_DELAY, MAX_DELAY, FULL, self._random())

    def reset(self) -> None:
        """Start at 100 ms again, after a success."""
        self._failures = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The next step of a call, and the seconds before it."""

    then: Then
    delay: float = 0.0


class Attempt:
    """The retries of one call so far. Calls create it at the first error, because most have none."""

    __slots__ = ("backoff", "done")

    def __init__(self, random: Random) -> None:
        self.backoff = Backoff(random)
        self.done: set[Then] = set()

    def reset(self) -> None:
        """Start again, after a success."""
        self.backoff.reset()
        self.done.clear()

    def once(self, then: Then) -> bool:
        """Return True the first time."""
        if then in self.done:
            return False
        self.done.add(then)
        return True

    def after_error(
        self,
        error: CallError,
        shown: Shown,
        *,
        opens: bool,
        is_draining: bool,
        left: float,
    ) -> Step:
        """Return the next step of a call after an error (section 11.1).

        Args:
            shown: the token of the request.
            opens: whether the client can open another session.
            is_draining: whether the server of this connection goes away. It asks to wait for itself alone.
            left: seconds until the call's timeout.
        """
        then = what_next(error)
        if then is Then.LATER:
            return self.wait(0 if is_draining else retry_after_ms(error.details), left)
        if shown is Shown.NONE and then is not Then.AT_ONCE:
            return _REPORT
        if shown is Shown.EARLIER and (error.code in SESSION_IS_OVER or then in _CONCERNS_TOKEN):
            then = Then.CATCH_UP
        elif then is Then.REPLACE and not opens:
            return _REPORT
        return Step(then) if then is not Then.RAISE and self.once(then) else _REPORT

    def after_loss(self, *, is_repeatable: bool, left: float) -> Step:
        """Return the next step of a call whose connection was lost before its answer.

        `is_repeatable`: it certainly did not run, or the server runs it once. The retry is delayed: the call itself
        may be what crashes the server.
        """
        return self.wait(0, left) if is_repeatable else _REPORT

    def wait(self, retry_after_ms: int, left: float) -> Step:
        """Return the step of a retry after a delay, which ends before the call's timeout."""
        delay = self.backoff.next(retry_after_ms)
        return Step(Then.LATER, delay) if delay < left else _REPORT


class Renewal:
    """The requests for another token so far (section 11.2).

    `must`: the present token is not valid any more. Otherwise an error only delays the renewal.
    """

    __slots__ = ("_attempt", "_lost", "must")

    def __init__(self, random: Random, *, must: bool) -> None:
        self.must = must
        self._attempt = Attempt(random)
        self._lost = 0

    def after_loss(self, *, may_be_spent: bool) -> Step:
        """Return the next step after a lost answer. `may_be_spent`: the refresh token, so that `must` holds."""
        self.must |= may_be_spent
        self._lost += 1
        return Step(Then.AT_ONCE) if self._lost <= MAX_LOST else _REPORT

    def after_error(self, error: CallError, *, is_refresh: bool, can_reopen: bool, is_restored: bool) -> Step:
        """Return the next step after an error: REOPEN and REPLACE if another session is opened instead.

        Args:
            is_refresh: the request was `session.refresh`.
            can_reopen: the credentials may open a session that is bound to another client certificate.
            is_restored: the server has not accepted the session, which is from a file, yet.
        """
        then = what_next(error)
        if then is Then.LATER and self.must:
            return Step(then, self._attempt.backoff.next(retry_after_ms(error.details)))
        if then in (Then.AT_ONCE, Then.ATTACH) and self._attempt.once(then):
            return Step(then)
        if is_refresh and (instead := self._instead(error, then, can_reopen, is_restored)) is not None:
            self.must = True
            return Step(instead)
        if not self.must and error.code not in SESSION_IS_OVER:
            return Step(Then.KEEP)
        return _REPORT

    def _instead(self, error: CallError, then: Then, can_reopen: bool, is_restored: bool) -> Then | None:
        """Return how another session is opened: the refresh token has expired, may be spent, is unknown when the
        token is no longer valid, or is bound to the previous certificate."""
        if is_restored and error.code in ENDED_BY_REFUSAL:
            return Then.REOPEN
        if then is Then.REOPEN:
            return then if can_reopen else None
        if error.code is Code.UNAUTHENTICATED and then is not Then.ATTACH:
            return Then.REPLACE if self.must else None
        return Then.REOPEN if error.code is Code.TOKEN_EXPIRED or error.code in _MAYBE_RUN else None


_REPORT: Final = Step(Then.RAISE)
_CONCERNS_TOKEN: Final = frozenset({Then.RENEW, Then.REPLACE})


def deadline_ms(left: float) -> int:
    """Return the `deadline_ms` of a request with so many seconds until its call's timeout."""
    # A difference of times can be slightly more than the timeout.
    return min(math.ceil(round(left * _MS, 3)), MAX_DEADLINE_MS)
