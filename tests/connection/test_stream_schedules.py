"""Test both ends of streams joined in memory with random schedules, against the rules of credit.

Each end decides with its own numbers only. After every schedule all windows are drained, so a stream that waits for
credit that will never come (a deadlock) fails the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import NOW, SALT, WALL, small_registry
from zcproto.connection.client import ClientConnection
from zcproto.connection.client_streams import ClientStream, ClientStreamState
from zcproto.connection.events import (
    ConnectionEnded,
    ErrorReceived,
    RequestEnded,
    ResponseReceived,
    ServerStream,
)
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_streams import read_item
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import encode_body

MAX_ITEM = 400
STREAMS = 3
ITEMS = 12


class Ends:
    """A client and a server with their bytes in flight, and what each application has sent and received."""

    def __init__(self, window: tuple[int, int], server_window: tuple[int, int]) -> None:
        registry = small_registry(idle_timeout_ms=None)
        opened = registry.open("ada", client="", address="", wall=WALL)
        limits = StreamLimits(
            max_open=8, max_item=MAX_ITEM, window_items=server_window[0], window_bytes=server_window[1]
        )
        self.window, self.server_window = window, server_window
        self.server = ServerConnection(
            ConnectionSettings(streams=limits), registry, salt=SALT, wall=WALL, now=NOW
        )
        self.server.join(opened.session, opened.token, WALL, NOW)
        self.client = ClientConnection()
        self.token = opened.token
        self.to_client, self.to_server = bytearray(), bytearray()
        self.halves: dict[int, ClientStream] = {}
        self.streams: dict[int, ServerStream] = {}
        self.cut: list[ServerStream] = []
        self.sent: dict[tuple[str, int], list[Any]] = {}
        self.got: dict[tuple[str, int], list[Any]] = {}
        self.answered: set[int] = set()
        self.numbers = itertools.count(1)
        self.deliver(2**20)

    def collect(self) -> None:
        self.to_client += self.server.data_to_send()
        self.to_server += self.client.data_to_send()

    def deliver(self, most: int) -> None:
        """Deliver up to `most` bytes in each direction."""
        self.collect()
        data, self.to_server[:most] = bytes(self.to_server[:most]), b""
        for event in self.server.receive_data(data, WALL, NOW):
            assert not isinstance(event, ConnectionEnded), event
            if isinstance(event, ServerStream):
                self.server.streams(NOW).take_items(event)
                self.server.hold(event, NOW)
                self.streams[event.stream] = event
                self.server.grant(event, WALL)
            elif isinstance(event, RequestEnded):
                assert isinstance(event.request, ServerStream)
                self.cut.append(event.request)
        data, self.to_client[:most] = bytes(self.to_client[:most]), b""
        for event in self.client.receive_data(data, WALL, NOW):
            assert not isinstance(event, ConnectionEnded), event
            if isinstance(event, ResponseReceived | ErrorReceived):
                assert event.stream not in self.answered, "answered twice"
                self.answered.add(event.stream)
        self.check_bounds()

    def check_bounds(self) -> None:
        """A receiver holds at most its window and one item."""
        for half in self.halves.values():
            assert half.items.held_bytes < self.window[1] + MAX_ITEM or not half.items.held
            assert half.items.held <= self.window[0]
        for stream in self.streams.values():
            if stream.items is not None and not stream.is_answered:
                assert stream.items.held <= self.server_window[0]
                assert stream.items.held_bytes < self.server_window[1] + MAX_ITEM

    # --- what the applications do ---------------------------------------------------------------

    def open(self) -> None:
        if len(self.halves) < STREAMS:
            half = self.client.open_stream("m", {}, token=self.token, window=self.window, wall=WALL)
            self.halves[half.number] = half

    def client_sends(self, half: ClientStream, size: int) -> None:
        sent = self.sent.setdefault(("up", half.number), [])
        if half.state is ClientStreamState.OPEN and half.credit.may_send and len(sent) < ITEMS:
            sent.append([len(sent), bytes(size)])
            self.client.send_item(half, sent[-1], WALL)

    def server_sends(self, stream: ServerStream, size: int) -> None:
        sent = self.sent.setdefault(("down", stream.stream), [])
        if not stream.is_answered and stream.credit.may_send and len(sent) < ITEMS:
            sent.append([len(sent), bytes(size)])
            self.server.send_item(stream, encode_body(sent[-1]), WALL)

    def client_takes(self, half: ClientStream) -> None:
        if half.items.held:
            value = self.client.take_item(half, WALL)
            self.got.setdefault(("down", half.number), []).append(value)

    def server_takes(self, stream: ServerStream) -> None:
        if not stream.is_answered and stream.items is not None and stream.items.held:
            value = read_item(stream, stream.items.take(), 32)
            self.got.setdefault(("up", stream.stream), []).append(value)
            self.server.grant(stream, WALL)

    def end_items(self, half: ClientStream) -> None:
        self.client.end_items(half, WALL)

    def respond(self, stream: ServerStream) -> None:
        if not stream.is_answered:
            self.server.respond(stream, encode_body(None), WALL)

    def leave(self, half: ClientStream) -> None:
        if half.state in (ClientStreamState.OPEN, ClientStreamState.HALF):
            self.client.cancel(half.number, WALL)

    def release(self) -> None:
        """The methods of the streams that were cut end."""
        while self.cut:
            self.server.respond(self.cut.pop(), encode_body(None), WALL)

    def act(self, what: str, which: int, size: int) -> None:
        if what == "open":
            self.open()
        elif what == "deliver":
            self.deliver(4 * size)
        elif what == "release":
            self.release()
        else:
            at: dict[int, Any] = self.halves if what in ON_CLIENT else self.streams
            if at:
                chosen = [*at.values()][which % len(at)]
                arguments = (chosen, size % MAX_BODY) if what.endswith("sends") else (chosen,)
                getattr(self, what)(*arguments)

    def drain(self) -> Iterator[int]:
        """Let both ends go on until every stream that was not left has passed all its items."""
        for turn in range(20 * ITEMS):
            self.release()
            for half in self.halves.values():
                self.client_sends(half, 1)
                self.client_takes(half)
            for stream in self.streams.values():
                self.server_sends(stream, 1)
                self.server_takes(stream)
            self.deliver(2**20)
            yield turn


MAX_BODY = MAX_ITEM - MIN_LENGTH - 8
ON_CLIENT = ("client_sends", "client_takes", "end_items", "leave")
OFTEN = (
    "deliver",
    "deliver",
    "client_sends",
    "server_sends",
    "client_sends",
    "server_sends",
    "client_takes",
    "server_takes",
)
ACTIONS = (*OFTEN * 6, "release", "end_items", "leave", "respond")
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, STREAMS - 1), st.integers(0, 700))
WINDOW = st.tuples(st.integers(1, 5), st.sampled_from((1, 100, 900, 100_000)))


@pytest.mark.no_cover  # a search, which coverage makes slow: the other tests of the room cover all lines
@settings(max_examples=300, deadline=None)
@given(WINDOW, WINDOW, st.lists(STEP, min_size=20, max_size=200))
def test_random_schedules_neither_overrun_nor_deadlock(
    window: tuple[int, int], server_window: tuple[int, int], steps: list[tuple[str, int, int]]
) -> None:
    ends = Ends(window, server_window)
    for _ in range(STREAMS):
        ends.open()
    for step in steps:
        ends.act(*step)
    for _ in ends.drain():
        pass
    for number, stream in ends.streams.items():
        half = ends.halves[number]
        for way in (("up", number), ("down", number)):
            sent, got = ends.sent.get(way, []), ends.got.get(way, [])
            assert got == sent[: len(got)], "items keep their order"
            if not stream.is_answered:
                ended = way[0] == "up" and half.state is ClientStreamState.HALF
                assert len(sent) == ITEMS or ended, f"deadlock: {way}"
                assert got == sent
    for number, stream in [*ends.streams.items()]:
        ends.respond(stream)
        ends.deliver(2**20)
        assert number in ends.answered
    assert ends.server.streams(NOW).in_flight == ends.server.streams(NOW).lingering == 0
    assert len(ends.client.in_flight) == 0
