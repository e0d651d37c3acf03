"""Run the streams of one connection at the client (sans-IO; zcp1.md, section 18).

The part of `ClientConnection` that only connections with streams pay for.

    OPEN, HALF  in flight; HALF: this end has ended its items
    LEAVING     CANCEL was sent, or END on a durable stream; its answer is awaited, and items are dropped
    NONE        answered

Decides: the credit of both directions, and which frames are dropped.

It must not know: calls, sessions, what an item means.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from zcproto.connection.credit import ItemQueue, SendCredit
from zcproto.connection.events import Accepted, CreditRaised, ItemReceived
from zcproto.errors import Code, InternalError, ProtocolError
from zcproto.wire.frame import ACCEPTED, ITEM
from zcproto.wire.message import Credit, MessageError, Resume, decode_accepted, decode_body


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

    Of a durable one (zcp1.md, section 20): `resume` is what it reads, and `taken` the position before which the
    application needs nothing, which the next CREDIT reports; -1 until it is set. `is_accepted`: ACCEPTED came.
    """

    __slots__ = (
        "credit",
        "is_accepted",
        "items",
        "number",
        "resume",
        "state",
        "taken",
        "token",
        "was_answered_to",
        "was_lost",
    )

    def __init__(self, number: int, token: bytes, window: Credit, resume: Resume | None = None) -> None:
        self.number = number
        self.token = token
        self.credit = SendCredit((0, 0))
        self.items = ItemQueue(window, window)
        self.state = ClientStreamState.OPEN
        self.was_answered_to = self.was_lost = self.is_accepted = False
        self.resume = resume
        self.taken = -1

    @property
    def granted(self) -> tuple[int, ...]:
        """The numbers of a CREDIT."""
        granted = self.items.granted
        return granted if self.taken < 0 or not self.is_accepted else (*granted, self.taken)

    def leave(self) -> None:
        """Drop the items that wait, and those to come."""
        self.state = ClientStreamState.LEAVING
        self.items.clear()

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

    def receive(
        self, head: int, number: int, body: bytes, max_depth: int
    ) -> Accepted | ItemReceived | CreditRaised | None:
        """Process an ACCEPTED, ITEM or CREDIT; None if it is dropped.

        Raises ProtocolError if it ends the connection.
        """
        stream = self.get(number)
        if stream is None:
            raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT for a request")
        if stream.state is ClientStreamState.LEAVING:
            return None
        stream.was_answered_to = True
        if head == ACCEPTED:
            return Accepted(number, _read_accepted(stream, body, max_depth))
        if stream.resume is not None and not stream.is_accepted:
            raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT before ACCEPTED")
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
        """Leave a stream that is cancelled."""
        stream = self.get(number)
        if stream is not None:
            stream.leave()


def _read_accepted(stream: ClientStream, body: bytes, max_depth: int) -> dict[str, Any]:
    """Return the map of an ACCEPTED. Raises ProtocolError if it does not fit the OPEN."""
    resume = stream.resume
    if resume is None or stream.is_accepted:
        raise ProtocolError(Code.PROTOCOL_ERROR, "ACCEPTED was not expected")
    try:
        run = decode_accepted(body, max_depth)
    except MessageError as error:
        raise ProtocolError(Code.PROTOCOL_ERROR, f"ACCEPTED cannot be read: {error}") from error
    if (run["id"], run["from"]) != (resume.id, resume.position):
        raise ProtocolError(Code.PROTOCOL_ERROR, "ACCEPTED is of another run or position")
    stream.is_accepted = True
    return run
