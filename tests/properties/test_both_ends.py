"""Test a client and a server joined in memory against a simple model of requests and sessions.

Bytes are delayed and split, both clocks move, the link is cut, and foreign bytes are injected. In any order of
events each end is in a valid state, each request gets exactly one answer or its connection closes, and buffers are
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers import FATAL_CODES, NOW, SALT, WALL, machine_settings, small_registry, with_requests
from zcproto.connection.client import PONG_TIMEOUT, ClientConnection
from zcproto.connection.events import (
    NEVER,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    Request,
    RequestEnded,
    ResponseReceived,
    SessionJoined,
    Welcomed,
)
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import TRANSITIONS, State
from zcproto.errors import CallError, Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import HEADER_SIZE, LENGTH_SIZE, NO_TOKEN, REQUEST, RESPONSE, Side, encode_frame
from zcproto.wire.message import encode_body, encode_error, encode_request

MAX_STREAMS = 3
IDLE_S = 60.0
OPEN_S = 10.0
LIFETIME_MS = 600_000
SESSION_IDLE_MS = 240_000
REFRESH_MS = 1_200_000
USERS = ("ada", "ben")
DEAD_TOKEN = {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}
ENDING = FATAL_CODES | {Code.STALE_TIMESTAMP}
"""Codes that close a connection; ten consecutive stale frames do so, too."""

METHODS = st.sampled_from(["echo", "echo", "wait", "wait", "server.info", "NOT ONE"])
DELAYED = st.sampled_from([False, False, True])
"""Whether sent bytes stay in transit for now."""

PARAMS = {"text": "x" * 20}


@dataclass
class ModelSession:
    """A session in the model. `tokens` are all its tokens; only the last one is valid."""

    id: str
    tokens: list[bytes]
    refresh_token: bytes
    expires_at: int
    refresh_expires_at: int
    revoked: bool = False


@dataclass
class Link:
    """Bytes in transit from one end to the other. Checks that frame counters grow by one."""

    decoder: FrameDecoder
    counter: int
    waiting: bytes = b""
    frames: list[bytes] = field(default_factory=list)
    is_fatal: bool = False
    """Whether bytes in transit will close the receiver."""

    def put(self, data: bytes) -> int:
        """Add sent bytes. Return their number of frames."""
        self.waiting += data
        self.decoder.feed(data)
        count = 0
        for frame in self.decoder.frames():
            self.counter += 1
            count += 1
            assert frame[5] == self.counter
            assert frame[4] == SALT
            self.frames = [*self.frames[-3:], encode_frame(*frame[1:])]
        assert not self.decoder.buffered
        return count

    @property
    def is_over(self) -> bool:
        """Return True if the bytes that end the receiver have arrived."""
        return self.is_fatal and not self.waiting

    def take(self, size: int) -> bytes:
        data, self.waiting = self.waiting[:size], self.waiting[size:]
        return data


def is_reachable(before: State, after: State) -> bool:
    """Return True if the table leads from one state to the other in any number of steps."""
    reached = {before}
    for _ in TRANSITIONS:
        reached |= {each for state in reached for each in TRANSITIONS[state].values()}
    return after in reached


class BothEnds(RuleBasedStateMachine):
    """`unanswered` has the requests in flight by stream, `held` those that the server is still running."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = small_registry(
            lifetime_ms=LIFETIME_MS, idle_timeout_ms=SESSION_IDLE_MS, refresh_lifetime_ms=REFRESH_MS
        )
        self.now = NOW
        self.server_wall = self.client_wall = WALL
        limits = ConnectionSettings(
            max_streams=MAX_STREAMS,
            idle_timeout_s=IDLE_S,
            frame_timeout_s=IDLE_S,
            open_timeout_s=OPEN_S,
            max_frame=4_000,
        )
        self.server = ServerConnection(limits, self.registry, salt=SALT, wall=WALL, now=NOW)
        self.client = ClientConnection(max_frame=4_000)
        self.to_server = Link(FrameDecoder(Side.SERVER, 2**32 - 1), 0)
        self.to_client = Link(FrameDecoder(Side.CLIENT, 2**32 - 1), -1)
        self.sessions: list[ModelSession] = []
        self.unanswered: dict[int, str] = {}
        self.held: list[Request] = []
        self.ended: dict[str, int] = {"server": 0, "client": 0}
        self.states = {"server": self.server.state, "client": self.client.state}
        self.is_clean = True  # no foreign bytes were injected
        self.is_whole = True  # no bytes were lost in transit
        self.collect()

    @initialize(welcomed=st.sampled_from([True] * 7 + [False]), sessions=st.sampled_from([0, 1, 2, 2]))
    def begin(self, welcomed: bool, sessions: int) -> None:
        if welcomed:
            self.deliver_to_client(10_000)
            assert self.client.state is State.OPEN
        for number in range(sessions):
            self.add_session(self.open_session(USERS[number]))

    # --- the client -----------------------------------------------------------------------------------

    @precondition(lambda self: self.sessions)
    @rule(
        calls=st.lists(METHODS, min_size=1, max_size=4),
        session=st.sampled_from([0, 0, 1, 1, 2, 3]),
        old=st.sampled_from([False, False, False, True]),
        deadline_ms=st.sampled_from([None, None, None, 0, 1, 5_000]),
        delayed=DELAYED,
    )
    def call(self, calls: list[str], session: int, old: bool, deadline_ms: int | None, delayed: bool) -> None:
        """Call with a current or an old token of a session."""
        tokens = self.sessions[session % len(self.sessions)].tokens
        for method in calls:
            meta = None if deadline_ms is None else {"deadline_ms": deadline_ms}
            self.send_request(method, PARAMS, token=tokens[0 if old else -1], meta=meta)
        self.deliver_all(not delayed)

    @rule(method=METHODS, delayed=DELAYED)
    def call_without_session(self, method: str, delayed: bool) -> None:
        self.send_request(method, PARAMS)
        self.deliver_all(not delayed)

    @rule(user=st.sampled_from(USERS), delayed=DELAYED)
    def call_open(self, user: str, delayed: bool) -> None:
        if len(self.sessions) < 6:
            self.send_request("session.open", {"user": user})
            self.deliver_all(not delayed)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), delayed=DELAYED)
    def call_refresh(self, data: st.DataObject, delayed: bool) -> None:
        self.send_request(
            "session.refresh", {"refresh_token": data.draw(st.sampled_from(self.sessions)).refresh_token}
        )
        self.deliver_all(not delayed)

    @rule(stream=st.integers(0, 12), delayed=DELAYED)
    def cancel(self, stream: int, delayed: bool) -> None:
        """Cancel a request in flight or an unknown one, else send a PING."""
        if stream < 3:
            self.client.ping(self.client_wall)
        else:
            self.client.cancel([*self.unanswered, 99][stream % (len(self.unanswered) + 1)], self.client_wall)
        self.deliver_all(not delayed)

    def send_request(self, method: str, params: dict[str, Any], **more: Any) -> None:
        client = self.client
        try:
            stream = client.request(method, params, wall=self.client_wall, **more)
        except ConnectionClosed:
            assert client.state is State.CLOSED
        except Unavailable:
            assert client.state in (State.AWAITING_WELCOME, State.DRAINING)
        except ResourceExhausted:
            assert len(self.unanswered) == MAX_STREAMS
        except InvalidArgument:
            assert len(encode_request(method, params)) > 3_000
        else:
            assert stream not in self.unanswered
            assert client.state is State.OPEN
            self.unanswered[stream] = method

    # --- the link --------------------------------------------------------------------------------------

    @rule(size=st.sampled_from([1, 30, 68, 100, 300, 10_000, 10_000]))
    def deliver_to_server(self, size: int) -> None:
        self.collect()
        data = self.to_server.take(size)
        if data:
            self.handle_server_events(
                with_requests(self.server.receive_data(data, self.server_wall, self.now))
            )
            assert not self.to_server.is_over or self.server.state is State.CLOSED

    @rule(size=st.sampled_from([1, 30, 68, 100, 300, 10_000, 10_000]))
    def deliver_to_client(self, size: int) -> None:
        self.collect()
        data = self.to_client.take(size)
        if data:
            self.handle_client_events(self.client.receive_data(data, self.client_wall, self.now))
            assert not self.to_client.is_over or self.client.state is State.CLOSED

    @rule()
    def deliver_all(self, immediately: bool = True) -> None:
        if immediately:
            self.deliver_to_server(100_000)
            self.deliver_to_client(100_000)

    @rule(
        what=st.sampled_from(["write", "write", "write", "revoke", "revoke", "cut", "go away", "much"]),
        data=st.data(),
        rare=st.integers(0, 2),
    )
    def rare_event(self, what: str, data: st.DataObject, rare: int) -> None:
        if rare:
            return
        match what:
            case "write":
                kinds = st.sampled_from(
                    ["again", "again", "zeros", "noise", "other salt", "high counter", "huge"]
                )
                self.inject_foreign_bytes(data.draw(st.booleans()), data.draw(kinds))
            case "revoke":
                if self.sessions:
                    self.revoke(data.draw(st.sampled_from(self.sessions)))
            case "cut":
                self.cut_link(data.draw(st.integers(0, 200)))
            case "go away":
                self.server.go_away("draining", 100, self.server_wall)
            case _:
                self.send_request("echo", {"text": "x" * data.draw(st.sampled_from([3_900, 20_000]))})

    def inject_foreign_bytes(self, to_server: bool, what: str) -> None:
        link = self.to_server if to_server else self.to_client
        head = REQUEST if to_server else RESPONSE
        match what:
            case "again":
                data = link.frames[-1] if link.frames else b""
            case "zeros":
                data = b"\0" * 100
            case "noise":
                data = b"\x00\x00\x01\x00noise" * 30
            case "other salt":
                data = encode_frame(head, 1, WALL, b"another!", 2**32, NO_TOKEN, b"\x80")
            case "high counter":
                data = encode_frame(head, 1, self.server_wall, SALT, 2**63, NO_TOKEN, b"\x80")
            case _:
                data = b"\x7f\xff\xff\xff" + b"x" * 200
        self.collect()
        if data:
            self.is_clean = False
            link.waiting += data
            link.is_fatal = link.is_fatal or what != "high counter"

    def cut_link(self, keep: int) -> None:
        """Notify both ends; bytes in transit are lost except for a part."""
        self.is_whole = False
        self.deliver_to_server(keep)
        self.deliver_to_client(keep)
        self.to_server.waiting = self.to_client.waiting = b""
        self.server.end()
        self.client.end()
        self.discard_held()

    # --- the server's edge ----------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(data=st.data(), good=st.booleans())
    def handler_returns(self, data: st.DataObject, good: bool) -> None:
        request = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        owed = self.server.is_held(request) and self.server.state is not State.CLOSED
        if good:
            assert self.server.respond(request, encode_body(PARAMS), self.server_wall) is owed
        else:
            assert self.server.fail(request, encode_error(Code.INTERNAL, "x"), self.server_wall) is owed

    def revoke(self, known: ModelSession) -> None:
        self.registry.revoke(known.id, user=None, reason="x")
        known.revoked = True
        self.server.session_revoked(known.id, "x", self.server_wall, self.now)

    def open_session(self, user: str) -> Any:
        return self.registry.open(user, client="test/1", address="192.0.2.7", wall=self.server_wall)

    def add_session(self, opened: Any) -> None:
        session = opened.session
        self.sessions.append(
            ModelSession(
                session.id,
                [opened.token],
                opened.refresh_token,
                session.expires_at,
                opened.refresh_expires_at,
            )
        )

    def handle_server_events(self, events: Any) -> None:
        for event in events:
            assert not self.ended["server"]
            match event:
                case Request():
                    self.run(event)
                case RequestEnded():
                    assert event.request in self.held
                    assert event.request.lingers
                case ConnectionEnded():
                    self.ended["server"] += 1
                    assert self.server.state is State.CLOSED
                    assert event.code is None or event.code in ENDING
                case SessionJoined():
                    assert any(known.id == event.session_id for known in self.sessions)

    def run(self, request: Request) -> None:
        """Check that a running request has a live token or none."""
        self.check_token(request)
        server = self.server
        match request.method:
            case "wait":
                server.hold(request, self.now)
                self.held.append(request)
                assert server.in_flight <= MAX_STREAMS
            case "session.open":
                opened = self.open_session(request.params["user"])
                self.add_session(opened)
                server.join(opened.session, opened.token, self.server_wall, self.now)
                server.respond(request, encode_body({"token": opened.token}), self.server_wall)
            case "session.refresh":
                self.refresh(request)
            case _:
                assert server.respond(request, encode_body(PARAMS), self.server_wall)

    def check_token(self, request: Request) -> None:
        if request.token == NO_TOKEN:
            assert request.session is None
            return
        (known,) = [known for known in self.sessions if request.token in known.tokens]
        assert request.token == known.tokens[-1]
        assert not known.revoked
        assert self.server_wall < known.expires_at
        assert request.session.id == known.id

    def refresh(self, request: Request) -> None:
        refresh_token = request.params["refresh_token"]
        found = [known for known in self.sessions if known.refresh_token == refresh_token]
        opened, code = None, None
        try:
            opened = self.registry.refresh(
                refresh_token, client="test/1", address="192.0.2.7", wall=self.server_wall
            )
        except CallError as error:
            code = error.code
        if opened is None or code is not None:
            assert code in DEAD_TOKEN
            assert all(known.revoked or self.server_wall >= known.refresh_expires_at for known in found)
            self.server.fail(request, encode_error(code, "x"), self.server_wall)
            return
        known = next(known for known in self.sessions if known.id == opened.session.id)
        assert not known.revoked
        if opened.token != known.tokens[-1]:
            assert found == [known]
            known.tokens.append(opened.token)
            known.refresh_token, known.expires_at = opened.refresh_token, opened.session.expires_at
        self.server.join(opened.session, opened.token, self.server_wall, self.now)
        self.server.respond(request, encode_body({"token": opened.token}), self.server_wall)

    # --- the client's edge ----------------------------------------------------------------------------

    def handle_client_events(self, events: Any) -> None:
        for event in events:
            assert not self.ended["client"]
            match event:
                case ResponseReceived() | ErrorReceived():
                    assert self.unanswered.pop(event.stream, None) is not None
                    assert not isinstance(event, ErrorReceived) or event.code not in FATAL_CODES
                case ConnectionEnded():
                    self.ended["client"] += 1
                    assert self.client.state is State.CLOSED
                case Welcomed() | GoAwayReceived() | EventReceived():
                    assert self.client.state in (State.OPEN, State.DRAINING)

    # --- time -----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.5, 0.5, 2.0, 4.0, 9.0, 21.0, 61.0, 250.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.server_wall += round(seconds * 1_000)
        self.client_wall += round(seconds * 1_000)
        self.handle_server_events(self.server.handle_timeout(self.server_wall, self.now))
        assert self.server.next_deadline() > self.now
        self.handle_client_events(self.client.handle_timeout(self.client_wall, self.now))
        assert self.client.next_deadline() > self.now

    @rule(
        whose=st.sampled_from(["server", "client", "both"]),
        jump_ms=st.sampled_from([-90_000, -1_000, -1_000, 1_000, 1_000, 90_000]),
    )
    def set_clock(self, whose: str, jump_ms: int) -> None:
        if whose != "client":
            self.server_wall += jump_ms
        if whose != "server":
            self.client_wall += jump_ms

    # --- invariants -----------------------------------------------------------------------

    def collect(self) -> None:
        """Send the pending output of both ends."""
        was_closed = self.states["server"] is State.CLOSED, self.states["client"] is State.CLOSED
        sent = (
            self.to_client.put(self.server.data_to_send()),
            self.to_server.put(self.client.data_to_send()),
        )
        for closed, frames in zip(was_closed, sent, strict=True):
            assert not (closed and frames)

    def discard_held(self) -> None:
        for request in self.held:
            assert not self.server.respond(request, b"\x80", self.server_wall)
        self.held.clear()

    @invariant()
    def states_are_valid(self) -> None:
        self.collect()
        for name, end in (("server", self.server), ("client", self.client)):
            assert is_reachable(self.states[name], end.state)
            self.states[name] = end.state
            assert not self.ended[name] or end.state is State.CLOSED
            if end.state is State.CLOSED:
                assert end.next_deadline() == NEVER
                assert not list(end.receive_data(b"\0" * HEADER_SIZE, WALL, self.now))
                assert not end.handle_timeout(WALL, self.now)
                assert not end.data_to_send()

    @invariant()
    def everything_is_bounded(self) -> None:
        self.collect()
        server, client = self.server, self.client
        assert len(client.in_flight) == len(self.unanswered) <= MAX_STREAMS
        assert not client.queued_bytes
        if server.state is not State.CLOSED:
            assert server.in_flight + server._lingering == len(self.held) <= MAX_STREAMS
            assert server.buffered <= 4_000 + LENGTH_SIZE
            assert len(list(server.sessions)) <= len(self.sessions)
            assert server.next_deadline() <= self.now + IDLE_S
        if client.state is not State.CLOSED:
            assert client._decoder.buffered <= 16_384 + LENGTH_SIZE
        if client.state in (State.OPEN, State.DRAINING):
            assert client.next_deadline() <= self.now + max(IDLE_S / 3, PONG_TIMEOUT)

    def teardown(self) -> None:
        """Deliver everything and return all handlers: each request is then answered or its connection closed."""
        while self.held:
            self.server.respond(self.held.pop(), b"\x80", self.server_wall)
        for _ in range(2):
            self.deliver_to_server(100_000)
            while self.held:
                self.server.respond(self.held.pop(), b"\x80", self.server_wall)
            self.deliver_to_client(100_000)
        self.states_are_valid()
        if self.client.state is State.OPEN and self.server.state is State.OPEN and self.is_clean:
            assert self.is_whole
            assert not self.unanswered  # even if a wrong clock makes answers stale
            assert not self.client.dropped_unknown
        if self.is_clean and self.is_whole and self.ended["client"] and not self.ended["server"]:
            # Only silence and stale frames close a client whose server stays open.
            assert self.client.dropped_stale or self.client.state is State.CLOSED


TestBothEnds = BothEnds.TestCase
TestBothEnds.settings = machine_settings(max_examples=200, steps=50)
