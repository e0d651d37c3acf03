"""Encode the errors that a server answers frames with before they become requests."""

from __future__ import annotations

from typing import Final

from zcproto.errors import Code
from zcproto.wire.message import decode_error, encode_error

TOKEN_ERRORS: Final = {
    Code.UNAUTHENTICATED: encode_error(
        Code.UNAUTHENTICATED, "unknown token: open a session", {"reason": "unknown_token"}
    ),
    Code.TOKEN_EXPIRED: encode_error(Code.TOKEN_EXPIRED, "token expired: refresh it or open a session"),
    Code.TOKEN_REVOKED: encode_error(Code.TOKEN_REVOKED, "token revoked: log in again (open_session)"),
    Code.SESSION_REPLACED: encode_error(
        Code.SESSION_REPLACED, "session replaced by a newer one of this user"
    ),
    Code.UNAVAILABLE: encode_error(
        Code.UNAVAILABLE, "no token can be checked just now: try again", {"retry_after_ms": 1_000}
    ),
}
STALLED: Final = encode_error(
    Code.UNAVAILABLE, "no token can be checked for a moment: try again", {"retry_after_ms": 50}
)
LOOKED_UP: Final = {TOKEN_ERRORS[code]: code for code in (Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED)}
"""Refusals that require a lookup first, if `looks_up` is set."""

NEEDS_ATTACH: Final = encode_error(
    Code.UNAUTHENTICATED, "bound token: prove its key here by session.attach first", {"attach": True}
)
NEEDS_CERTIFICATE: Final = encode_error(
    Code.UNAUTHENTICATED, "token bound to another client certificate: open a session", {"certificate": True}
)
SESSION_MISSING: Final = "this needs a session: connect with a user and a key, or another login"
NEEDS_SESSION: Final = encode_error(Code.UNAUTHENTICATED, SESSION_MISSING)
CANCELLED: Final = encode_error(Code.CANCELLED, "cancelled by the caller")
LEFT: Final = encode_error(Code.CANCELLED, "cancelled by the caller", {"reason": "caller"})
WRONG_TOKEN: Final = encode_error(
    Code.CANCELLED, "frames of a stream carry the token of its OPEN", {"reason": "wrong_token"}
)
ROTATED: Final = encode_error(
    Code.CANCELLED,
    "the session has a newer token: show that on each connection after a refresh",
    {"reason": "token_rotated"},
)
SLOW: Final = encode_error(
    Code.CANCELLED, "an item has waited too long for credit: read faster", {"reason": "slow"}
)
DENIED: Final = encode_error(
    Code.CANCELLED,
    "the roles of this session no longer allow the method of this stream",
    {"reason": "denied"},
)
DETACHED: Final = encode_error(
    Code.CANCELLED, "the client has left its run, which goes on", {"reason": "detached"}
)
LEAVING: Final = encode_error(
    Code.CANCELLED, "the server is going away: read the run at another one", {"reason": "draining"}
)
RESUMED_ELSEWHERE: Final = encode_error(
    Code.CANCELLED, "the run was resumed by another stream", {"reason": "resumed_elsewhere"}
)
TOO_MUCH_HELD: Final = encode_error(
    Code.CANCELLED,
    "too many items of this user wait for their methods: send on fewer streams at once",
    {"reason": "memory"},
)
SESSION_ENDED: Final = {
    code: encode_error(Code.CANCELLED, "the session of this stream has ended", {"reason": code.name.lower()})
    for code in (Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED)
}
"""Cuts of streams: their code is CANCELLED, because the method has run."""

CUT_REASONS: Final = (
    *("caller", "deadline", "token_expired", "token_revoked", "token_rotated", "session_replaced"),
    *("draining", "slow", "stale", "wrong_token", "denied", "memory", "slow_frame"),
    *("detached", "resumed_elsewhere"),
)
"""Reasons for which a server cuts a stream."""

NOT_DURABLE: Final = encode_error(
    Code.INVALID_ARGUMENT, "meta.resume: this server has not announced streams.durable"
)

NO_SESSION: Final = encode_error(
    Code.CANCELLED, "this connection has had no session for too long", {"reason": "token_expired"}
)
SESSION_LEFT: Final = encode_error(
    Code.CANCELLED, "the session of this request has ended, or has left this connection"
)
SLOW_FRAME: Final = encode_error(Code.CANCELLED, "a frame of this connection took too long to arrive")
DEADLINE_EXCEEDED: Final = encode_error(Code.DEADLINE_EXCEEDED, "the deadline has passed")


def of_token(code: Code, *, is_closed: bool) -> bytes:
    """Return the refusal of a token. Unless the registry is closed, the store answers within milliseconds."""
    return STALLED if code is Code.UNAVAILABLE and not is_closed else TOKEN_ERRORS[code]


def reason_in(body: bytes) -> str:
    """Return the reason of a cut for metrics: that of its details, or what it stands for."""
    if body is SLOW_FRAME:
        return "slow_frame"
    if body is DEADLINE_EXCEEDED:
        return "deadline"
    return str(decode_error(body).details["reason"])


def ends_run(reason: str, *, is_opener: bool) -> bool:
    """Return whether what cuts an attachment also ends its run, which belongs to the session that opened it."""
    return reason == "caller" or (is_opener and reason in ("token_revoked", "denied"))


def detaching(body: bytes, reason: str) -> bytes:
    """Return the ERROR of a cut that ends only the attachment to a run, not the run."""
    code, message, details = decode_error(body)
    return encode_error(code, message, {**details, "reason": reason, "detached": True})


def draining(retry_after_ms: int) -> bytes:
    message = "the server is going away: connect again"
    return encode_error(Code.UNAVAILABLE, message, {"retry_after_ms": retry_after_ms})


def too_many_requests(retry_after_ms: int) -> bytes:
    message = "too many requests in flight on this connection"
    return encode_error(Code.RESOURCE_EXHAUSTED, message, {"retry_after_ms": retry_after_ms})


def too_many_streams(limit: int) -> bytes:
    message = "too many streams on this connection: close some, or open another connection"
    return encode_error(Code.RESOURCE_EXHAUSTED, message, {"limit": limit})


def stale_on_stream(server_time: int) -> bytes:
    message = "a frame of this stream was delayed for too long"
    return encode_error(Code.CANCELLED, message, {"reason": "stale", "server_time": server_time})


def stale(server_time: int) -> bytes:
    message = "timestamp out of tolerance: set the clock"
    return encode_error(Code.STALE_TIMESTAMP, message, {"server_time": server_time})
