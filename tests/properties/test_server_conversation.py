"""Test properties of a server for any sequence of frames, answers, cancellations, timeouts and revocations."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers import FATAL_CODES, SALT, ConnectionPair, machine_settings, small_registry
from zcproto.connection.events import ConnectionEnded, Request, RequestEnded
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.sessions import Session
from zcproto.wire.frame import CANCEL, NO_TOKEN, PING, PONG, REQUEST, Kind
from zcproto.wire.message import encode_body, encode_request

MAX_STREAMS = 3
STREAMS = st.integers(1, 5)
TOKENS = st.sampled_from(["ada", "ben", "none", "unknown"])
ORDER = [State.OPEN, State.DRAINING, State.CLOSED]


def new_pair() -> ConnectionPair:
    return ConnectionPair(
        small_registry(lifetime_ms=600_000, idle_timeout_ms=120_000),
        ConnectionSettings(
            max_streams=MAX_STREAMS, idle_timeout_s=60.0, frame_timeout_s=60.0, open_timeout_s=10.0
        ),
    )


class ServerMachine(RuleBasedStateMachine):
    """A server whose edge answers at any time, and a client that sends anything.

    `owed` counts unanswered requests by stream. An answer that is not owed is a duplicate; a request that is
    owed but not held, while the connection lives, has lost its answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = new_pair()
        self.owed: Counter[int] = Counter()
        self.held: dict[int, Request] = {}
        self.deferred: list[Request] = []  # requests that the edge did not answer immediately
        self.counter = 0
        self.state = State.OPEN
        self.tokens: dict[str, bytes] = {}

    @initialize(users=st.sets(st.sampled_from(["ada", "ben"])))
    def log_in(self, users: set[str]) -> None:
        for user in ("ada", "ben"):
            opened = self.pair.open_session(user)
            self.tokens[user] = opened.token
            if user in users:
                self.pair.use(opened)
        self.tokens |= {"none": NO_TOKEN, "unknown": b"?" * 32}

    # the client

    @rule(
        stream=STREAMS,
        token=TOKENS,
        method=st.sampled_from(["echo", "server.info", "NOT ONE"]),
        deadline_ms=st.sampled_from([None, 0, 1, 5_000]),
        hold=st.booleans(),
        stale=st.booleans() | st.just(False),
    )
    def request(
        self, stream: int, token: str, method: str, deadline_ms: int | None, hold: bool, stale: bool
    ) -> None:
        meta = None if deadline_ms is None else {"deadline_ms": deadline_ms}
        fields: dict[str, Any] = {"timestamp": 0} if stale else {}
        data = self.pair.request(stream, method, meta=meta, token=self.tokens[token], **fields)
        if self.pair.server.state is not State.CLOSED:
            self.owed[stream] += 1
        self._feed(data, hold)

    @rule(stream=STREAMS, token=TOKENS)
    def cancel(self, stream: int, token: str) -> None:
        self._feed(self.pair.cancel(stream, token=self.tokens[token]))

    @rule()
    def ping(self) -> None:
        self._feed(self.pair.ping())

    @rule(data=st.sampled_from([b"\0" * 4, b"\xff" * 4]), rare=st.integers(0, 15))
    def garbage(self, data: bytes, rare: int) -> None:
        if not rare:
            self._feed(data)

    # the edge

    @precondition(lambda self: self.deferred)
    @rule(data=st.data())
    def handler_returns(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.deferred))
        owed = self.held.get(request.stream) is request and self.pair.server.state is not State.CLOSED
        assert self.pair.respond(request, encode_body("done")) is owed
        if self.held.get(request.stream) is request:
            del self.held[request.stream]

    @rule(seconds=st.sampled_from([0.001, 0.5, 4.0, 15.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.pair.clock.advance(seconds)
        self._handle_events(self.pair.timeout())

    @rule(user=st.sampled_from(["ada", "ben"]))
    def revoke(self, user: str) -> None:
        for info in self.pair.registry.list(user, self.pair.clock.wall()):
            self.pair.registry.revoke(info.id, user=user, reason="x")
            self.pair.server.session_revoked(info.id, "x", self.pair.clock.wall(), self.pair.clock.now())

    @rule(user=st.sampled_from(["ada", "ben", "someone else"]))
    def revoke_unnoticed(self, user: str) -> None:
        if user == "someone else":
            self.pair.open_session(user)
        self.pair.registry.revoke_user(user, "x")

    @rule(user=st.sampled_from(["ada", "ben"]))
    def log_in_again(self, user: str) -> None:
        if not self.pair.registry.list(user, self.pair.clock.wall()):
            self.tokens[user] = self.pair.login(user).token

    @rule(rare=st.integers(0, 15))
    def go_away(self, rare: int) -> None:
        if not rare:
            self.pair.server.go_away("draining", 100, self.pair.clock.wall())

    # checks

    def _feed(self, data: bytes, hold: bool = False) -> None:
        self._handle_events(self.pair.receive_data(data), hold)

    def _handle_events(self, events: Any, hold: bool = False) -> None:
        for event in events:
            if isinstance(event, Request) and event.session is not None:
                checked = self.pair.registry.check(event.token, self.pair.clock.wall())
                assert isinstance(checked, Session)
                assert checked.id == event.session.id
            match event:
                case Request() if hold:
                    assert event.stream not in self.held
                    self.pair.server.hold(event, self.pair.clock.now())
                    self.held[event.stream] = event
                    self.deferred.append(event)
                case Request():
                    assert self.pair.respond(event)
                case RequestEnded():
                    assert self.held.pop(event.request.stream) is event.request
                case ConnectionEnded():
                    assert self.pair.server.state is State.CLOSED

    @invariant()
    def answers_are_owed_and_counters_consecutive(self) -> None:
        for answer in self.pair.answers():
            self.counter += 1
            assert answer.counter == self.counter
            assert answer.salt == SALT
            if answer.stream:
                assert answer.kind in (Kind.RESPONSE, Kind.ERROR)
                self.owed[answer.stream] -= 1
                assert self.owed[answer.stream] >= 0
                assert answer.kind is Kind.RESPONSE or answer.code not in FATAL_CODES

    @invariant()
    def no_answer_is_lost(self) -> None:
        server = self.pair.server
        assert ORDER.index(server.state) >= ORDER.index(self.state)
        self.state = server.state
        if server.state is State.CLOSED:
            return
        assert dict.fromkeys(self.held, 1) == +self.owed
        assert server.in_flight == len(self.held)
        assert server._lingering == sum(request.lingers for request in self.deferred) >= 0
        assert server.in_flight + server._lingering <= MAX_STREAMS
        assert server.next_deadline() <= self.pair.clock.now() + 60

    def teardown(self) -> None:
        """Return all handlers: nothing may be owed then."""
        for request in list(self.deferred):
            self.pair.respond(request)
        self.held.clear()
        self.answers_are_owed_and_counters_consecutive()
        if self.pair.server.state is not State.CLOSED:
            assert not +self.owed
            assert self.pair.server._lingering == 0


TestServer = ServerMachine.TestCase
TestServer.settings = machine_settings(max_examples=40, steps=30)


# --- splits of the bytes --------------------------------------------------------------------------


def frames_of(steps: list[tuple[str, int]], pair: ConnectionPair) -> bytes:
    """Generate frames of all kinds, invalid ones included."""
    frames: list[bytes] = []
    for kind, stream in steps:
        match kind:
            case "echo":
                frames.append(pair.request(stream, params={"n": stream}))
            case "hold":
                frames.append(pair.request(stream, "sleep"))
            case "large":
                frames.append(pair.request(stream, params={"text": "x" * 300}))
            case "unknown token":
                frames.append(pair.request(stream, token=b"?" * 32))
            case "stale":
                frames.append(pair.request(stream, timestamp=0))
            case "bad body":
                frames.append(pair.frame(REQUEST, stream, b"\xc1"))
            case "cancel":
                frames.append(pair.frame(CANCEL, stream))
            case "ping":
                frames.append(pair.frame(PING))
            case "pong":
                frames.append(pair.frame(PONG))
            case "fault":
                frames.append(pair.frame(0x01FF0000, stream))
    return b"".join(frames)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["echo", "hold", "large", "unknown token", "stale", "bad body", "cancel", "ping", "pong", "fault"]
        ),
        STREAMS,
    ),
    max_size=8,
)


def output_of(pieces: list[bytes]) -> tuple[list[str], bytes, State, int]:
    """Return the events, output, state and buffered bytes of a server fed with these pieces."""
    pair = new_pair()
    pair.login()
    pair.answers()
    events: list[str] = []
    sent = b""
    for piece in pieces:
        for event in pair.receive_data(piece):
            events.append(repr(event))
            if isinstance(event, Request):
                if event.method == "sleep":
                    pair.server.hold(event, pair.clock.now())
                else:
                    pair.respond(event, encode_body(event.params))
        sent += pair.server.data_to_send()
    left = 0 if pair.server.state is State.CLOSED else pair.server.buffered
    return events, sent, pair.server.state, left


def stream_of(steps: list[tuple[str, int]]) -> bytes:
    pair = new_pair()
    pair.login()
    return frames_of(steps, pair)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.data())
def test_server_output_is_the_same_for_every_split(steps: list[tuple[str, int]], data: st.DataObject) -> None:
    stream = stream_of(steps)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    edges = [0, *sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert output_of(pieces) == output_of([stream])


def test_server_output_is_the_same_in_two_pieces_and_byte_by_byte() -> None:
    stream = stream_of([("hold", 1), ("echo", 2), ("cancel", 1), ("stale", 3), ("bad body", 4), ("ping", 1)])
    whole = output_of([stream])
    assert len(whole[0]) == 3
    assert output_of([stream[at : at + 1] for at in range(len(stream))]) == whole
    for at in range(0, len(stream), 3):
        assert output_of([stream[:at], stream[at:]]) == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_any_bytes_give_frames_or_the_end(pieces: list[bytes]) -> None:
    events, _, state, left = output_of(pieces)
    assert state is State.CLOSED or left < 1_000
    assert len(events) <= 1


@settings(max_examples=60, deadline=None)
@given(STEPS.filter(bool), st.data())
def test_damaged_conversation_is_answered_and_never_raises(
    steps: list[tuple[str, int]], data: st.DataObject
) -> None:
    stream = bytearray(stream_of(steps))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    events, sent, state, _ = output_of([bytes(stream)])
    if state is State.CLOSED:
        assert events[-1].startswith("ConnectionEnded")
        assert sent


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_any_body_is_a_request_or_an_error_on_its_stream(body: bytes) -> None:
    pair = new_pair()
    pair.login()
    events = pair.send(pair.frame(REQUEST, 1, body))
    if events:
        (request,) = events
        assert isinstance(request, Request)
    else:
        assert pair.answer().code in (Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED)
    assert pair.server.state is State.OPEN
    pair.get(pair.frame(REQUEST, 2, encode_request("echo", None)))
