"""WELCOME: what it must say, and what a client knows from it on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import GREETING, Conversation, ended
from tests.helpers import SALT, WALL
from zcproto.connection.client import MAX_FRAME_BEFORE_SESSION, MAX_SERVER_TIME
from zcproto.connection.events import NEVER, ConnectionEnded, Welcomed
from zcproto.connection.state import State
from zcproto.errors import Code, Unavailable
from zcproto.wire.frame import ERROR, EVENT, GOAWAY, HEADER, NO_TOKEN, PING, RESPONSE, WELCOME
from zcproto.wire.message import encode_body


def test_welcome_opens_the_conversation_and_its_map_is_kept_whole() -> None:
    talk = Conversation()
    assert talk.client.state is State.AWAITING_WELCOME
    events = talk.say(WELCOME, 0, encode_body(GREETING | {"motd": "hello"}), counter=0)
    assert events == [Welcomed(GREETING | {"motd": "hello"})]
    assert talk.client.state is State.OPEN
    assert talk.client.welcome["motd"] == "hello"


def test_the_salt_of_welcome_is_there_to_be_signed() -> None:
    assert Conversation().client.salt == b""
    assert Conversation(GREETING).client.salt == SALT


def test_nothing_is_sent_before_welcome() -> None:
    talk = Conversation()
    with pytest.raises(Unavailable):
        talk.request()
    talk.client.ping(talk.wall)
    assert talk.client.data_to_send() == b""
    assert talk.client.next_deadline() == NEVER


@pytest.mark.parametrize("ahead", [-(10**9), -1, 0, 7, 10**9])
def test_the_offset_is_the_servers_clock_minus_ours_and_goes_into_timestamps(ahead: int) -> None:
    talk = Conversation(GREETING, server_ahead_ms=ahead)
    assert talk.client.clock_offset_ms == ahead
    talk.wall += 1_234
    talk.request()
    (frame,) = talk.sent()
    assert frame[3] == WALL + 1_234 + ahead


def test_connections_to_one_server_share_the_map_of_its_welcome() -> None:
    assert Conversation(GREETING).client.welcome is Conversation(GREETING).client.welcome


@pytest.mark.parametrize("head", [RESPONSE, ERROR, PING, GOAWAY, EVENT])
def test_another_first_frame_than_welcome_ends_it(head: int) -> None:
    talk = Conversation()
    event = ended(talk.say(head, 1 if head == RESPONSE else 0, b"", counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert talk.client.state is State.CLOSED


def test_welcome_must_have_counter_0() -> None:
    talk = Conversation()
    assert ended(talk.say(WELCOME, 0, encode_body(GREETING), counter=1)).code is Code.PROTOCOL_ERROR


def test_a_second_welcome_ends_it(talk: Conversation) -> None:
    event = ended(talk.say(WELCOME, 0, encode_body(GREETING)))
    assert event == ConnectionEnded(Code.PROTOCOL_ERROR, "WELCOME came twice")


@pytest.mark.parametrize("timestamp", [MAX_SERVER_TIME + 1, 2**64 - 1])
def test_a_server_beyond_all_years_is_refused_because_timestamps_would_overflow(timestamp: int) -> None:
    talk = Conversation()
    event = ended(talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=timestamp))
    assert event.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("timestamp", [0, MAX_SERVER_TIME])
def test_a_strange_but_possible_clock_of_the_server_is_followed(timestamp: int) -> None:
    talk = Conversation()
    talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=timestamp)
    talk.request()
    assert talk.sent()[0][3] == timestamp


def test_a_timestamp_never_falls_below_0_though_our_clock_goes_back() -> None:
    talk = Conversation()
    talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=5_000)
    talk.wall -= 6_000
    talk.request()
    assert talk.sent()[0][3] == 0


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GREETING.items() if name != key}


@pytest.mark.parametrize(
    "greeting",
    [
        *[pytest.param(without(key), id=f"no {key}") for key in GREETING],
        *[
            pytest.param(GREETING | {key: wrong}, id=f"{key}={wrong!r}")
            for key, wrong in [
                ("server", 5),
                ("server", b"zcproto"),
                ("versions", 1),
                ("versions", []),
                ("versions", [2]),
                ("versions", [True]),
                ("versions", [1.0]),
                ("max_frame", "1"),
                ("max_frame", True),
                ("max_frame", 1.5),
                ("max_frame", 63),
                ("max_streams", 0),
                ("max_streams", -1),
                ("max_streams", None),
                ("idle_timeout_ms", -1),
                ("tolerance_ms", -1),
                ("sts", []),
                ("sts", {}),
                ("sts", {"max_age": 1}),
                ("sts", {"include_subdomains": True}),
                ("sts", {"max_age": -1, "include_subdomains": True}),
                ("sts", {"max_age": "1", "include_subdomains": True}),
                ("sts", {"max_age": 1, "include_subdomains": 1}),
            ]
        ],
    ],
)
def test_a_welcome_that_is_not_as_the_contract_says_ends_it(greeting: dict[str, Any]) -> None:
    talk = Conversation()
    event = ended(talk.say(WELCOME, 0, encode_body(greeting), counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert "WELCOME" in event.reason
    assert talk.client.welcome == {}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", encode_body([GREETING])])
def test_a_welcome_that_cannot_be_read_ends_it(body: bytes) -> None:
    talk = Conversation()
    assert ended(talk.say(WELCOME, 0, body, counter=0)).code is Code.PROTOCOL_ERROR


def test_a_welcome_larger_than_16_kib_is_refused_from_its_header() -> None:
    talk = Conversation()
    header = HEADER.pack(MAX_FRAME_BEFORE_SESSION + 1, WELCOME, 0, WALL, SALT, 0, NO_TOKEN)
    assert ended(talk.hear(header)).code is Code.FRAME_TOO_LARGE
