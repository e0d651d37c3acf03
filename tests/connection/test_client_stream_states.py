"""Test every state of a stream at the client with every input (zcp1.md, section 18.10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness
from tests.helpers import WALL
from zcproto.connection.client_streams import ClientStreamState
from zcproto.connection.events import (
    ClientEvent,
    ConnectionEnded,
    CreditRaised,
    ErrorReceived,
    GoAwayReceived,
    ItemReceived,
    ResponseReceived,
)
from zcproto.errors import Code, InvalidArgument, ResourceExhausted, Unavailable, Unimplemented
from zcproto.wire.frame import (
    CANCEL,
    CREDIT,
    END,
    ERROR,
    GOAWAY,
    ITEM,
    OPEN,
    RESPONSE,
    Side,
    accepted_with_streams,
)
from zcproto.wire.message import encode_body, encode_error

NONE, OPENED, HALF, LEAVING = (
    ClientStreamState.NONE,
    ClientStreamState.OPEN,
    ClientStreamState.HALF,
    ClientStreamState.LEAVING,
)
STREAMS = {"streams": {"max_open": 2, "max_item": 1_000}}


class Row:
    """A stream in a state: two items were granted, and the server allows one."""

    def __init__(self, state: ClientStreamState) -> None:
        self.harness = harness = ClientHarness(WELCOME_MAP | STREAMS)
        harness._decoder.accepted = accepted_with_streams(Side.SERVER, 1_000)
        client = self.client = harness.client
        self.stream = client.open_stream("m", {}, token=TOKEN, window=(2, 10_000), wall=WALL)
        harness.receive_frame(CREDIT, 1, encode_body([1, 1_000]))
        if state is HALF:
            client.end_items(self.stream, WALL)
        if state is LEAVING:
            client.cancel(1, WALL)
        if state is NONE:
            harness.receive_frame(RESPONSE, 1, encode_body(None))
        harness.sent()

    def receive(self, head: int, body: bytes, *, stale: bool = False) -> list[ClientEvent]:
        receive = self.harness.receive_stale if stale else self.harness.receive_frame
        return receive(head, 1, body)


class Case(NamedTuple):
    next: ClientStreamState | None  # None: the connection ends
    events: tuple[type, ...] = ()
    sent: tuple[int, ...] = ()


def frame(head: int, body: object, *, stale: bool = False) -> Callable[[Row], list[ClientEvent]]:
    return lambda row: row.receive(head, encode_body(body), stale=stale)


def items_beyond_credit(row: Row) -> list[ClientEvent]:
    return [event for number in range(3) for event in row.receive(ITEM, encode_body(number))]


def send(row: Row) -> list[ClientEvent]:
    if row.stream.state is OPENED and row.stream.credit.may_send:
        row.client.send_item(row.stream, 1, WALL)
    return []


def end(row: Row) -> list[ClientEvent]:
    row.client.end_items(row.stream, WALL)
    return []


def leave(row: Row) -> list[ClientEvent]:
    row.client.cancel(1, WALL)
    return []


def go_away(row: Row) -> list[ClientEvent]:
    body = encode_body({"reason": "draining", "retry_after_ms": 1})
    return row.harness.receive_frame(GOAWAY, 0, body)


INPUTS: dict[str, Callable[[Row], list[ClientEvent]]] = {
    "item": frame(ITEM, 1),
    "items beyond credit": items_beyond_credit,
    "credit": frame(CREDIT, [5, 5_000]),
    "credit lower": frame(CREDIT, [0, 5_000]),
    "response": frame(RESPONSE, 1),
    "error": lambda row: row.receive(ERROR, encode_error(Code.NOT_FOUND, "")),
    "stale item": frame(ITEM, 1, stale=True),
    "stale credit": frame(CREDIT, [5, 5_000], stale=True),
    "stale response": frame(RESPONSE, 1, stale=True),
    "send": send,
    "end": end,
    "leave": leave,
    "goaway": go_away,
}
ENDED = (ConnectionEnded,)
FAILED = (ErrorReceived,)


def in_flight(state: ClientStreamState) -> dict[str, Case]:
    return {
        "item": Case(state, (ItemReceived,)),
        "items beyond credit": Case(None, (ItemReceived, ItemReceived, *ENDED)),
        "credit": Case(state, (CreditRaised,)),
        "credit lower": Case(None, ENDED),
        "response": Case(NONE, (ResponseReceived,)),
        "error": Case(NONE, FAILED),
        "stale item": Case(LEAVING, FAILED, (CANCEL,)),
        "stale credit": Case(LEAVING, FAILED, (CANCEL,)),
        "stale response": Case(NONE, FAILED),
        "send": Case(state),
        "end": Case(HALF),
        "leave": Case(LEAVING, (), (CANCEL,)),
        "goaway": Case(state, (GoAwayReceived,)),
    }


TABLE = {
    OPENED: {**in_flight(OPENED), "send": Case(OPENED, (), (ITEM,)), "end": Case(HALF, (), (END,))},
    HALF: in_flight(HALF),
    LEAVING: {
        **dict.fromkeys(INPUTS, Case(LEAVING)),
        "response": Case(NONE, (ResponseReceived,)),
        "error": Case(NONE, FAILED),
        "stale response": Case(NONE, FAILED),
        "leave": Case(LEAVING, (), (CANCEL,)),
        "goaway": Case(LEAVING, (GoAwayReceived,)),
    },
    NONE: {**dict.fromkeys(INPUTS, Case(NONE)), "goaway": Case(NONE, (GoAwayReceived,))},
}


@pytest.mark.parametrize(("state", "given"), [(state, given) for state in TABLE for given in INPUTS])
def test_state_and_input_give_next_state_and_action(state: ClientStreamState, given: str) -> None:
    row = Row(state)
    events = INPUTS[given](row)
    expected = TABLE[state][given]
    assert tuple(type(event) for event in events) == expected.events
    if expected.next is not None:
        assert row.stream.state is expected.next
        assert tuple(sent[1] for sent in row.harness.sent()) == expected.sent


def test_open_needs_streams_of_the_server_and_a_place() -> None:
    client = ClientHarness(WELCOME_MAP).client
    with pytest.raises(Unimplemented):
        client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL)
    row = Row(OPENED)
    row.client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL)
    with pytest.raises(ResourceExhausted) as caught:
        row.client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL)
    assert caught.value.details == {"limit": 2}
    go_away(row)
    with pytest.raises(Unavailable):
        row.client.open_stream("m", {}, token=TOKEN, window=(1, 1), wall=WALL)
    assert [frame[1] for frame in row.harness.sent()] == [OPEN]


def test_taken_items_are_granted_again_and_items_outlive_the_answer() -> None:
    row = Row(OPENED)
    for number in range(2):
        row.receive(ITEM, encode_body(number))
    assert row.client.take_item(row.stream, WALL) == 0
    assert [(sent[1], sent[-1]) for sent in row.harness.sent()] == [(CREDIT, encode_body([3, 10_065]))]
    row.receive(RESPONSE, encode_body(None))
    assert row.client.take_item(row.stream, WALL) == 1
    assert row.harness.sent() == []


@pytest.mark.parametrize(("value", "reason"), [(object(), "cannot be sent"), (bytes(1_000), "at most 1000")])
def test_item_that_cannot_be_sent_is_refused_and_uses_no_credit(value: object, reason: str) -> None:
    row = Row(OPENED)
    with pytest.raises(InvalidArgument, match=reason):
        row.client.send_item(row.stream, value, WALL)
    assert row.stream.credit.may_send
    assert row.harness.sent() == []


def test_requests_beside_a_stream_are_cancelled_and_answered() -> None:
    row = Row(OPENED)
    number = row.harness.request()
    row.client.cancel(number, WALL)
    assert row.harness.receive_frame(RESPONSE, number, encode_body(1)) == [ResponseReceived(number, 1)]
    assert row.stream.state is OPENED
