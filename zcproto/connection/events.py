"""Define the events that a connection passes to the edge. A request is a bare tuple; other events are classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Final, NamedTuple

from zcproto.connection.client_calls import ClientCall
from zcproto.connection.credit import ItemQueue, SendCredit
from zcproto.connection.server_calls import ServerCall
from zcproto.errors import CallError, Code, ProtocolError
from zcproto.sessions import Session
from zcproto.wire.message import RequestMeta, Resume

NEVER: Final = float("inf")


RawRequest = tuple[int, bytes, Session | None, str, dict[str, Any], RequestMeta]
"""A request that may run: fresh header, valid token, well-formed message.

Stream, token, session (None without a token), method, params, meta. It is a bare tuple because most requests are
answered in the turn in which they arrive; one that outlives it or is refused becomes a `Request`.
"""


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """A request that outlives its turn: `Request(*raw)`.

    `deadline` is monotonic seconds, or `NEVER`; it is set when the request is held. `held`: the answer comes in a
    later turn. `lingers`: it was answered early, and its handler is still running.
    """

    stream: int
    token: bytes
    session: Session | None
    method: str
    params: dict[str, Any]
    meta: RequestMeta
    deadline: float = NEVER
    held: bool = False
    lingers: bool = False

    def __repr__(self) -> str:
        return f"Request(stream={self.stream}, method={self.method!r})"


class StreamState(Enum):
    """The states of zcp1.md, section 18.10."""

    NONE = "none"
    OPEN = "open"
    HALF = "half"
    LINGER = "linger"


@dataclass(slots=True, eq=False, repr=False)
class ServerStream(Request):
    """A stream of items.

    `credit` is what the client allows. `items` are the client's, None if the method takes none, and `has_items` is
    whether the client has announced some. `waits_until`: an
    item waits for credit, at most until then; NEVER if none waits. `worker` is the edge's: what runs its method.
    """

    credit: SendCredit = field(default_factory=lambda: SendCredit((0, 0)))
    items: ItemQueue | None = None
    has_items: bool = False
    waits_until: float = NEVER
    is_answered: bool = False
    worker: Any = None

    @property
    def state(self) -> StreamState:
        if self.lingers:
            return StreamState.LINGER
        if self.is_answered or not self.held:
            return StreamState.NONE
        return StreamState.HALF if self.items is None or self.items.has_ended else StreamState.OPEN


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class DurableStream(ServerStream):
    """A stream that reads a run, which goes on without it (zcp1.md, section 20).

    `is_accepted`: ACCEPTED was sent. `is_opener`: the stream's session has started the run. `taken` is the position
    before which the client needs nothing, -1 until it has said so.
    """

    resume: Resume
    is_accepted: bool = False
    is_opener: bool = True
    taken: int = -1

    def take(self, position: int) -> bool:
        """Apply the third number of a CREDIT, and return whether it rose. Raises ProtocolError if it is wrong."""
        if not self.is_accepted:
            raise ProtocolError(Code.PROTOCOL_ERROR, "CREDIT of three numbers on a stream without ACCEPTED")
        if position < self.taken or position > self.resume.position + self.credit.sent_items:
            raise ProtocolError(Code.PROTOCOL_ERROR, "taken is lower than before or beyond the items sent")
        rose = position > self.taken
        self.taken = position
        return rose


class CreditReceived(NamedTuple):
    """The client raised the credit of a stream that waits for it, or `taken` of a durable one."""

    stream: ServerStream


class ItemsReceived(NamedTuple):
    """An item or the end of the items has arrived for a method that takes them."""

    stream: ServerStream


class CallEnded(NamedTuple):
    """A call to the client was answered, or its deadline has passed."""

    call: ServerCall
    value: Any
    error: CallError | None

    def __repr__(self) -> str:
        return f"CallEnded(number={self.call.number}, error={self.error!r})"


class KeyWanted(NamedTuple):
    """A frame's token is bound to a key that has not been proved on this connection.

    An edge that can verify the key at once calls `prove` before it takes the next event; otherwise the frame is
    refused, unless it is `session.attach`.
    """

    session: Session
    key: str


class RequestEnded(NamedTuple):
    """A held request was answered with CANCELLED or DEADLINE_EXCEEDED. Stop its handler.

    `reason` is why a stream was cut; empty for other requests.
    """

    request: Request
    code: Code
    reason: str = ""


class SessionJoined(NamedTuple):
    """The first frame of a session was accepted on this connection."""

    session_id: str


class SessionLeft(NamedTuple):
    """A connection has lost a session: the token shown here has expired, or was replaced too long ago."""

    session_id: str


class FrameBuffered(NamedTuple):
    """The connection now holds up to `size` bytes of a frame whose header arrived at `began`; 0: it holds none.

    `user` is the user of the connection's first session, or empty without one.
    """

    size: int
    began: float
    user: str


class FramesRead(NamedTuple):
    """So many frames have been processed without an event of their own."""

    frames: int


@dataclass(slots=True, eq=False, repr=False)
class TokenUnknown:
    """A frame's token is unknown here or seems expired (`code`), but may be valid in the store.

    The edge looks it up before it takes the next event. If it cannot, it sets `refusal` to the body of the ERROR.
    """

    token: bytes
    code: Code
    refusal: bytes | None = None

    def __repr__(self) -> str:
        return f"TokenUnknown(code={self.code!r})"


class GoAwayReason(StrEnum):
    """Reasons in GOAWAY (zcp1.md, section 6)."""

    DRAINING = "draining"
    IDLE = "idle"
    NO_SESSION = "no_session"
    SLOW_FRAME = "slow_frame"


class ConnectionEnded(NamedTuple):
    """The connection has ended. Send queued output, then close. `code` is the fatal error, if any."""

    code: Code | None
    reason: str


ServerEvent = (
    RawRequest
    | ServerStream
    | CreditReceived
    | ItemsReceived
    | CallEnded
    | RequestEnded
    | SessionJoined
    | SessionLeft
    | KeyWanted
    | TokenUnknown
    | FrameBuffered
    | FramesRead
    | ConnectionEnded
)


class Welcomed(NamedTuple):
    """WELCOME was received: requests may be sent."""

    settings: dict[str, Any]


class ResponseReceived(NamedTuple):
    stream: int
    value: Any

    def __repr__(self) -> str:  # the result of session.open contains tokens
        return f"ResponseReceived(stream={self.stream})"


class ErrorReceived(NamedTuple):
    """A request was answered with an error. The connection continues."""

    stream: int
    code: int
    message: str
    details: dict[str, Any]


class Accepted(NamedTuple):
    """The server has accepted a durable stream: `run` is the map of ACCEPTED. Its items follow."""

    stream: int
    run: dict[str, Any]


class ItemReceived(NamedTuple):
    """An item waits in a stream."""

    stream: int


class CreditRaised(NamedTuple):
    """The server allows more items on a stream."""

    stream: int


class CallReceived(NamedTuple):
    """The server calls a method that this end handles."""

    call: ClientCall


class CallWithdrawn(NamedTuple):
    """The server does not await the answer of a call any more. Stop its handler."""

    call: ClientCall


class GoAwayReceived(NamedTuple):
    """The server accepts no new requests on this connection; those in flight may still be answered."""

    reason: str
    retry_after_ms: int


class EventReceived(NamedTuple):
    """An EVENT. `body` is its undecoded content, which takes less memory than `data`."""

    name: str
    data: Any
    token: bytes
    body: bytes

    def __repr__(self) -> str:
        return f"EventReceived(name={self.name!r}, data={self.data!r})"


ClientEvent = (
    Welcomed
    | ResponseReceived
    | ErrorReceived
    | Accepted
    | ItemReceived
    | CreditRaised
    | CallReceived
    | CallWithdrawn
    | GoAwayReceived
    | EventReceived
    | ConnectionEnded
)
