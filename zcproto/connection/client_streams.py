"""Run the streams of one connection at the client (sans-IO; zcp1.md, section 18).

The part of `ClientConnection` that only connections with streams pay for.

    OPEN, HALF  in flight; HALF: this end has ended its items
    LEAVING     CANCEL was sent; its answer is awaited, and items are dropped
    NONE        answered

Decides: the credit of both directions, and which frames are dropped.

It must not know: calls, sessions, what an item means.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from zcproto.connection.credit import ItemQueue, SendCredit
from zcproto.connection.events import CreditRaised, ItemReceived
from zcproto.errors import Code, InternalError, ProtocolError
from zcproto.wire.frame import ITEM
from zcproto.wire.message import Credit, MessageError, decode_body


class ClientStreamState(Enum):
    """The states of zcp1.md, section 18.10."""

    NONE = "none"
    OPEN = "open"
    HALF = "half"
    LEAVING = "leaving"


class ClientStream:
    """A stream of the client: `items` are the server's, `credit` is what the server allows to send.

    `was_answered_to`: an ITEM or CREDIT came, so that the method has begun and the stream is not opened again.
    `was_lost`: it failed because a frame of it was stale, and not by an ERROR of the server.
    """

    __slots__ = ("credit", "items", "number", "state", "token", "was_answered_to", "was_lost")

    def __init__(self, number: int, token: bytes, window: Credit) -> None:
        self.number = number
        self.token = token
        self.credit = SendCredit((0, 0))
        self.items = ItemQueue(window, window)
        self.state = ClientStreamState.OPEN
        self.was_answered_to = self.was_lost = False

    def read_item(self, max_depth: int) -> Any:
        """Take an item. Raises IndexError if none waits, InternalError if it cannot be decoded."""
        body = self.items.take()
        try:
            return decode_body(body, max_depth)
        except MessageError as error:
            raise InternalError(f"item {self.items.taken - 1} cannot be read: {error}") from error


class ClientStreams(dict[int, ClientStream]):
    """The streams in flight on one connection by number."""

    __slots__ = ()

    def receive(self, head: int, number: int, body: bytes) -> ItemReceived | CreditRaised | None:
        """Process an ITEM or CREDIT; None if it is dropped. Raises ProtocolError if it ends the connection."""
        stream = self.get(number)
        if stream is None:
            raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT for a request")
        if stream.state is ClientStreamState.LEAVING:
            return None
        stream.was_answered_to = True
        if head == ITEM:
            stream.items.receive(body)
            return ItemReceived(stream.number)
        stream.credit.read(body)
        return CreditRaised(stream.number)

    def is_read(self, number: int) -> bool:
        """Return whether a stream is in flight and was not left."""
        stream = self.get(number)
        return stream is not None and stream.state is not ClientStreamState.LEAVING

    def end(self, number: int, *, was_lost: bool = False) -> None:
        """Forget a stream that was answered; `was_lost`: by a stale frame. What it holds can still be read."""
        stream = self.pop(number, None)
        if stream is not None:
            stream.state = ClientStreamState.NONE
            stream.items.has_ended = True
            stream.was_lost |= was_lost

    def leave(self, number: int) -> None:
        """Drop the items of a stream that is cancelled, and those to come."""
        stream = self.get(number)
        if stream is not None:
            stream.state = ClientStreamState.LEAVING
            stream.items.clear()
