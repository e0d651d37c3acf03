"""One connection of the generator: a TLS transport and a conversation, and no more, so that 10,000 fit in.

It is not the client library: nothing is retried, no reconnecting hides a loss, and every answer is seen as it
came.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import ConnectionEnded, ErrorReceived, ResponseReceived, Welcomed
from zcproto.errors import TlsError
from zcproto.tls.transport import TlsTransport


class Link(asyncio.Protocol):
    """Pumps one connection. What its answers mean is the business of the classes below it."""

    __slots__ = ("_wheel", "conversation", "deadline_tick", "ended", "transport")

    def __init__(self, wheel: DeadlineWheel) -> None:
        self._wheel = wheel
        self.deadline_tick = 0
        self.conversation = ClientConnection()
        self.transport: TlsTransport | None = None
        self.ended = False

    # --- for subclasses ------------------------------------------------------------------------------

    def welcomed(self) -> None:
        """Requests may be made from here on."""

    def answered(self, stream: int, value: Any) -> None:
        """A request got its RESPONSE."""

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        """A request got an ERROR."""

    def lost(self, cause: str) -> None:
        """The connection is over, and not by `close`. Called once at most."""

    def gone(self) -> None:
        """Not a byte will come any more."""

    # --- the transport's calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.ended:  # closed while it was being made
            transport.close()
            return
        self.transport = cast("TlsTransport", transport)

    def data_received(self, data: bytes) -> None:
        conversation = self.conversation
        for event in conversation.receive_data(data, system_clock.wall(), self._wheel.now()):
            if isinstance(event, ResponseReceived):
                self.answered(event.stream, event.value)
            elif isinstance(event, ErrorReceived):
                self.refused(event.stream, event.code, event.message, event.details)
            elif isinstance(event, Welcomed):
                self._wheel.set(self, conversation.next_deadline())
                self.welcomed()
            elif isinstance(event, ConnectionEnded):
                self._end(f"ended by {event.code.name}" if event.code is not None else event.reason)
                return
            # Events and GOAWAY need no answer: if the server closes after them, that is seen as a loss.
        self.flush()

    def eof_received(self) -> None:
        self._end("closed by the server")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc.failure if isinstance(exc, TlsError) else "closed by the server")
        self.gone()

    # --- for the owner -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what is queued, in one write."""
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
        """End it properly: close_notify, and no loss."""
        self._let_go()

    def _end(self, cause: str) -> None:
        if not self.ended:
            self._let_go()
            self.lost(cause)

    def _let_go(self) -> None:
        if self.ended:
            return
        self.ended = True
        self._wheel.discard(self)
        self.conversation.end()
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()
