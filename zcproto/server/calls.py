"""Runs the calls of one connection to its client, and passes their answers to the methods that wait.

    call -> limits -> CALL -> RESULT, FAILURE, deadline, the end of the session or connection -> result or error

Rules:
- A CALL is passed to the transport at once, so that a call that failed before has certainly not run.
- A method that is cancelled withdraws its call.
- Text of a client is escaped.

It must not know: TLS, what is allowed on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import inf
from typing import Any, Final

from zcproto.common.text import escape_text
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_calls import CallToClient, ServerCall, encode_call
from zcproto.errors import (
    CallError,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    ResourceExhausted,
    ZcprotoError,
)
from zcproto.server.clients import Answered
from zcproto.server.state import ServerState
from zcproto.sessions import Session

MESSAGE_SHOWN: Final = 1_000
"""Characters of a client's error message."""

REFUSED: Final = {
    Code.UNAVAILABLE: "unavailable",
    Code.RESOURCE_EXHAUSTED: "limited",
    Code.INVALID_ARGUMENT: "invalid",
    Code.DEADLINE_EXCEEDED: "deadline",
}
"""The result of a call that is not sent."""


class CallRunner:
    """The calls of one connection. Created with its first registration."""

    __slots__ = ("_connection", "_flush", "_flush_soon", "_offers", "_state", "_waiting")

    def __init__(
        self,
        state: ServerState,
        connection: ServerConnection,
        flush: Callable[[], None],
        flush_soon: Callable[[], None],
    ) -> None:
        self._state = state
        self._connection = connection
        self._flush = flush
        self._flush_soon = flush_soon
        self._waiting: dict[ServerCall, asyncio.Future[Any]] = {}
        self._offers: dict[ServerCall, tuple[str, Answered]] = {}

    async def call(self, session_id: str, made: CallToClient, has_room: Callable[[int], bool]) -> Any:
        """Call a method of the client and return its result. Raises like `ConnectedClient.call`."""
        clients, clock = self._state.clients, self._state.clock
        known = self._connection.sessions.get(session_id)
        with ExitStack() as counted:
            try:
                if made.timeout_s <= 0:
                    raise DeadlineExceeded("the timeout of the call is over")
                body = encode_call(made, self._connection.settings.max_body)
                if not has_room(len(body)):
                    raise ResourceExhausted("the client reads too slowly; call it later")
                counted.enter_context(clients.in_flight_for("" if known is None else known.user))
                call = self._connection.call(
                    session_id,
                    made.method,
                    body,
                    timeout_s=made.timeout_s,
                    wall=clock.wall(),
                    now=clock.now(),
                )
            except CallError as error:
                clients.count(REFUSED[error.code])
                raise
            waiter = self._waiting[call] = asyncio.get_running_loop().create_future()
            self._flush()
            self._flush_soon()  # sets the deadline
            try:
                return await waiter
            except asyncio.CancelledError:
                if self._connection.withdraw(call, clock.wall()):
                    clients.count("withdrawn")
                    self._flush_soon()
                raise
            finally:
                self._waiting.pop(call, None)

    def offer(
        self,
        session_id: str,
        method: str,
        body: bytes,
        answered: Answered,
        has_room: Callable[[int], bool],
    ) -> Callable[[], None]:
        """Offer a pending call; return what withdraws it. Raises Unavailable or ResourceExhausted.

        `answered` is called in the step in which the answer arrives, so that nothing can happen between its checks
        and its effect.
        """
        if not has_room(len(body)):
            raise ResourceExhausted("the client reads too slowly; call it later")
        clock = self._state.clock
        call = self._connection.call(
            session_id, method, body, timeout_s=inf, wall=clock.wall(), now=clock.now()
        )
        self._offers[call] = session_id, answered
        self._flush_soon()
        return partial(self._withdraw_offer, call)

    def _live(self, session_id: str) -> Session | None:
        """Return a session if it lives and this connection has shown its newest token."""
        known = self._connection.sessions.get(session_id)
        found = None if known is None else self._state.registry.check(known.token, self._state.clock.wall())
        return found if isinstance(found, Session) else None

    def _withdraw_offer(self, call: ServerCall) -> None:
        if self._offers.pop(call, None) is not None:
            self._connection.withdraw(call, self._state.clock.wall())
            self._flush_soon()

    def settle(self, call: ServerCall, value: Any, error: CallError | None) -> None:
        """Pass an answer to the method that waits for it, or to the pending call."""
        offer = self._offers.pop(call, None)
        if offer is not None:
            if error is not None:
                error.message = escape_text(error.message, MESSAGE_SHOWN)
            session_id, answered = offer
            answered(self._live(session_id), value, error)
            self._flush_soon()
            return
        if error is None:
            self._state.clients.count("answered")
        else:
            self._state.clients.count("deadline" if error.code is Code.DEADLINE_EXCEEDED else "failed")
            error.message = escape_text(error.message, MESSAGE_SHOWN)
        self._wake(call, value, error)
        self._flush_soon()  # a connection that drains may have waited for it

    def _wake(self, call: ServerCall, value: Any, error: ZcprotoError | None) -> None:
        waiter = self._waiting.pop(call, None)
        if waiter is None or waiter.done():  # its method was cancelled in this turn
            return
        if error is None:
            waiter.set_result(value)
        else:
            waiter.set_exception(error)

    def session_ended(self, session_id: str, *, is_kept: bool, is_refreshed: bool = False) -> None:
        """Fail the calls of a session. `is_kept`: keep its registration until its newest token is shown.

        `is_refreshed`: it has not ended, but the peer has not shown its newest token.
        """
        wall = self._state.clock.wall()
        for call in self._connection.withdraw_session(session_id, wall, is_kept=is_kept):
            self._state.clients.count("closed")
            error = ConnectionClosed("the session of the client has ended")
            if is_refreshed:
                error = ConnectionClosed("the client has refreshed its session on another connection")
            self._wake(call, None, error)

    def close(self, reason: str) -> None:
        """Fail all calls: the connection has ended."""
        for call in [*self._waiting]:
            self._connection.withdraw(call, self._state.clock.wall())
            self._state.clients.count("closed")
            self._wake(call, None, ConnectionClosed(reason))
