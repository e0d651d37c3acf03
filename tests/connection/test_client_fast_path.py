"""Test the answers that are read in C: the same events as by the general path, or left to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness
from tests.wire.fast_path import needs_compiled
from zcproto.connection.events import ClientEvent, ResponseReceived
from zcproto.wire.frame import ERROR, NO_TOKEN, PING, RESPONSE
from zcproto.wire.message import encode_body, encode_error

OTHER = b"o" * 32
Reads = Callable[[ClientHarness], list[bytes]]


def answer(harness: ClientHarness, stream: int, body: bytes = b"\xc0", **fields: Any) -> bytes:
    return harness.frame(RESPONSE, stream, body, **{"token": TOKEN, **fields})


READS: dict[str, Reads] = {
    "one": lambda harness: [answer(harness, 2)],
    "two": lambda harness: [answer(harness, 3), answer(harness, 2, encode_body({"a": [1]}))],
    "with an error": lambda harness: [
        answer(harness, 2),
        harness.frame(ERROR, 3, encode_error(3, "no"), token=TOKEN),
        answer(harness, 4),
    ],
    "with a ping": lambda harness: [answer(harness, 2), harness.frame(PING), answer(harness, 3)],
    "to no request": lambda harness: [answer(harness, 9), answer(harness, 2), answer(harness, 2)],
    "to a request with another token": lambda harness: [answer(harness, 5), answer(harness, 2)],
    "with another token": lambda harness: [answer(harness, 2, token=OTHER), answer(harness, 3)],
    "malformed": lambda harness: [answer(harness, 2), answer(harness, 3, b"\xc1"), answer(harness, 4)],
    "stale": lambda harness: [answer(harness, 2, timestamp=1), answer(harness, 3), answer(harness, 4)],
    "replayed": lambda harness: [answer(harness, 2), answer(harness, 3, counter=harness.counter)],
    "in pieces": lambda harness: [answer(harness, 2), answer(harness, 3)[:70]],
}


def conversation(reads: Reads, receive: Callable[[ClientHarness, bytes], list[ClientEvent]]) -> list[object]:
    """Return what one read causes at a client with requests on the streams 2 to 6."""
    harness = ClientHarness({**WELCOME_MAP, "max_streams": 8}, server_ahead_ms=5_000)
    harness.request(token=TOKEN)
    harness.receive_data(answer(harness, 1))  # the server accepts the token
    for token in (TOKEN, TOKEN, TOKEN, OTHER, TOKEN):
        harness.request(token=token)
    data = b"".join(reads(harness))
    harness.now += 1
    events = receive(harness, data)
    client = harness.client
    return [
        *map(repr, events),
        len(client.in_flight),
        client.dropped_stale,
        client.dropped_unknown,
        client.state,
        client._last_counter,
        client._last_heard,
        harness.sent(),
    ]


def received(harness: ClientHarness, data: bytes) -> tuple[list[tuple[int, Any]], bytes]:
    """Return stream and value of each usual answer, and the rest of the bytes."""
    answers, rest = harness.client.receive_answers(data, harness.wall, harness.now)
    return [(stream, value) for stream, _, value, _ in answers], rest


def short_way(harness: ClientHarness, data: bytes) -> list[ClientEvent]:
    answers, rest = received(harness, data)
    events: list[ClientEvent] = [ResponseReceived(*each) for each in answers]
    return events + harness.receive_data(rest) if rest else events


def general_way(harness: ClientHarness, data: bytes) -> list[ClientEvent]:
    return harness.receive_data(data)


@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_short_way_has_the_events_of_the_general_way(reads: Reads) -> None:
    assert conversation(reads, short_way) == conversation(reads, general_way)


@needs_compiled
def test_answers_are_read_in_c() -> None:
    harness = ClientHarness(WELCOME_MAP)
    first, second, third = [harness.request(token=TOKEN) for _ in range(3)]

    unproved = answer(harness, first)
    assert received(harness, unproved) == ([], unproved)  # the token is not known to be accepted
    harness.receive_data(unproved)
    assert received(harness, answer(harness, second, b"\x01") + answer(harness, third, b"\x02")) == (
        [(second, 1), (third, 2)],
        b"",
    )
    public = harness.request(token=NO_TOKEN)
    data = answer(harness, public, token=NO_TOKEN)
    assert received(harness, data) == ([], data)


def test_partial_frame_and_ended_connection_take_the_general_way() -> None:
    harness = ClientHarness(WELCOME_MAP)
    first, second = [harness.request(token=TOKEN) for _ in range(2)]
    harness.receive_data(answer(harness, first))
    data = answer(harness, second)
    harness.receive_data(data[:30])
    assert received(harness, data[30:]) == ([], data[30:])
    harness.client.end()
    assert received(harness, data) == ([], data)


@needs_compiled
def test_answer_of_a_stream_that_is_read_in_c_ends_it() -> None:
    harness = ClientHarness({**WELCOME_MAP, "streams": {"max_open": 2, "max_item": 1_000}})
    first = harness.request(token=TOKEN)
    harness.receive_data(answer(harness, first))
    stream = harness.client.open_stream("m", {}, token=TOKEN, window=(2, 10_000), wall=harness.wall)
    data = answer(harness, stream.number, b"\x07")
    assert received(harness, data) == ([(stream.number, 7)], b"")
    assert stream.items.has_ended
