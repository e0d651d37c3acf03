"""Messages of the link between processes: any split of bytes, malformed messages, late answers."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zcproto.workers.link import (
    ANSWER,
    CALL,
    ERROR,
    HELLO,
    MIN_VERSION,
    NOTICE,
    PING,
    PONG,
    TICKS,
    VERSION,
    LinkCore,
    LinkLost,
    LinkViolation,
    Message,
    pack,
)

GREETING = (HELLO, VERSION, "worker 1", {"pid": 7})
MESSAGES: list[Message] = [
    GREETING,
    (CALL, 1, "store.find", [b"\xff" * 32, "a\ud800b", None, -1, 1.5, [1, [2]], {"a": True, 3: b""}]),
    (ANSWER, 1, [b"id", 2**63 - 1]),
    (ANSWER, 2, None),
    (ERROR, 3, 8, "too many", {"retry_after_ms": 250}),
    (NOTICE, "store.changed", [b"\0" * 300]),
    (PING,),
    (PONG,),
]


def greeted(**options: Any) -> LinkCore:
    core = LinkCore(**options)
    core.receive(pack(*GREETING))
    return core


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def test_messages_arrive_as_sent_however_their_bytes_are_split() -> None:
    data = b"".join(pack(*message) for message in MESSAGES)
    for place in range(len(data) + 1):
        core = LinkCore()
        assert [*core.receive(data[:place]), *core.receive(data[place:])] == MESSAGES
    core = LinkCore()
    assert [message for n in range(len(data)) for message in core.receive(data[n : n + 1])] == MESSAGES


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_violation(data: bytes) -> None:
    core = greeted(max_message=1_000)
    try:
        for message in core.receive(data):
            assert message[0] in range(7)
    except LinkViolation:
        pass


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "cannot be read"),
        (b"\xc1", "cannot be read"),
        (b"\x92\x01", "cannot be read"),
        (b"\x90\x90", "cannot be read"),
        (msgpack.packb([ANSWER, 1, {}]).replace(b"\x80", b"\x81\x90\x01"), "cannot be read"),
        (b"\x91" * 5_000, "cannot be read"),
        (b"\xc0", "another shape"),
        (b"\x90", "another shape"),
        (b"\x91\xc3", "another shape"),
        (msgpack.packb([7]), "another shape"),
        (msgpack.packb([[]]), "another shape"),
        (msgpack.packb([PING, 1]), "another shape"),
        (msgpack.packb([CALL, 1, "topic"]), "another shape"),
        (msgpack.packb([CALL, "1", "topic", []]), "another shape"),
        (msgpack.packb([CALL, 1, b"topic", []]), "another shape"),
        (msgpack.packb([NOTICE, "topic", {}]), "another shape"),
        (msgpack.packb([ERROR, 1, 8, "text", None]), "another shape"),
        (msgpack.packb(GREETING), "HELLO is the first message, once"),
    ],
    ids=str,
)
def test_malformed_message_is_a_violation(body: bytes, reason: str) -> None:
    with pytest.raises(LinkViolation, match=reason):
        greeted().receive(framed(body))


def test_first_message_other_than_hello_is_a_violation() -> None:
    with pytest.raises(LinkViolation, match="HELLO is the first message"):
        LinkCore().receive(pack(PING))


def test_hello_of_a_newer_version_is_accepted_and_of_an_older_one_refused() -> None:
    assert LinkCore().receive(pack(HELLO, VERSION + 1, "new", {"more": 1}))
    with pytest.raises(LinkViolation, match=f"has version {MIN_VERSION - 1} of the link, this process needs"):
        LinkCore().receive(pack(HELLO, MIN_VERSION - 1, "old", {}))


def test_message_over_the_limit_is_refused_by_its_length_alone() -> None:
    core = greeted(max_message=100)
    assert core.receive(framed(msgpack.packb([NOTICE, "t", [bytes(91)]])))
    with pytest.raises(LinkViolation, match="a message of 101 bytes is over the limit of 100"):
        core.receive((101).to_bytes(4, "big"))


def test_too_large_message_is_not_sent_and_leaves_no_waiting_call() -> None:
    core = greeted(max_message=100)
    with pytest.raises(ValueError, match="over the limit of 100"):
        core.call("topic", [bytes(100)], "caller", 1)
    with pytest.raises(TypeError):
        core.call("topic", [object()], "caller", 1)
    assert core.waiting == 0
    assert core.call("topic", [b""], "caller", 1) == pack(CALL, 1, "topic", [b""])


def test_answer_is_taken_once() -> None:
    core = greeted()
    core.call("topic", [], "first", 1)
    core.call("topic", [], "second", 1)
    assert core.take(2) == "second"
    assert core.take(2) is core.take(99) is None
    assert core.take_all() == ["first"]
    assert not core.is_due


def test_late_calls_are_returned_in_order_by_their_own_limits() -> None:
    core = greeted()
    core.call("topic", [], "patient", 3)
    core.call("topic", [], "hasty", 1)
    assert core.tick() == ["hasty"]
    core.call("topic", [], "late starter", 2)
    assert core.tick() == []
    assert core.tick() == ["patient", "late starter"]
    assert core.tick() == []


def test_silent_peer_is_lost_only_after_all_ticks_without_a_byte() -> None:
    core = greeted(silence=TICKS)
    core.call("topic", [], "caller", 99)
    for _ in range(TICKS):
        assert core.tick() == []
    core.receive(pack(PING)[:1])  # a byte is enough: the rest is on its way
    for _ in range(TICKS):
        assert core.tick() == []
    with pytest.raises(LinkLost, match="does not answer"):
        core.tick()


def test_time_without_anything_due_is_not_silence() -> None:
    core = greeted(silence=TICKS)
    for _ in range(TICKS):
        core.tick()
    core.rest()
    assert core.ping() == pack(PING)
    assert core.is_due
    assert core.ping() == b""
    for _ in range(TICKS):
        core.tick()
    core.receive(pack(PONG))
    assert not core.is_due
    assert core.ping() == pack(PING)


class Wire:
    """Two ends joined by bytes that arrive in pieces; each answers the calls of the other."""

    def __init__(self) -> None:
        self.ends = LinkCore(), LinkCore()
        self.bytes = bytearray(), bytearray()  # on their way to each end
        self.running: tuple[deque[Message], deque[Message]] = deque(), deque()
        self.outcomes: list[tuple[Any, Any]] = []
        for side in (0, 1):
            self.send(side, pack(HELLO, VERSION, f"end {side}", {}))

    def send(self, side: int, data: bytes) -> None:
        self.bytes[1 - side].extend(data)

    def deliver(self, side: int, size: int) -> None:
        data = bytes(self.bytes[side][:size])
        del self.bytes[side][:size]
        for message in self.ends[side].receive(data):
            if message[0] == CALL:
                self.running[side].append(message)
            elif message[0] in (ANSWER, ERROR):
                waiting = self.ends[side].take(message[1])
                if waiting is not None:
                    self.outcomes.append((waiting, message[2:]))

    def answer(self, side: int, last: bool, fails: bool) -> None:
        if self.running[side]:
            _, number, topic, arguments = self.running[side].pop() if last else self.running[side].popleft()
            data = (ERROR, number, 5, topic, {}) if fails else (ANSWER, number, arguments)
            self.send(side, pack(*data))


steps = st.one_of(
    st.tuples(st.just("call"), st.integers(0, 1), st.integers(1, 4)),
    st.tuples(st.just("deliver"), st.integers(0, 1), st.integers(1, 60)),
    st.tuples(st.just("answer"), st.integers(0, 1), st.booleans(), st.booleans()),
    st.tuples(st.just("tick"), st.integers(0, 1)),
)


@settings(max_examples=200)
@given(st.lists(steps, max_size=60))
def test_each_call_has_one_outcome_which_is_its_own(actions: list[tuple[Any, ...]]) -> None:
    wire = Wire()
    called: list[tuple[int, int]] = []
    late: list[Any] = []
    for name, side, *arguments in actions:
        if name == "call" and wire.ends[side].is_greeted:
            called.append((side, len(called)))
            wire.send(side, wire.ends[side].call("t", called[-1], called[-1], arguments[0]))
        elif name == "tick":
            late += wire.ends[side].tick()
        elif name in ("deliver", "answer"):
            getattr(wire, name)(side, *arguments)
    while wire.bytes[0] or wire.bytes[1] or wire.running[0] or wire.running[1]:
        for side in (0, 1):
            wire.deliver(side, 7)
            wire.answer(side, True, False)
    assert sorted([caller for caller, _ in wire.outcomes] + late) == sorted(called)
    for caller, outcome in wire.outcomes:
        assert outcome in (([*caller],), (5, "t", {}))
    assert wire.ends[0].waiting == wire.ends[1].waiting == 0
