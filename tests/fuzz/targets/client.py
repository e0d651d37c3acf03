"""Fuzz a client connection with a hostile server. An input is a script of steps of both sides."""

from __future__ import annotations

import contextlib
from typing import Any

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness
from tests.fuzz.frame import any_frame
from tests.fuzz.target import Script, Target
from zcproto.connection.client import PONG_TIMEOUT
from zcproto.connection.client_calls import ClientCall, ClientCallState
from zcproto.connection.events import (
    NEVER,
    CallReceived,
    CallWithdrawn,
    ConnectionEnded,
    ErrorReceived,
    ResponseReceived,
)
from zcproto.connection.state import State
from zcproto.errors import CallError, ConnectionClosed
from zcproto.wire.frame import (
    ALLOWED,
    CALL,
    FAILURE,
    LENGTH_SIZE,
    NO_TOKEN,
    ON_A_STREAM,
    REQUEST,
    RESULT,
    WITHDRAW,
    Side,
    accepted_with_calls,
)
from zcproto.wire.message import encode_body, encode_error, encode_request

ORDER = [State.AWAITING_WELCOME, State.OPEN, State.DRAINING, State.CLOSED]
HEADS = (*sorted(ALLOWED[Side.CLIENT].heads), REQUEST, 0x01030001, 0x02030000, CALL, WITHDRAW)
HANDLE = "session.handle"
METHODS = ("echo", "session.open", "session.refresh", "session.info", HANDLE)
HANDLERS = 2
BODIES = (
    encode_error(1, "cancelled"),
    encode_error(16, "unknown token"),
    encode_error(67, "stale", {"server_time": 1_767_225_600_000}),
    encode_error(67, "stale", {"server_time": 2**63}),
    encode_error(64, "fault"),
    encode_body({"reason": "draining", "retry_after_ms": 5}),
    encode_body(["session.revoked", {"reason": "x"}]),
    encode_body({"token": TOKEN}),
    encode_body({"x": 1}),
    encode_body(WELCOME_MAP),
    b"",
    encode_request("ask", {}, {"deadline_ms": 5}),
    encode_request("other", {}, {"deadline_ms": 5}),
)
SECONDS = (0.0, 0.1, 5.0, 11.0, 101.0)
JUMPS_MS = (-(2**40), -40_000, -1_000, 1_000, 40_000, 2**40)
LIMIT = 2_000
IDLE_S = 60.0


class HostileServer:
    """Play a script against a client. With `checked` the invariants are asserted after each step."""

    def __init__(self, welcomed: bool, checked: bool = True) -> None:
        welcome = {**WELCOME_MAP, "idle_timeout_ms": round(IDLE_S * 1_000), "max_frame": LIMIT}
        welcome["calls"] = {"max": 4}
        self.harness = ClientHarness(welcome if welcomed else None, max_frame=LIMIT)
        decoder = self.harness._decoder
        decoder.accepted = accepted_with_calls(Side.SERVER, decoder.accepted)
        self.running: list[ClientCall] = []
        self.checked = checked
        self.pending: set[int] = set()
        self.counter = 0
        self.state = self.harness.client.state
        self.ended = 0

    def play(self, script: Script) -> None:
        while not script.ended:
            self.step(script)
            if self.checked:
                self.check()
            else:
                self.harness.client.data_to_send()

    def step(self, script: Script) -> None:
        harness, client = self.harness, self.harness.client
        match script.byte() % 9:
            case 0:
                self.receive(script.bytes())
            case 1 | 2:
                self.receive(self.any_frame(script))
            case 3:
                self.receive(harness.frame(script.choose(HEADS), script.byte() % 6, script.choose(BODIES)))
            case 4 | 5:
                token = script.choose((NO_TOKEN, TOKEN))
                with contextlib.suppress(CallError, ConnectionClosed):
                    method = script.choose(METHODS)
                    if method == HANDLE:
                        stream = client.handle(
                            frozenset({"ask"}), HANDLERS, None, token=TOKEN, wall=harness.wall
                        )
                    else:
                        stream = harness.request(method, {"x": script.bytes()}, token=token)
                    assert stream not in self.pending
                    self.pending.add(stream)
            case 6:
                client.cancel(script.byte() % 6, harness.wall)
                if script.byte() % 2:
                    client.ping(harness.wall)
                elif self.running:
                    call = self.running.pop(script.byte() % len(self.running))
                    client.answer_call(call, script.bytes(), harness.wall)
                    client.release_call(call)
            case 7:
                seconds = script.choose(SECONDS)
                harness.now += seconds
                harness.wall += round(seconds * 1_000)
                self.handle_events(client.handle_timeout(harness.wall, harness.now))
                if self.checked:
                    assert client.next_deadline() > harness.now
            case 8:
                harness.wall = max(0, harness.wall + script.choose(JUMPS_MS))

    def any_frame(self, script: Script) -> bytes:
        return any_frame(
            script, self.harness.frame, token=script.choose((NO_TOKEN, TOKEN)), heads=HEADS, streams=6
        )

    def receive(self, data: bytes) -> None:
        self.handle_events(self.harness.receive_data(data))

    def handle_events(self, events: list[Any]) -> None:
        for event in events:
            assert not self.ended
            if isinstance(event, ResponseReceived | ErrorReceived):
                assert event.stream in self.pending
                self.pending.discard(event.stream)
            elif isinstance(event, CallReceived):
                self.running.append(event.call)
            elif isinstance(event, CallWithdrawn):
                assert event.call.state is ClientCallState.NONE
                assert event.call in self.running, "its handler has not ended"
            elif isinstance(event, ConnectionEnded):
                self.ended += 1

    def check(self) -> None:
        """Assert a valid state, consecutive counters, and bounded buffers."""
        client = self.harness.client
        assert ORDER.index(client.state) >= ORDER.index(self.state)
        was_closed, self.state = self.state is State.CLOSED, client.state
        assert self.ended == (client.state is State.CLOSED)
        frames = self.harness.sent()
        assert not (was_closed and frames)
        for _, head, stream, timestamp, salt, counter, _, body in frames:
            self.counter += 1
            assert counter == self.counter
            assert salt == client.salt
            assert (head in ON_A_STREAM) is (stream > 0)
            if head in (REQUEST, RESULT, FAILURE):
                assert body
            else:
                assert head in ALLOWED[Side.SERVER].heads
                assert not body
            assert 0 <= timestamp < 2**64
        assert not client.queued_bytes
        assert len(client.in_flight) == len(self.pending) <= WELCOME_MAP["max_streams"]
        assert len(client._tokens) <= 2
        assert client.running_calls <= len(self.running) <= HANDLERS
        if client.state is State.CLOSED:
            assert client.next_deadline() == NEVER
        else:
            assert client._decoder.buffered <= max(LIMIT, 16_384) + LENGTH_SIZE
            if client.state is not State.AWAITING_WELCOME and client.welcome["idle_timeout_ms"]:
                interval = max(client.welcome["idle_timeout_ms"] / 3_000, 0.25)
                assert client.next_deadline() <= self.harness.now + max(interval, PONG_TIMEOUT)


def run(data: bytes) -> None:
    script = Script(data)
    HostileServer(script.byte() % 4 > 0, checked=False).play(script)


def check(data: bytes) -> None:
    script = Script(data)
    HostileServer(script.byte() % 4 > 0).play(script)


TARGET = Target("client", run, check, max_size=1_024, limit_s=0.040, repeats=False)
