"""One connection of the load generator: a TLS transport and a conversation, small enough for 10,000 of them.

Unlike the client library it retries nothing and does not reconnect, so that no loss is hidden and each answer is
seen as it arrives.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import (
    ConnectionEnded,
    ErrorReceived,
    GoAwayReceived,
    ItemReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.errors import TlsError
from zcproto.tls.transport import TlsTransport


class FrameConnection(asyncio.Protocol):
    """The base of connections: subclasses handle their events."""

    __slots__ = ("_wheel", "conversation", "deadline_tick", "ended", "transport")

    def __init__(self, wheel: DeadlineWheel) -> None:
        self._wheel = wheel
        self.deadline_tick = 0
        self.conversation = ClientConnection()
        self.transport: TlsTransport | None = None
        self.ended = False

    # --- for subclasses ------------------------------------------------------------------------------

    def welcomed(self) -> None:
        """Requests may be sent from now on."""

    def answered(self, stream: int, value: Any) -> None:
        """A request got its RESPONSE."""

    def item_received(self, stream: int) -> None:
        """An item waits in a stream."""

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        """A request got an ERROR."""

    def going_away(self, retry_after_ms: int) -> None:
        """The server runs no request that it receives from now on."""

    def lost(self, cause: str) -> None:
        """The connection ended, but not by `close`. Called at most once."""

    def gone(self) -> None:
        """The transport is closed."""

    # --- called by the transport ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.ended:  # closed while connecting
            transport.close()
            return
        self.transport = cast("TlsTransport", transport)

    def data_received(self, data: bytes) -> None:
        conversation = self.conversation
        for event in conversation.receive_data(data, system_clock.wall(), self._wheel.now()):
            if isinstance(event, ResponseReceived):
                self.answered(event.stream, event.value)
            elif isinstance(event, ItemReceived):
                self.item_received(event.stream)
            elif isinstance(event, ErrorReceived):
                self.refused(event.stream, event.code, event.message, event.details)
            elif isinstance(event, Welcomed):
                self._wheel.set(self, conversation.next_deadline())
                self.welcomed()
            elif isinstance(event, GoAwayReceived):
                self.going_away(event.retry_after_ms)
            elif isinstance(event, ConnectionEnded):
                self._end(f"ended by {event.code.name}" if event.code is not None else event.reason)
                return
            # An EVENT needs no reaction.
        self.flush()

    def eof_received(self) -> None:
        self._end("closed by the server")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc.failure if isinstance(exc, TlsError) else "closed by the server")
        self.gone()

    # --- for the owner -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send all queued frames in one write."""
        data = self.conversation.data_to_send()
        if data and self.transport is not None:
            self.transport.write(data)

    def handle_deadline(self, now: float) -> None:
        if self.ended:
            return
        for event in self.conversation.handle_timeout(system_clock.wall(), now):
            assert isinstance(event, ConnectionEnded)
            self._end(event.reason)
            return
        self.flush()
        self._wheel.set(self, self.conversation.next_deadline())

    def close(self) -> None:
        """Close the connection in order, with close_notify. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._wheel.discard(self)
        self.conversation.end()
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()

    def _end(self, cause: str) -> None:
        if not self.ended:
            self.close()
            self.lost(cause)
