"""What a method may know of the call that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zcproto.auth.identity import Channel
from zcproto.connection.events import NEVER, Request
from zcproto.errors import Unauthenticated

if TYPE_CHECKING:
    from zcproto.server.protocol import ServerProtocol
    from zcproto.sessions import Session


class Context:
    """One call. Methods get it through a parameter annotated `Context`."""

    __slots__ = ("_protocol", "_request")

    def __init__(self, protocol: ServerProtocol, request: Request) -> None:
        self._protocol = protocol
        self._request = request

    @property
    def session(self) -> Session | None:
        """The session of the call's token; None for a call of a public method without one."""
        return self._request.session

    @property
    def user(self) -> str:
        """The name of the session's user. Raises Unauthenticated if the call has no session."""
        if self._request.session is None:
            raise Unauthenticated("this method needs a session")
        return self._request.session.user

    @property
    def peer(self) -> str:
        """The peer's network address as text, without the port."""
        return self._protocol.peer

    @property
    def connection(self) -> str:
        """What the call's connection is called in the log."""
        return self._protocol.id

    def peer_certificate(self) -> bytes | None:
        """The client's certificate in this connection, which TLS has verified, in DER form; None without one."""
        return self._protocol.peer_certificate()

    def channel(self) -> Channel:
        """The connection, as proofs are tied to it."""
        return self._protocol.channel()

    @property
    def token(self) -> bytes:
        """The token that the call carries; zeros for none."""
        return self._request.token

    @property
    def method(self) -> str:
        return self._request.method

    @property
    def traceparent(self) -> str | None:
        """W3C Trace Context's header as the caller sent it, if it was valid."""
        return self._request.meta.traceparent

    @property
    def time_left(self) -> float | None:
        """Seconds until the caller's deadline; None without one. Past it the caller has its answer already."""
        if self._request.deadline != NEVER:
            return self._request.deadline - self._protocol.now()
        deadline_ms = self._request.meta.deadline_ms
        return None if deadline_ms is None else deadline_ms / 1000

    @property
    def cancelled(self) -> bool:
        """Whether the caller has its answer already: it cancelled, its deadline passed, or it is gone."""
        return self._protocol.has_ended(self._request)

    def wall(self) -> int:
        """The server's clock, milliseconds since the Unix epoch."""
        return self._protocol.wall()

    def now(self) -> float:
        """Monotonic seconds of the server's clock."""
        return self._protocol.now()

    def prove(self, key: str) -> None:
        """The call has proved a key: sessions that are bound to it may be used on this connection."""
        self._protocol.prove(key)

    def has_proved(self, key: str) -> bool:
        """Whether this connection may use the sessions that are bound to a key."""
        return self._protocol.has_proved(key)

    def join(self, session: Session, token: bytes) -> None:
        """The call opened or refreshed a session: this connection has it from here on."""
        self._protocol.join(session, token)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While it ends sessions, this connection is answered and not told by event."""
        self._protocol.asks = True
        try:
            yield
        finally:
            self._protocol.asks = False

    def send_event(self, name: str, data: Any) -> bool:
        """Send an event about the call's session to this connection. False if it cannot be delivered.

        Raises MessageError for data that no frame can carry.
        """
        session = self._request.session
        return session is not None and self._protocol.send_event(session.id, name, data)


class OnceContext(Context):
    """A call with an idempotency key. It goes on without its caller, as others may come for its answer."""

    __slots__ = ()

    @property
    def time_left(self) -> float | None:
        return None

    @property
    def cancelled(self) -> bool:
        return False
