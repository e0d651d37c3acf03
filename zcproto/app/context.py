"""What a method sees of its call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar, cast

from zcproto.auth.identity import Channel
from zcproto.common.roles import NO_ROLES
from zcproto.common.value_types import RETURNS_ANY, Returned, checked_result
from zcproto.connection.events import NEVER, Request
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import CallError, ConnectionClosed, FailedPrecondition, Unauthenticated
from zcproto.sessions import Session

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    State = TypeVarWithDefault("State", default=Any)
else:
    State = TypeVar("State")

DEFAULT_TIMEOUT: Final = 30.0
ASK_TIMEOUT: Final = 3600.0


class ClientConnections(Protocol):
    """A connection of a client, as a call to it uses it."""

    async def call_client(self, user: str, session_id: str, call: CallToClient) -> Any:
        """Call a method of the client here, or where its session has registered it."""


MOST_FOUND: Final = 1_000
"""Clients in one answer of `find_clients`."""


class ConnectedClient:
    """The client of one session. A call goes to this connection, or to another of the session that handles it.

    `context.client` is that of the running call; `server.clients` lists the others of this process, and
    `context.find_clients` and `server.find_clients` those of all processes.
    """

    __slots__ = ("_connection", "_pending", "session_id", "user")

    def __init__(
        self,
        connection: ClientConnections,
        session_id: str,
        user: str,
        pending: Callable[..., Awaitable[Any]] | None = None,
    ) -> None:
        self._connection = connection
        self._pending = pending  # makes a pending call, for a method that outlives its connection
        self.session_id = session_id
        self.user = user

    def __repr__(self) -> str:
        return f"ConnectedClient(user={self.user!r}, session_id={self.session_id!r})"

    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        returns: type[Returned] = RETURNS_ANY,
        timeout: float = DEFAULT_TIMEOUT,  # noqa: ASYNC109  it is sent
        traceparent: str | None = None,
        pending: bool = False,
        **named: Any,
    ) -> Returned:
        """Call a method that the client handles for this session, and return its result.

        Pass params by name, or in a mapping if a name is one of this function's own. `timeout` in seconds is sent
        as the call's deadline. With `returns` the result is converted to that type; pydantic raises ValidationError
        if it is of another. Nothing is repeated: treat every failure of an approval as a refusal.

        A `pending` call waits for an answer, not for a connection: it is offered to all clients of the user that
        handle it, and to those that register until the timeout. It needs a durable run, or a request with an
        idempotency key; FailedPrecondition otherwise. See `Context.ask`.

        Raises Unavailable if the client handles no such method, ResourceExhausted at a limit, DeadlineExceeded
        after the timeout, ConnectionClosed if the connection or the session ended and the call may have run, the
        CallError of the handler, InvalidArgument for params that cannot be sent.
        """
        if params is not None:
            named = {**params, **named}
        call = CallToClient(method, named, timeout, traceparent)
        made: Awaitable[Any]
        if not pending:
            made = self._connection.call_client(self.user, self.session_id, call)
        elif self._pending is None:
            raise FailedPrecondition(
                "a pending call needs a durable run, or a request with an idempotency key; send one"
            )
        else:
            made = self._pending(self.user, call)
        return await result_of(made, returns)


async def result_of(made: Awaitable[Any], returns: type[Returned]) -> Returned:
    """Return the result of a call to a client, converted to a type."""
    try:
        result = await made
    except (CallError, ConnectionClosed) as error:
        error.of_client = True
        raise
    return result if returns is RETURNS_ANY else checked_result(returns, result)


thread_kind = threading.local()
"""Whether the current thread runs a method, in `is_method`."""


class CallConnection(ClientConnections, Protocol):
    """The connection of a call, as its context uses it; implemented by `ServerProtocol`."""

    peer: str
    suppress_revoked_event: bool

    @property
    def id(self) -> str: ...
    @property
    def stopping(self) -> asyncio.Event: ...
    def wall(self) -> int: ...
    def now(self) -> float: ...
    def peer_certificate(self) -> bytes | None: ...
    def channel(self, context: Context | None = None) -> Channel: ...
    async def ask(
        self, user: str, call: CallToClient, *, caller: Session | None = None, bound: bool = False
    ) -> Any: ...
    def has_ended(self, request: Request) -> bool: ...
    def lifespan_value(self, method: str) -> Any: ...
    async def run_in_thread(
        self, context: Context, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Any: ...
    def prove(self, key: str) -> None: ...
    def has_proved(self, key: str) -> bool: ...
    def join(self, session: Session, token: bytes) -> None: ...
    def register(self, session: Session, methods: frozenset[str], most: int) -> None: ...
    async def find_clients(self, user: str | None, handles: str | None) -> list[ConnectedClient]: ...
    def send_event(self, session_id: str, name: str, data: Any) -> bool: ...
    def session_rotated(self, session_id: str, token_digest: bytes) -> None: ...
    def session_used_since(self, session_id: str) -> int | None: ...
    def cut_streams_soon(self) -> None: ...


class Context(Generic[State]):
    """One call. A method gets it through a parameter annotated `Context`, or `Context[State]` to type `state`."""

    __slots__ = ("_request", "caller")

    outlives_connection: ClassVar[bool] = False
    """Whether the method continues when its caller's connection is lost."""

    def __init__(self, connection: CallConnection, request: Request) -> None:
        self.caller = connection
        """The connection; for the methods of the protocol only."""
        self._request = request

    @property
    def state(self) -> State:
        """What the lifespan of the application yielded: of the included one that has the method, or of the nearest
        that includes it. Raises RuntimeError if none has a lifespan."""
        return cast("State", self.caller.lifespan_value(self._request.method))

    @property
    def session(self) -> Session | None:
        """The session of the call's token; None if a public method was called without one."""
        return self._request.session

    @property
    def user(self) -> str:
        """The name of the session's user. Raises Unauthenticated if the call has no session."""
        if self._request.session is None:
            raise Unauthenticated(
                "this method needs a session; connect with a user and a key, or another login"
            )
        return self._request.session.user

    @property
    def roles(self) -> frozenset[str]:
        """The roles of the call's session; none without a session."""
        return NO_ROLES if self._request.session is None else self._request.session.roles

    @property
    def peer(self) -> str:
        """The peer's network address as text, without the port."""
        return self.caller.peer

    @property
    def connection(self) -> str:
        """The id of the call's connection in the log."""
        return self.caller.id

    def peer_certificate(self) -> bytes | None:
        """Return the verified client certificate of this connection in DER form; None without one."""
        return self.caller.peer_certificate()

    @property
    def token(self) -> bytes:
        """The call's token; zeros without one."""
        return self._request.token

    @property
    def method(self) -> str:
        return self._request.method

    @property
    def traceparent(self) -> str | None:
        """The caller's W3C Trace Context header, if it is valid."""
        return self._request.meta.traceparent

    @property
    def time_left(self) -> float | None:
        """Seconds until the caller's deadline; None without one. After it the caller has received an error."""
        if self._request.deadline != NEVER:
            return self._request.deadline - self.caller.now()
        deadline_ms = self._request.meta.deadline_ms
        return None if deadline_ms is None else deadline_ms / 1000

    @property
    def cancelled(self) -> bool:
        """Whether the result will be discarded: the caller cancelled, ran out of time or disconnected."""
        return self.caller.has_ended(self._request)

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the server begins to stop: a long stream should end, because it is cut after a while."""
        return self.caller.stopping

    @property
    def client(self) -> ConnectedClient:
        """The caller's client on this connection, to call methods that it handles for this session.

            approved = await context.client.call("approve", tool="shell", timeout=120)

        Raises Unauthenticated if the call has no session.
        """
        user, session = self.user, self._request.session
        assert session is not None
        pending = partial(self.caller.ask, caller=session) if self.outlives_connection else None
        return ConnectedClient(self.caller, session.id, user, pending)

    async def ask(
        self,
        user: str,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        returns: type[Returned] = RETURNS_ANY,
        timeout: float = ASK_TIMEOUT,  # noqa: ASYNC109  it is sent
        bound: bool = False,
        **named: Any,
    ) -> Returned:
        """Ask a user, whatever clients they have now or until the timeout, and return the first answer.

            approved = await context.ask("ada", "approve", text="pay 100?", timeout=3600)

        The call is offered to all clients of the user that handle the method; `bound`: only where the session is
        bound to a device or certificate. It ends with the method, the timeout and the process. Treat every failure
        as a refusal.

        Raises DeadlineExceeded after the timeout, ResourceExhausted at a limit, the CallError of the handler,
        InvalidArgument for params that cannot be sent, Cancelled if the session of the caller was revoked.
        """
        named = named if params is None else {**params, **named}
        call = CallToClient(method, named, timeout, self.traceparent)
        made = self.caller.ask(user, call, caller=self._request.session, bound=bound)
        return await result_of(made, returns)

    async def find_clients(
        self, *, user: str | None = None, handles: str | None = None
    ) -> list[ConnectedClient]:
        """Return clients of all workers and servers that handle calls: those of a user, or of a method, or both.

            for client in await context.find_clients(user="ada", handles="approve"):
                return await client.call("approve", tool="shell", timeout=120)

        Those of this process come first, the newest first; at most 1,000 are returned. A process that does not
        answer in half a second is left out. Raises ResourceExhausted if this process searches too often.
        """
        return await self.caller.find_clients(user, handles)

    def wall(self) -> int:
        """Return the server's wall clock, milliseconds since the Unix epoch."""
        return self.caller.wall()

    def now(self) -> float:
        """Return the server's monotonic clock in seconds."""
        return self.caller.now()

    def send_event(self, name: str, data: Any) -> bool:
        """Send an event about the call's session to this connection. Return False if it cannot be delivered.

        Raises MessageError for data that a frame cannot carry, RuntimeError in a method that runs in a thread.
        """
        if getattr(thread_kind, "is_method", False):
            raise RuntimeError(
                "send_event needs the event loop; write async def, and asyncio.to_thread for what blocks"
            )
        session = self._request.session
        return session is not None and self.caller.send_event(session.id, name, data)


class DetachedContext(Context[State]):
    """A call with an idempotency key. It continues without its caller: others may request its answer."""

    __slots__ = ()

    outlives_connection = True

    @property
    def time_left(self) -> float | None:
        return None

    @property
    def cancelled(self) -> bool:
        return False
