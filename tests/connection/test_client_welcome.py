"""Test WELCOME: required fields, clock offset, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import WELCOME_MAP, ClientHarness, ended
from tests.helpers import SALT, WALL
from zcproto.connection.client import MAX_FRAME_BEFORE_SESSION, MAX_SERVER_TIME
from zcproto.connection.events import NEVER, ConnectionEnded, Welcomed
from zcproto.connection.state import State
from zcproto.errors import Code, Unavailable
from zcproto.wire.frame import ERROR, EVENT, GOAWAY, HEADER, MIN_LENGTH, NO_TOKEN, PING, RESPONSE, WELCOME
from zcproto.wire.message import encode_body


def test_welcome_opens_connection_and_keeps_unknown_fields() -> None:
    harness = ClientHarness()
    assert harness.client.state is State.AWAITING_WELCOME
    events = harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP | {"motd": "hello"}), counter=0)
    assert events == [Welcomed(WELCOME_MAP | {"motd": "hello"})]
    assert harness.client.state is State.OPEN
    assert harness.client.welcome["motd"] == "hello"


def test_salt_is_available_after_welcome() -> None:
    assert ClientHarness().client.salt == b""
    assert ClientHarness(WELCOME_MAP).client.salt == SALT


def test_nothing_is_sent_before_welcome() -> None:
    harness = ClientHarness()
    with pytest.raises(Unavailable, match="has not sent its WELCOME"):
        harness.request()
    harness.client.ping(harness.wall)
    assert harness.client.data_to_send() == b""
    assert harness.client.next_deadline() == NEVER


def test_features_may_be_announced_with_their_least_limits() -> None:
    least = {"streams": {"max_open": 0, "max_item": MIN_LENGTH}, "calls": {"max": 0}}
    assert ClientHarness(WELCOME_MAP | least).client.state is State.OPEN


@pytest.mark.parametrize("ahead", [-(10**9), -1, 0, 7, 10**9])
def test_clock_offset_of_welcome_is_added_to_timestamps(ahead: int) -> None:
    harness = ClientHarness(WELCOME_MAP, server_ahead_ms=ahead)
    assert harness.client.clock_offset_ms == ahead
    harness.wall += 1_234
    harness.request()
    (frame,) = harness.sent()
    assert frame[3] == WALL + 1_234 + ahead


def test_connections_to_same_server_share_welcome_map() -> None:
    assert ClientHarness(WELCOME_MAP).client.welcome is ClientHarness(WELCOME_MAP).client.welcome


@pytest.mark.parametrize("head", [RESPONSE, ERROR, PING, GOAWAY, EVENT])
def test_first_frame_other_than_welcome_closes_connection(head: int) -> None:
    harness = ClientHarness()
    event = ended(harness.receive_frame(head, 1 if head == RESPONSE else 0, b"", counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert harness.client.state is State.CLOSED


def test_welcome_with_other_counter_than_0_closes_connection() -> None:
    harness = ClientHarness()
    assert (
        ended(harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP), counter=1)).code
        is Code.PROTOCOL_ERROR
    )


def test_second_welcome_closes_connection(harness: ClientHarness) -> None:
    event = ended(harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP)))
    assert event == ConnectionEnded(Code.PROTOCOL_ERROR, "WELCOME came twice")


@pytest.mark.parametrize("timestamp", [MAX_SERVER_TIME + 1, 2**64 - 1])
def test_server_time_that_would_overflow_closes_connection(timestamp: int) -> None:
    harness = ClientHarness()
    event = ended(harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP), counter=0, timestamp=timestamp))
    assert event.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("timestamp", [0, MAX_SERVER_TIME])
def test_extreme_server_time_is_accepted(timestamp: int) -> None:
    harness = ClientHarness()
    harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP), counter=0, timestamp=timestamp)
    harness.request()
    assert harness.sent()[0][3] == timestamp


def test_timestamp_is_never_negative_when_clock_goes_back() -> None:
    harness = ClientHarness()
    harness.receive_frame(WELCOME, 0, encode_body(WELCOME_MAP), counter=0, timestamp=5_000)
    harness.wall -= 6_000
    stream = harness.request()
    harness.client.cancel(stream, harness.wall)
    assert [frame[3] for frame in harness.sent()] == [0, 0]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in WELCOME_MAP.items() if name != key}


@pytest.mark.parametrize(
    "welcome",
    [
        *[pytest.param(without(key), id=f"no {key}") for key in WELCOME_MAP],
        *[
            pytest.param(WELCOME_MAP | {key: wrong}, id=f"{key}={wrong!r}")
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
def test_welcome_with_invalid_field_closes_connection(welcome: dict[str, Any]) -> None:
    harness = ClientHarness()
    event = ended(harness.receive_frame(WELCOME, 0, encode_body(welcome), counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert "WELCOME" in event.reason
    assert harness.client.welcome == {}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", encode_body([WELCOME_MAP])])
def test_malformed_welcome_closes_connection(body: bytes) -> None:
    harness = ClientHarness()
    assert ended(harness.receive_frame(WELCOME, 0, body, counter=0)).code is Code.PROTOCOL_ERROR


def test_oversized_welcome_is_refused_from_its_header() -> None:
    harness = ClientHarness()
    header = HEADER.pack(MAX_FRAME_BEFORE_SESSION + 1, WELCOME, 0, WALL, SALT, 0, NO_TOKEN)
    assert ended(harness.receive_data(header)).code is Code.FRAME_TOO_LARGE
