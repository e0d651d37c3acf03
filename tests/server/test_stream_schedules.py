"""Test random schedules of streams against the server's edge: no deadlock, no lost item, bounded memory.

A client opens streams that send back its items, and one with many items of the server. It obeys the credit of the
server, leaves some streams, and stops reading at times. At the end it reads everything and ends its items, and
every stream that was not left must have its result.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.protocol_harness import Harness
from tests.server.test_stream_items import WINDOW
from zcproto.wire.frame import CANCEL, LENGTH_SIZE, MIN_LENGTH, Kind
from zcproto.wire.message import decode_body

STREAMS = 4
MANY = 4
"""The number of a stream whose items are the server's own, more than the room for them."""
WRITE_BYTES = 3_000
MAX_SIZE = 800
MOST_UNREAD = 2 * WRITE_BYTES + 4_000
"""Bytes that wait for a client that does not read: items, and some answers."""
LAST_TURNS = 400


@dataclass
class EchoStream:
    """One stream as its client has it: totals of both directions."""

    credit: list[int]
    allowed: list[int] = field(default_factory=lambda: [0, 0])
    sent: list[Any] = field(default_factory=list)
    sent_bytes: int = 0
    got: list[Any] = field(default_factory=list)
    got_bytes: int = 0
    has_ended: bool = False
    was_left: bool = False
    outcome: Kind | None = None


class EchoClient:
    """A client whose streams get their own items back."""

    def __init__(self, harness: Harness, window: int) -> None:
        self.harness = harness
        harness.allow_streams(replace(WINDOW, window_items=window, write_bytes=WRITE_BYTES))
        self.peer = harness.connect("ada")
        self.streams: dict[int, EchoStream] = {}

    def open(self, which: int, size: int) -> None:
        number = which + 1
        known = self.streams.get(number)
        if (known is None or known.outcome is not None) and self.peer.transport.is_reading():
            credit = (size % 5, size)
            if number == MANY:
                credit = (size % 41, 10 * size)
                self.streams[number] = EchoStream([*credit], sent=[bytes(700)] * 40, has_ended=True)
                frame = self.peer.open("count", {"n": 40, "size": 700}, stream=number, credit=credit)
            else:
                self.streams[number] = EchoStream([*credit])
                frame = self.peer.open("echo.items", stream=number, credit=credit)
            self.peer.send(frame)

    def send(self, number: int, stream: EchoStream, size: int) -> None:
        items, size_allowed = stream.allowed
        if not stream.has_ended and len(stream.sent) < items and stream.sent_bytes < size_allowed:
            item = [len(stream.sent), bytes(size % MAX_SIZE)]
            (frame,) = self.peer.items(item, stream=number)
            stream.sent.append(item)
            stream.sent_bytes += len(frame) - LENGTH_SIZE
            self.peer.send(frame)

    def allow(self, number: int, stream: EchoStream, size: int) -> None:
        stream.credit = [stream.credit[0] + size % 19, stream.credit[1] + 3 * size]
        self.peer.send(self.peer.credit(*stream.credit, stream=number))

    def end(self, number: int, stream: EchoStream, size: int) -> None:
        if not stream.has_ended:
            stream.has_ended = True
            self.peer.send(self.peer.end(number))

    def leave(self, number: int, stream: EchoStream, size: int) -> None:
        if size % 4 == 0:
            stream.was_left = stream.has_ended = True
            self.peer.send(self.peer.frame(CANCEL, number))

    def stop_reading(self) -> None:
        self.peer.transport.stuck = True

    def read(self) -> None:
        self.peer.read_all()

    def turn(self) -> None:
        """Run a turn of the server, and look at what it has sent."""
        for answer in self.peer.turn():
            stream = self.streams[answer.stream]
            if answer.kind is Kind.ITEM:
                assert len(stream.got) < stream.credit[0], "more items than the credit"
                assert stream.got_bytes < stream.credit[1], "more bytes than the credit"
                stream.got.append(decode_body(answer.body))
                stream.got_bytes += MIN_LENGTH + len(answer.body)
            elif answer.kind is Kind.CREDIT:
                stream.allowed = decode_body(answer.body)
            else:
                assert answer.kind is Kind.RESPONSE or stream.was_left, answer
                assert stream.outcome is None, "answered twice"
                stream.outcome = answer.kind
        assert self.peer.transport.unsent <= MOST_UNREAD

    def act(self, what: str, which: int, size: int) -> None:
        if what in ("turn", "stop_reading", "read"):
            getattr(self, what)()
        elif what == "open":
            self.open(which, size)
        elif which + 1 in self.streams and self.peer.transport.is_reading():
            stream = self.streams[which + 1]
            if stream.outcome is None and not stream.was_left:
                getattr(self, what)(which + 1, stream, size)

    def finish(self) -> None:
        """Read everything, and end the items of all streams."""
        self.read()
        for _ in range(LAST_TURNS):
            self.turn()
            for number, stream in self.streams.items():
                if stream.outcome is None and not stream.was_left:
                    self.allow(number, stream, 6_000)
                    self.end(number, stream, 0)
            if all(stream.outcome is not None for stream in self.streams.values()):
                return


OFTEN = ("open", "send", "send", "send", "allow", "allow", "turn", "turn")
ACTIONS = (*OFTEN * 3, "end", "leave", "read", "stop_reading", "stop_reading")
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, STREAMS - 1), st.integers(0, 4_000))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.lists(STEP, min_size=20, max_size=150))
def test_random_schedules_of_streams_end_with_all_items_in_order(
    window: int, steps: list[tuple[str, int, int]]
) -> None:
    loop = asyncio.new_event_loop()
    harness = Harness(loop)
    client = EchoClient(harness, window)
    for step in steps:
        client.act(*step)
    client.finish()
    for stream in client.streams.values():
        assert stream.outcome is not None, "deadlock"
        assert stream.got == stream.sent[: len(stream.got)]
        assert stream.was_left or stream.got == stream.sent
    client.turn()
    assert harness.state.items.held == 0
    assert harness.state.tasks.running == 0
    client.peer.lose()
    assert loop.run_until_complete(harness.state.tasks.close(1.0)) == 0
    loop.close()
