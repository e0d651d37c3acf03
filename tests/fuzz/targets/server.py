"""Fuzz a server connection with a hostile client. An input is a script of steps of both sides."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable

from tests.fuzz.frame import any_frame
from tests.fuzz.target import Script, Target
from tests.helpers import FATAL_CODES, SALT, ConnectionPair, small_registry
from zcproto.connection.events import (
    NEVER,
    CallEnded,
    ConnectionEnded,
    FrameBuffered,
    Request,
    RequestEnded,
    ServerEvent,
    SessionJoined,
)
from zcproto.connection.server_calls import CallToClient, ServerCall, encode_call
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import CallError, Code
from zcproto.wire.frame import (
    ALLOWED,
    FAILURE,
    LENGTH_SIZE,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESULT,
    Kind,
    Side,
    accepted_with_calls,
)
from zcproto.wire.message import encode_body

SETTINGS = ConnectionSettings(
    max_frame=2_000,
    max_frame_before_session=600,
    max_streams=3,
    max_calls=3,
    idle_timeout_s=60.0,
    frame_timeout_s=50.0,
    open_timeout_s=10.0,
)
ENDING = FATAL_CODES | {Code.STALE_TIMESTAMP}
"""Codes that close a connection; ten consecutive stale frames do so, too."""

ORDER = [State.OPEN, State.DRAINING, State.CLOSED]
HEADS = (
    *sorted(ALLOWED[Side.SERVER].heads),
    *(0x01030000, 0x01020001, 0x02020000, 0x01FF0000, RESULT, FAILURE),
)
METHODS = ("echo", "server.info", "session.open", "NOT ONE")
DEADLINES = (None, 0, 1, 5_000, 2**63)
SECONDS = (0.0, 0.001, 0.5, 4.0, 15.0, 61.0)
JUMPS_MS = (-(2**40), -40_000, -1_000, 1_000, 40_000, 2**40)


class HostileClient:
    """Play a script against a server. With `checked` the invariants are asserted after each step."""

    def __init__(self, checked: bool = True) -> None:
        registry = small_registry(lifetime_ms=600_000, idle_timeout_ms=120_000)
        self.pair = ConnectionPair(registry, SETTINGS)
        self.checked = checked
        opened = [self.pair.login("ada"), self.pair.open_session("ben")]
        self.tokens = [opened[0].token, opened[1].token, NO_TOKEN, b"?" * 32]
        self.held: list[Request] = []
        decoder = self.pair._decoder
        decoder.accepted = accepted_with_calls(Side.CLIENT, decoder.accepted)
        self.session_id = opened[0].session.id
        self.waiting: list[ServerCall] = []
        self.owed: Counter[int] = Counter()
        self.counter = 0
        self.state = State.OPEN
        self.ended = 0

    def play(self, data: bytes) -> None:
        script = Script(data)
        while not script.ended:
            self.step(script)
            if self.checked:
                self.check()
            else:
                self.pair.server.data_to_send()

    def step(self, script: Script) -> None:
        pair, server, clock = self.pair, self.pair.server, self.pair.clock
        match script.byte() % 13:
            case 0:
                self.feed(script.bytes(), script)
            case 1:
                self.feed(self.any_frame(script), script)
            case 2 | 3:
                stream, method = script.byte() % 5 + 1, script.choose(METHODS)
                deadline = script.choose(DEADLINES)
                meta = None if deadline is None else {"deadline_ms": deadline}
                self.feed(
                    pair.request(stream, method, {"x": script.bytes()}, meta, token=self.token(script)),
                    script,
                )
            case 4:
                self.feed(
                    pair.frame(REQUEST, script.byte() % 5, script.bytes(), token=self.token(script)), script
                )
            case 5:
                self.feed(pair.cancel(script.byte() % 5, token=self.token(script)), script)
            case 6:
                self.feed(pair.frame(script.choose((PING, PONG)), token=self.token(script)), script)
                self.call(script)
            case 7:
                clock.advance(script.choose(SECONDS))
                self.handle_events(server.handle_timeout(clock.wall(), clock.now()), False)
                if self.checked:
                    assert server.next_deadline() > clock.now()
            case 8:
                clock.wall_ms = max(0, clock.wall_ms + script.choose(JUMPS_MS))
            case 9 if self.held:
                request = self.held.pop(script.byte() % len(self.held))
                pair.respond(request, encode_body(script.bytes()))
            case 10:
                user = script.choose(("ada", "ben"))
                for info in pair.registry.list(user, clock.wall()):
                    pair.registry.revoke(info.id, user=user, reason="x")
                    server.session_revoked(info.id, "x", clock.wall(), clock.now())
            case 11:
                if len(self.tokens) < 8:
                    self.tokens.append(pair.open_session("ada").token)
            case 12 if script.byte() % 8 == 0:
                server.go_away("draining", 100, clock.wall())

    def call(self, script: Script) -> None:
        """Register a method, call it, give a call up, or answer with any bytes."""
        server, clock = self.pair.server, self.pair.clock
        match script.byte() % 4:
            case 0:
                server.register(self.session_id, frozenset({"ask"}), script.byte() % 5)
            case 1:
                body = encode_call(CallToClient("ask", {}, 5.0), 1_000)
                with contextlib.suppress(CallError):
                    call = server.call(
                        self.session_id, "ask", body, timeout_s=5.0, wall=clock.wall(), now=clock.now()
                    )
                    self.waiting.append(call)
            case 2 if self.waiting:
                call = self.waiting.pop(script.byte() % len(self.waiting))
                assert server.withdraw(call, clock.wall())
            case _:
                head, number = script.choose((RESULT, FAILURE)), script.byte() % 5 + 1
                self.feed(self.pair.frame(head, number, script.bytes(), token=self.tokens[0]), script)

    def token(self, script: Script) -> bytes:
        return script.choose(self.tokens)

    def any_frame(self, script: Script) -> bytes:
        return any_frame(script, self.pair.frame, token=self.token(script), heads=HEADS, streams=5)

    def feed(self, data: bytes, script: Script) -> None:
        self.handle_events(self.pair.receive_data(data), script.byte() % 2 == 1)

    def handle_events(self, events: Iterable[ServerEvent | Request], hold: bool) -> None:
        server, clock = self.pair.server, self.pair.clock
        for event in events:
            match event:
                case Request() if hold:
                    assert all(not server.is_held(each) for each in self.held if each.stream == event.stream)
                    server.hold(event, clock.now())
                    self.held.append(event)
                case Request():
                    assert self.pair.respond(event)
                case CallEnded():
                    self.waiting.remove(event.call)
                case RequestEnded():
                    assert event.request.lingers
                case ConnectionEnded():
                    self.ended += 1
                    assert server.state is State.CLOSED
                case _:
                    assert isinstance(event, SessionJoined | FrameBuffered)

    def check(self) -> None:
        """Assert a valid state, consecutive counters, and bounded streams, sessions and buffers."""
        server = self.pair.server
        assert ORDER.index(server.state) >= ORDER.index(self.state)
        was_closed, self.state = self.state is State.CLOSED, server.state
        assert self.ended == (server.state is State.CLOSED)
        answers = self.pair.answers()
        assert not (was_closed and answers)
        for number, answer in enumerate(answers):
            self.counter += 1
            assert answer.counter == self.counter
            assert answer.salt == SALT
            assert len(answer.body) <= SETTINGS.max_body
            if answer.kind is Kind.ERROR and not answer.stream:
                assert answer.code in ENDING
                assert number == len(answers) - 1
                assert server.state is State.CLOSED
        assert server.in_flight + server._lingering <= SETTINGS.max_streams
        assert len(list(server.sessions)) <= len(self.tokens)
        assert len(self.waiting) <= SETTINGS.max_calls
        assert server.has_calls == bool(self.waiting)
        if server.state is State.CLOSED:
            assert server.next_deadline() == NEVER
            assert not self.pair.timeout()
        else:
            assert server.buffered <= SETTINGS.max_frame + LENGTH_SIZE
            assert server.next_deadline() <= self.pair.clock.now() + SETTINGS.idle_timeout_s


def run(data: bytes) -> None:
    HostileClient(checked=False).play(data)


def check(data: bytes) -> None:
    HostileClient().play(data)


TARGET = Target("server", run, check, max_size=1_024, limit_s=0.040, repeats=False)
