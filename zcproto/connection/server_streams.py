"""Run the streams of one connection at the server (sans-IO; zcp1.md, section 18).

The part of `ServerConnection` that only connections with streams pay for.

    OPEN   -> ServerStream, a Request that may send and take items before its one answer
    ITEM, END, CREDIT -> `receive`: an event, an ERROR that cuts the stream, or a ProtocolError

    state   is held by the connection   `items` takes more
    OPEN    yes                          yes
    HALF    yes                          no: END came, or the method takes no items
    LINGER  no, its method still runs
    NONE    no

Decides: the credit of both directions, late items, which frame cuts a stream, when a stream that waits is too slow,
and when its session counts as used.

Rules:
- A stream that was cut counts against `max_open` until its method has ended.
- Exactly as many late ITEMs are dropped as the credit allowed when streams ended; one more is fatal.
- The token of a frame is compared with that of OPEN, before the credit is looked at; the registry is not asked.

It must not know: other requests, sessions beyond their ids, how items are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from zcproto.connection import refusals
from zcproto.connection.credit import ItemQueue, read_credit
from zcproto.connection.events import (
    NEVER,
    CreditReceived,
    DurableStream,
    ItemsReceived,
    Request,
    ServerStream,
)
from zcproto.connection.settings import StreamLimits
from zcproto.connection.silence import NO_PING
from zcproto.errors import Code, InvalidArgument, ProtocolError
from zcproto.wire.frame import CREDIT, END, ITEM, MIN_LENGTH
from zcproto.wire.message import MessageError, decode_body

TOUCH_INTERVAL_S: Final = 30.0
"""Interval at which streams in flight count as use of their sessions; idle limits are minutes."""

PONG_TIMEOUT_S: Final = 10.0
"""Time to answer the PING that follows a silence."""


_ENDED: Final = ItemQueue((0, 0))
"""Of methods that take no items, after the client's END: another END or ITEM is fatal."""
_ENDED.has_ended = True


@dataclass(slots=True)
class StreamTotals:
    """The streams so far of the connections that share it, and their items with the `length` of their frames."""

    opened: int = 0
    items_sent: int = 0
    items_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


_NEVER_PINGED: Final = -NEVER  # one object for all connections


class ServerStreams:
    """The streams of one connection. Created with its first OPEN."""

    __slots__ = (
        "_limits",
        "allowance",
        "in_flight",
        "lingering",
        "ping",
        "pinged_at",
        "sent_bytes",
        "slow_at",
        "totals",
        "touch_at",
    )

    def __init__(self, limits: StreamLimits, totals: StreamTotals, now: float) -> None:
        self._limits = limits
        self.totals = totals
        self.allowance = 0  # late items that are dropped
        self.in_flight = 0
        self.lingering = 0  # cut, with their methods still running
        self.slow_at = NEVER  # not later than the first `waits_until`
        self.touch_at = now + TOUCH_INTERVAL_S
        self.pinged_at = _NEVER_PINGED
        self.ping = NO_PING
        self.sent_bytes = 0  # in items

    # --- the life of a stream -------------------------------------------------------------------

    @property
    def max_open(self) -> int:
        return self._limits.max_open

    @property
    def is_full(self) -> bool:
        return self.in_flight + self.lingering >= self._limits.max_open

    def begin(self) -> None:
        """Count a stream that is in flight from now on."""
        self.in_flight += 1
        self.totals.opened += 1

    def ended(self, stream: ServerStream, *, lingers: bool) -> None:
        """Count the late items of a stream that was answered."""
        self.in_flight -= 1
        self.lingering += lingers
        stream.is_answered = True
        stream.waits_until = NEVER
        stream.credit.items = 0  # nothing is sent any more
        if stream.items is not None:
            self.allowance += stream.items.still_allowed
            stream.items.clear()

    def end(self, held: Mapping[int, Request]) -> None:
        """Let no stream send or take anything more: the connection has ended."""
        for stream in held.values():
            if isinstance(stream, ServerStream):
                stream.is_answered = True
                stream.credit.items = 0
                if stream.items is not None:
                    stream.items.clear()

    def take_items(self, stream: ServerStream) -> ItemQueue:
        """Let the method take items of the client; call this before the next event is taken."""
        stream.items = ItemQueue((self._limits.window_items, self._limits.window_bytes))
        return stream.items

    # --- frames -----------------------------------------------------------------------------------

    def receive(
        self, head: int, stream: Request | None, token: bytes, body: bytes
    ) -> CreditReceived | ItemsReceived | bytes | bool:
        """Process a fresh ITEM, END or CREDIT. Return its event, or the ERROR that cuts the stream.

        Without either, return whether the peer may send such a frame without being slowed down.

        Raises ProtocolError if it ends the connection.
        """
        if not isinstance(stream, ServerStream):
            if head == ITEM:
                self.allowance -= 1
                if self.allowance < 0:
                    raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM on a stream that is not in flight")
            return head == ITEM  # the allowance bounds these
        if token != stream.token:
            return False if head == CREDIT else refusals.WRONG_TOKEN
        if head == CREDIT:
            if isinstance(stream, DurableStream):
                items, size, *taken = read_credit(body)
                is_needed = stream.credit.grow(items, size)
                if taken and stream.take(taken[0]):
                    if stream.credit.may_send:
                        stream.waits_until = NEVER
                    return CreditReceived(stream)
            else:
                is_needed = stream.credit.read(body)
            if stream.waits_until == NEVER or not stream.credit.may_send:
                return is_needed
            stream.waits_until = NEVER
            return CreditReceived(stream)
        if stream.items is None:
            if head == END and isinstance(stream, DurableStream):
                return refusals.DETACHED
            if head == ITEM:
                raise ProtocolError(Code.PROTOCOL_ERROR, "ITEM beyond the credit")
            stream.items = _ENDED
            return True
        if head == END:
            stream.items.end()
        else:
            stream.items.receive(body)
            self.totals.items_received += 1
            self.totals.bytes_received += MIN_LENGTH + len(body)
        return ItemsReceived(stream)

    # --- sending ----------------------------------------------------------------------------------

    def wait_for_credit(self, stream: ServerStream, now: float) -> bool:
        """Record that an item waits for credit. Return True if the next deadline is earlier now."""
        stream.waits_until = now + self._limits.stall_timeout_s
        if stream.waits_until >= self.slow_at:
            return False
        self.slow_at = stream.waits_until
        return True

    # --- time -------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        return min(self.slow_at, self.touch_at) if self.in_flight else NEVER

    def take_slow(self, held: Mapping[int, Request], now: float) -> Iterator[ServerStream]:
        """Yield the streams whose item has waited for credit for too long."""
        if self.slow_at > now:
            return
        self.slow_at = NEVER
        for stream in [*held.values()]:
            if isinstance(stream, ServerStream):
                if stream.waits_until <= now:
                    yield stream
                elif stream.waits_until < self.slow_at:
                    self.slow_at = stream.waits_until

    def take_used(self, held: Mapping[int, Request], now: float) -> set[str]:
        """Return the sessions of streams in flight if it is time to count them as used."""
        if self.touch_at > now:
            return set()
        self.touch_at = now + TOUCH_INTERVAL_S
        return {each.session.id for each in held.values() if isinstance(each, ServerStream) and each.session}


def read_item(stream: ServerStream, body: bytes, max_depth: int) -> object:
    """Return the value of the item that was taken last. Raises InvalidArgument with its number."""
    try:
        return decode_body(body, max_depth)
    except MessageError as error:
        assert stream.items is not None
        raise InvalidArgument(
            f"the item cannot be read: {error}", {"item": stream.items.taken - 1}
        ) from error
