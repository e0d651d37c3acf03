"""Test frames that arrive slowly: judged at their header, and limited in time (zcp1.md, section 7.2)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.connection.helpers import ClientHarness, ended
from tests.helpers import NOW, SALT, WALL, ConnectionPair, small_registry, with_requests
from zcproto.connection.client import FRAME_TIMEOUT, PONG_TIMEOUT, ClientConnection
from zcproto.connection.events import (
    NEVER,
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    Request,
    RequestEnded,
    ResponseReceived,
)
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import ERROR, EVENT, HEADER_SIZE, RESPONSE, Kind
from zcproto.wire.message import encode_body, encode_error

SLOW_S = 100.0
"""More than the tolerance, less than any timeout."""

EARLY, LATE, FUTURE = -30_000, -30_001, 30_001
"""Timestamps at the arrival of the header: just fresh, too old, too new (and fresh when the frame is complete)."""


@pytest.fixture
def pair() -> ConnectionPair:
    pair = ConnectionPair()
    pair.login()
    pair.answers()
    return pair


# --- the server -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "is_fresh"), [(EARLY, True), (0, True), (LATE, False), (FUTURE, False)])
@pytest.mark.parametrize("cut", [HEADER_SIZE, HEADER_SIZE + 1, -1])
def test_slow_request_is_judged_at_its_header(
    pair: ConnectionPair, off: int, is_fresh: bool, cut: int
) -> None:
    data = pair.request(1, params={"text": "x" * 500}, timestamp=WALL + off)
    assert pair.send(data[:cut]) == []
    pair.clock.advance(SLOW_S)
    assert [isinstance(event, Request) for event in pair.send(data[cut:])] == [True] * is_fresh
    assert [answer.code for answer in pair.answers()] == [Code.STALE_TIMESTAMP] * (not is_fresh)


def test_request_is_fresh_wherever_it_is_cut_behind_its_header(pair: ConnectionPair) -> None:
    for cut in range(1, len(pair.request(1))):
        pair.send(pair.ping())
        pair.answers()
        data = pair.request(1)
        assert pair.send(data[:cut]) == []
        pair.clock.advance(31.0)
        if cut < HEADER_SIZE:
            assert pair.refused(data[cut:]).code == Code.STALE_TIMESTAMP
        else:
            pair.respond(pair.get(data[cut:]))
            pair.answers()


def test_request_byte_by_byte_is_judged_at_its_68th_byte(pair: ConnectionPair) -> None:
    data = pair.request(1)
    for at in range(len(data) - 1):
        pair.clock.advance(30.0 if at == HEADER_SIZE - 1 else 0.0 if at < HEADER_SIZE else 1.0)
        assert pair.send(data[at : at + 1]) == []
    pair.get(data[-1:])


def test_frames_behind_a_slow_one_are_judged_at_their_own_headers(pair: ConnectionPair) -> None:
    slow, waited, fresh = pair.request(1), pair.request(2), pair.request(3)
    pair.send(slow[:-1])
    pair.clock.advance(SLOW_S)
    late = pair.request(4)
    fresh = pair.request(5)
    events = pair.send(slow[-1:] + waited + late + fresh[:-1])
    assert [event.stream for event in events if isinstance(event, Request)] == [1, 4]
    (stale,) = pair.answers()
    assert (stale.stream, stale.code) == (2, Code.STALE_TIMESTAMP)
    pair.clock.advance(SLOW_S)
    assert pair.get(fresh[-1:]).stream == 5


def test_stale_slow_frame_does_not_lend_its_clock_to_the_next(pair: ConnectionPair) -> None:
    slow = pair.request(1, timestamp=WALL + FUTURE)
    pair.send(slow[:-1])
    pair.clock.advance(SLOW_S)
    fresh = pair.request(2)
    events = pair.send(slow[-1:] + fresh)
    assert [event.stream for event in events if isinstance(event, Request)] == [2]
    assert [answer.stream for answer in pair.answers()] == [1]


def test_frame_that_is_not_complete_in_time_closes_with_slow_frame(pair: ConnectionPair) -> None:
    data = pair.request(1)
    pair.clock.advance(200.0)
    assert pair.send(data[:HEADER_SIZE]) == []
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == pair.clock.now() + 300
    pair.clock.advance(299.0)
    assert pair.send(data[HEADER_SIZE:-1]) == []
    assert pair.timeout() == []
    pair.clock.advance(1.0)
    assert pair.timeout() == [ConnectionEnded(None, "slow_frame")]
    answer = pair.answer()
    assert (answer.kind, answer.value) == (Kind.GOAWAY, {"reason": "slow_frame", "retry_after_ms": 0})
    assert pair.server.state is State.CLOSED
    assert pair.send(data[-1:]) == []


def test_frame_complete_at_the_last_moment_is_run(pair: ConnectionPair) -> None:
    data = pair.request(1)
    pair.send(data[:-1])
    pair.clock.advance(299.999)
    assert pair.timeout() == []
    pair.get(data[-1:])
    pair.clock.advance(1.0)
    assert pair.timeout() == []
    assert pair.server.next_deadline() == pair.clock.now() + 299


def test_requests_in_flight_are_cancelled_before_slow_frame(pair: ConnectionPair) -> None:
    """Without an answer, a client would consider them as not run and repeat them."""
    held = pair.hold(pair.request(1))
    pair.send(pair.request(2)[:-1])
    pair.clock.advance(300.0)
    assert pair.timeout() == [RequestEnded(held, Code.CANCELLED), ConnectionEnded(None, "slow_frame")]
    cancelled, goaway = pair.answers()
    assert (cancelled.stream, cancelled.code, goaway.kind) == (1, Code.CANCELLED, Kind.GOAWAY)


def test_frame_timeout_is_configurable_and_shorter_than_idle_timeout() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(frame_timeout_s=20.0))
    pair.login()
    pair.answers()
    for stream in (1, 2):
        data = pair.request(stream)
        pair.send(data[:-1])
        pair.clock.advance(19.0)
        assert pair.timeout() == []
        pair.send(data[-1:])
        pair.respond(pair.get(pair.request(9)))
    pair.answers()
    pair.send(pair.request(3)[:-1])
    pair.clock.advance(20.0)
    assert pair.timeout() == [ConnectionEnded(None, "slow_frame")]


# --- the client -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "is_fresh"), [(EARLY, True), (0, True), (LATE, False), (FUTURE, False)])
@pytest.mark.parametrize(("head", "code"), [(RESPONSE, None), (ERROR, Code.NOT_FOUND)])
def test_slow_answer_is_judged_at_its_header(
    harness: ClientHarness, head: int, code: Code | None, off: int, is_fresh: bool
) -> None:
    stream = harness.request()
    body = encode_body("x" * 500) if code is None else encode_error(code, "x" * 500)
    data = harness.frame(head, stream, body, timestamp=WALL + off)
    assert harness.receive_data(data[:HEADER_SIZE]) == []
    advance(harness, SLOW_S)
    (event,) = harness.receive_data(data[HEADER_SIZE:])
    assert isinstance(event, ResponseReceived | ErrorReceived)
    assert getattr(event, "code", None) == (code if is_fresh else Code.DATA_LOSS)


def test_answer_is_fresh_wherever_it_is_cut_behind_its_header(harness: ClientHarness) -> None:
    for cut in range(1, HEADER_SIZE + 5):
        harness.receive_frame(EVENT, 0, encode_body(["a", None]))
        stream = harness.request()
        data = harness.frame(RESPONSE, stream, encode_body("abcd"))
        assert harness.receive_data(data[:cut]) == []
        advance(harness, 31.0)
        (event,) = harness.receive_data(data[cut:])
        assert isinstance(event, ResponseReceived if cut >= HEADER_SIZE else ErrorReceived), cut


def test_frames_behind_a_slow_answer_are_judged_at_their_own_headers(harness: ClientHarness) -> None:
    first, second = harness.request(), harness.request()
    slow = harness.frame(RESPONSE, first, b"\xc0")
    waited = harness.frame(RESPONSE, second, b"\xc0")
    harness.receive_data(slow[:-1])
    advance(harness, SLOW_S)
    fresh = harness.frame(EVENT, 0, encode_body(["a", None]))
    answered, lost = harness.receive_data(slow[-1:] + waited + fresh[:-1])
    assert answered == ResponseReceived(first, None)
    assert isinstance(lost, ErrorReceived)
    assert (lost.stream, lost.code) == (second, Code.DATA_LOSS)
    advance(harness, SLOW_S)
    (event,) = harness.receive_data(fresh[-1:])
    assert isinstance(event, EventReceived)


def test_bytes_of_a_slow_frame_keep_the_connection_alive(harness: ClientHarness) -> None:
    """The PONG waits behind the frame: a client that counted only whole frames would give up the connection."""
    data = harness.frame(RESPONSE, harness.request(), encode_body("x" * 5_000))
    harness.receive_data(data[:HEADER_SIZE])
    for at in range(HEADER_SIZE, HEADER_SIZE + 140):
        advance(harness, 2.0)
        assert harness.receive_data(data[at : at + 1]) == []
        assert harness.client.handle_timeout(harness.wall, harness.now) == []
    assert isinstance(harness.receive_data(data[HEADER_SIZE + 140 :])[0], ResponseReceived)


def test_frame_that_stops_arriving_closes_the_client_after_a_ping(harness: ClientHarness) -> None:
    harness.receive_data(harness.frame(RESPONSE, harness.request(), encode_body("x"))[:-1])
    advance(harness, 100.0)
    assert harness.client.handle_timeout(harness.wall, harness.now) == []
    advance(harness, PONG_TIMEOUT)
    assert ended(harness.client.handle_timeout(harness.wall, harness.now)).code is None


def test_frame_that_trickles_longer_than_its_timeout_closes_the_client(harness: ClientHarness) -> None:
    data = harness.frame(RESPONSE, harness.request(), encode_body("x" * 5_000))
    harness.receive_data(data[:HEADER_SIZE])
    advance(harness, FRAME_TIMEOUT - 0.001)
    assert harness.receive_data(data[HEADER_SIZE:100]) == []
    advance(harness, 0.001)
    event = ended(harness.receive_data(data[100:101]))
    assert event == ConnectionEnded(None, "a frame of the server took too long to arrive")


def advance(harness: ClientHarness, seconds: float) -> None:
    harness.now += seconds
    harness.wall += round(seconds * 1000)


# --- both, over a slow link ----------------------------------------------------------------------------------

RATE, DELAY_S, SEGMENT = 20_000, 10.0, 1_460
"""Bytes a second and seconds of a link like a phone's behind a large queue."""


class SlowLink:
    """Both ends of a connection on a link with a rate and a delay; time is that of the next arrival or timer."""

    def __init__(self) -> None:
        self.wall, self.now = WALL, NOW
        registry = small_registry()
        self.opened = registry.open("ada", client="", address="", wall=WALL)
        settings = ConnectionSettings(open_timeout_s=60.0)
        self.server = ServerConnection(settings, registry, salt=SALT, wall=WALL, now=NOW)
        self.client = ClientConnection()
        self.events: list[ClientEvent] = []
        self.executed: list[str] = []
        self._free = {
            True: NOW,
            False: NOW,
        }  # when each direction has sent what is queued; True: to the server
        self._arrivals: list[tuple[float, int, bool, bytes]] = []
        self._order = itertools.count()

    def call(self, params: dict[str, Any] | None = None) -> int:
        return self.client.request("echo", params, token=self.opened.token, wall=self.wall)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            for to_server, sender in ((True, self.client), (False, self.server)):
                for part in segments(sender.data_to_send()):
                    self._free[to_server] = max(self._free[to_server], self.now) + len(part) / RATE
                    arrival = self._free[to_server] + DELAY_S, next(self._order), to_server, part
                    heapq.heappush(self._arrivals, arrival)
            arrives = self._arrivals[0][0] if self._arrivals else NEVER
            due = min(arrives, self.server.next_deadline(), self.client.next_deadline(), end)
            self.wall += round((due - self.now) * 1000)
            self.now = due
            if due == end:
                return
            self.events += self.client.handle_timeout(self.wall, self.now)
            assert self.server.handle_timeout(self.wall, self.now) == []
            if due == arrives:
                _, _, to_server, part = heapq.heappop(self._arrivals)
                if to_server:
                    self._serve(part)
                else:
                    self.events += self.client.receive_data(part, self.wall, self.now)

    def _serve(self, data: bytes) -> None:
        for event in with_requests(self.server.receive_data(data, self.wall, self.now)):
            if isinstance(event, Request):
                size = event.params.get("size", 0)
                self.executed.append(event.params.get("name", ""))
                self.server.respond(event, encode_body("x" * size), self.wall)


def segments(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), SEGMENT):
        yield data[at : at + SEGMENT]


@pytest.fixture
def link() -> SlowLink:
    """Return a link on which a session has been used once, so that large frames are accepted."""
    link = SlowLink()
    link.run(15.0)
    link.call()
    link.run(25.0)
    assert isinstance(link.events.pop(), ResponseReceived)
    link.events.clear()
    link.executed.clear()
    return link


def test_request_and_answer_of_1_mb_pass_a_link_of_20_kb_per_second_with_10_s_delay(link: SlowLink) -> None:
    began = link.now
    large = link.call({"text": "x" * 1_000_000, "name": "large"})
    link.run(62.0)
    assert link.executed == ["large"]
    link.run(11.0)
    assert link.events == [ResponseReceived(large, "")]
    fetched = link.call({"size": 1_000_000})
    link.run(73.0)
    assert link.events[1:] == [ResponseReceived(fetched, "x" * 1_000_000)]
    assert link.now - began < 150
    assert (link.client.dropped_stale, link.server.totals.dropped_stale) == (0, 0)


def test_frames_that_waited_too_long_behind_a_large_one_fail_at_once(link: SlowLink) -> None:
    """A frame's timestamp is its age: what waited for 50 s in the sender's queue has a clear outcome."""
    fetched = link.call({"size": 1_000_000})
    behind = link.call({"name": "behind"})
    link.run(80.0)
    large, lost = link.events
    assert isinstance(large, ResponseReceived)
    assert isinstance(lost, ErrorReceived)
    assert (large.stream, lost.stream, lost.code) == (fetched, behind, Code.DATA_LOSS)
    link.events.clear()
    link.call({"text": "x" * 1_000_000, "name": "large"})
    behind = link.call({"name": "never run"})
    link.run(80.0)
    first, refused = link.events
    assert isinstance(first, ResponseReceived)
    assert isinstance(refused, ErrorReceived)
    assert (refused.stream, refused.code) == (behind, Code.STALE_TIMESTAMP)
    assert link.executed == ["", "behind", "large"]
