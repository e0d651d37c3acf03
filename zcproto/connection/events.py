"""What a connection tells the edge. A request is a bare tuple, all other events are named."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

from zcproto.errors import Code
from zcproto.sessions import Session
from zcproto.wire.message import RequestMeta

NEVER: Final = float("inf")


RawRequest = tuple[int, bytes, Session | None, str, dict[str, Any], RequestMeta]
"""A request that may run: its header is fresh, its token good, its message well-formed.

Stream, token, session (None if it came with no token), method, params, meta. It is a bare tuple, since most
are answered in the turn in which they arrive; one that outlives it, or is refused, becomes a `Request`.
"""


class Request:
    """A request that is kept: `Request(*raw)`.

    `deadline` is monotonic seconds, `NEVER` without one; it is set when the request is held. `held` says that
    the answer comes in a later turn, `lingers` that it was given without waiting for the handler, which still
    runs.
    """

    __slots__ = ("deadline", "held", "lingers", "meta", "method", "params", "session", "stream", "token")

    def __init__(
        self,
        stream: int,
        token: bytes,
        session: Session | None,
        method: str,
        params: dict[str, Any],
        meta: RequestMeta,
    ) -> None:
        self.stream = stream
        self.token = token
        self.session = session
        self.method = method
        self.params = params
        self.meta = meta
        self.deadline = NEVER
        self.held = False
        self.lingers = False

    def __repr__(self) -> str:
        return f"Request(stream={self.stream}, method={self.method!r})"


class KeyWanted(NamedTuple):
    """A frame's token is bound to a key that was not proved on this connection.

    Whoever knows at once that the peer has the key calls `prove` before the next event is taken; else the frame is
    refused, unless it is `session.attach`.
    """

    session: Session
    key: str


class RequestEnded(NamedTuple):
    """A held request was answered without its handler: CANCELLED or DEADLINE_EXCEEDED. Stop the handler."""

    request: Request
    code: Code


class SessionJoined(NamedTuple):
    """The first frame of a session was accepted on this connection."""

    session_id: str


class TokenUnknown:
    """A frame's token is not known here, or seems to have expired (`code`); others may know better.

    The edge finds out before it takes the next event. If it cannot, it sets `refusal` to the body of the ERROR.
    """

    __slots__ = ("code", "refusal", "token")

    def __init__(self, token: bytes, code: Code) -> None:
        self.token = token
        self.code = code
        self.refusal: bytes | None = None

    def __repr__(self) -> str:
        return f"TokenUnknown(code={self.code!r})"


class GoAwayReason(StrEnum):
    """Why a server closes a connection in good order: the reason in GOAWAY."""

    DRAINING = "draining"
    IDLE = "idle"
    NO_SESSION = "no_session"


class ConnectionEnded(NamedTuple):
    """The conversation is over. Send what is queued, then close. `code` is the fatal error, if one was."""

    code: Code | None
    reason: str


ServerEvent = RawRequest | RequestEnded | SessionJoined | KeyWanted | TokenUnknown | ConnectionEnded


class Welcomed(NamedTuple):
    """The server's WELCOME: calls may be made from here on."""

    settings: dict[str, Any]


class ResponseReceived(NamedTuple):
    stream: int
    value: Any

    def __repr__(self) -> str:  # the result of session.open holds tokens
        return f"ResponseReceived(stream={self.stream})"


class ErrorReceived(NamedTuple):
    """One call was answered with an error. The connection goes on."""

    stream: int
    code: int
    message: str
    details: dict[str, Any]


class GoAwayReceived(NamedTuple):
    """The server takes no new requests on this connection; what is in flight may still be answered."""

    reason: str
    retry_after_ms: int


class EventReceived(NamedTuple):
    name: str
    data: Any
    token: bytes

    def __repr__(self) -> str:
        return f"EventReceived(name={self.name!r}, data={self.data!r})"


ClientEvent = Welcomed | ResponseReceived | ErrorReceived | GoAwayReceived | EventReceived | ConnectionEnded
