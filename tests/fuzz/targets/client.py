"""A client's conversation in which the server does as it likes, after a good beginning or none.

An input is read as a script: what comes next, with its choices.
"""

from __future__ import annotations

import contextlib
from typing import Any

from tests.connection.helpers import GREETING, TOKEN, Conversation
from tests.fuzz.frame import any_frame
from tests.fuzz.target import Script, Target
from zcproto.connection.client import PONG_TIMEOUT
from zcproto.connection.events import NEVER, ConnectionEnded, ErrorReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import CallError, ConnectionClosed
from zcproto.wire.frame import (
    ACCEPTED,
    LENGTH_SIZE,
    NO_TOKEN,
    ON_A_STREAM,
    REQUEST,
    Side,
)
from zcproto.wire.message import encode_body, encode_error

ORDER = [State.AWAITING_WELCOME, State.OPEN, State.DRAINING, State.CLOSED]
HEADS = (*sorted(ACCEPTED[Side.CLIENT]), REQUEST, 0x01030001, 0x02030000)
METHODS = ("echo", "session.open", "session.refresh", "session.info")
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
    encode_body(GREETING),
    b"",
)
SECONDS = (0.0, 0.1, 5.0, 11.0, 101.0)
JUMPS_MS = (-(2**40), -40_000, -1_000, 1_000, 40_000, 2**40)
LIMIT = 2_000
IDLE_S = 60.0


class Talk:
    """What was said. `checked` is False where time is taken."""

    def __init__(self, greeted: bool, checked: bool = True) -> None:
        greeting = {**GREETING, "idle_timeout_ms": round(IDLE_S * 1_000), "max_frame": LIMIT}
        self.talk = Conversation(greeting if greeted else None, max_frame=LIMIT)
        self.checked = checked
        self.asked: set[int] = set()
        self.counter = 0
        self.state = self.talk.client.state
        self.ended = 0
        self.told_to_end = False

    def play(self, script: Script) -> None:
        while not script.ended:
            self.step(script)
            if self.checked:
                self.check()
            else:
                self.talk.client.data_to_send()

    def step(self, script: Script) -> None:
        talk, client = self.talk, self.talk.client
        match script.byte() % 9:
            case 0:
                self.hear(script.bytes())
            case 1 | 2:
                self.hear(self.any_frame(script))
            case 3:
                self.hear(talk.frame(script.one_of(HEADS), script.byte() % 6, script.one_of(BODIES)))
            case 4 | 5:
                token = script.one_of((NO_TOKEN, TOKEN))
                with contextlib.suppress(CallError, ConnectionClosed):
                    stream = talk.request(script.one_of(METHODS), {"x": script.bytes()}, token=token)
                    assert stream not in self.asked
                    self.asked.add(stream)
            case 6:
                client.cancel(script.byte() % 6, talk.wall)
                if script.byte() % 2:
                    client.ping(talk.wall)
            case 7:
                seconds = script.one_of(SECONDS)
                talk.now += seconds
                talk.wall += round(seconds * 1_000)
                self.take(client.handle_timeout(talk.wall, talk.now))
                if self.checked:
                    assert client.next_deadline() > talk.now
            case 8:
                talk.wall = max(0, talk.wall + script.one_of(JUMPS_MS))

    def any_frame(self, script: Script) -> bytes:
        return any_frame(
            script, self.talk.frame, token=script.one_of((NO_TOKEN, TOKEN)), heads=HEADS, streams=6
        )

    def hear(self, data: bytes) -> None:
        self.take(self.talk.hear(data))

    def take(self, events: list[Any]) -> None:
        for event in events:
            assert not self.ended
            if isinstance(event, ResponseReceived | ErrorReceived):
                assert event.stream in self.asked
                self.asked.discard(event.stream)
            elif isinstance(event, ConnectionEnded):
                self.ended += 1

    def check(self) -> None:
        """A legal state, frames that follow one another, and nothing that grows."""
        client = self.talk.client
        assert ORDER.index(client.state) >= ORDER.index(self.state)
        was_closed, self.state = self.state is State.CLOSED, client.state
        assert self.ended == (client.state is State.CLOSED)
        frames = self.talk.sent()
        assert not (was_closed and frames)
        for _, head, stream, timestamp, salt, counter, _, body in frames:
            self.counter += 1
            assert counter == self.counter
            assert salt == client.salt
            assert (head in ON_A_STREAM) is (stream > 0)
            assert body if head == REQUEST else head in ACCEPTED[Side.SERVER] and not body
            assert 0 <= timestamp < 2**64
        assert not client.queued_bytes
        assert client.in_flight == len(self.asked) <= GREETING["max_streams"]
        assert len(client._tokens) <= 2
        if client.state is State.CLOSED:
            assert client.next_deadline() == NEVER
        else:
            assert client._decoder.buffered <= max(LIMIT, 16_384) + LENGTH_SIZE
            if client.state is not State.AWAITING_WELCOME and client.welcome["idle_timeout_ms"]:
                interval = max(client.welcome["idle_timeout_ms"] / 3_000, 0.25)
                assert client.next_deadline() <= self.talk.now + max(interval, PONG_TIMEOUT)


def take(data: bytes) -> None:
    script = Script(data)
    Talk(script.byte() % 4 > 0, checked=False).play(script)


def check(data: bytes) -> None:
    script = Script(data)
    Talk(script.byte() % 4 > 0).play(script)


TARGET = Target(
    "client",
    take,
    check,
    longest=1_024,
    limit_s=0.040,
    stretches=False,
)
