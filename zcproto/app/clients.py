"""Clients as applications see them: sessions whose clients handle calls of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from zcproto.errors import CallError, ConnectionClosed

DEFAULT_TIMEOUT: Final = 30.0


class ClientConnections(Protocol):
    """A connection of a client, as a call to it uses it."""

    async def call_client(
        self,
        user: str,
        session_id: str,
        method: str,
        params: Mapping[str, Any],
        timeout: float,  # noqa: ASYNC109  it is sent
        traceparent: str | None,
    ) -> Any:
        """Call a method of the client here, or where its session has registered it."""


class ConnectedClient:
    """The client of one session. A call goes to this connection, or to another of the session that handles it.

    `context.client` is that of the running call; `server.clients` lists the others.
    """

    __slots__ = ("_connection", "session_id", "user")

    def __init__(self, connection: ClientConnections, session_id: str, user: str) -> None:
        self._connection = connection
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
        timeout: float = DEFAULT_TIMEOUT,  # noqa: ASYNC109  it is sent
        traceparent: str | None = None,
        **named: Any,
    ) -> Any:
        """Call a method that the client handles for this session, and return its result.

        Pass params by name, or in a mapping if a name is one of this function's own. `timeout` in seconds is sent
        as the call's deadline. Nothing is repeated: treat every failure of an approval as a refusal.

        Raises Unavailable if the client handles no such method, ResourceExhausted at a limit, DeadlineExceeded
        after the timeout, ConnectionClosed if the connection or the session ended and the call may have run, the
        CallError of the handler, InvalidArgument for params that cannot be sent.
        """
        if params is not None:
            named = {**params, **named}
        try:
            return await self._connection.call_client(
                self.user, self.session_id, method, named, timeout, traceparent
            )
        except (CallError, ConnectionClosed) as error:
            error.of_client = True
            raise
