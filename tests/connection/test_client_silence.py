"""Test when a client sends a PING because requests wait in silence, and when the server counts as silent."""

from __future__ import annotations

import pytest

from tests.connection.helpers import ClientHarness
from tests.helpers import NOW
from zcproto.connection.events import NEVER
from zcproto.connection.silence import ANSWER_WITHIN, BYTES_PER_SECOND, PING_AFTER, PING_AFTER_TIMEOUT
from zcproto.wire.frame import PING, PONG, RESPONSE
from zcproto.wire.message import encode_body


@pytest.fixture
def watched(harness: ClientHarness) -> ClientHarness:
    """Return a client that watches for silence, with one request in flight."""
    harness.client.watch_silence()
    harness.client.watch_silence()
    harness.request()
    harness.sent()
    return harness


def check(harness: ClientHarness, after: float = PING_AFTER, *, unsent: int = 0) -> float:
    """Check for silence and return the seconds until the next check."""
    return harness.client.check_silence(harness.wall, harness.now, unsent, after=after) - harness.now


def pings(harness: ClientHarness) -> int:
    return [frame[1] for frame in harness.sent()].count(PING)


def test_silence_of_5_s_with_a_request_in_flight_sends_one_ping(watched: ClientHarness) -> None:
    watched.now += PING_AFTER - 0.1
    assert check(watched) == pytest.approx(0.1)
    assert pings(watched) == 0
    watched.now += 0.1
    assert check(watched) == pytest.approx(ANSWER_WITHIN, abs=0.01)
    assert pings(watched) == 1
    watched.now += ANSWER_WITHIN / 2
    assert check(watched) == pytest.approx(ANSWER_WITHIN / 2, abs=0.01)
    assert pings(watched) == 0
    assert not watched.client.is_silent


def test_connection_without_answer_is_silent_until_a_byte_arrives(watched: ClientHarness) -> None:
    watched.now += PING_AFTER
    watched.now += check(watched)
    assert check(watched) == ANSWER_WITHIN  # it is checked again
    assert watched.client.is_silent
    watched.now += 1
    watched.receive_frame(PONG)
    assert not watched.client.is_silent
    assert check(watched) == PING_AFTER
    assert watched.client.next_deadline() == NOW + 100  # a silent connection does not end


def test_answered_ping_is_repeated_after_the_next_silence(watched: ClientHarness) -> None:
    watched.now += PING_AFTER
    check(watched)
    watched.receive_frame(PONG)
    assert check(watched) == PING_AFTER
    watched.now += PING_AFTER
    check(watched)
    assert pings(watched) == 2


def test_no_ping_is_sent_without_a_request_in_flight(harness: ClientHarness) -> None:
    harness.client.watch_silence()
    harness.now += 60
    assert check(harness) == NEVER
    stream = harness.request()
    assert check(harness) == pytest.approx(ANSWER_WITHIN, abs=0.01)
    harness.now += 1
    harness.receive_frame(RESPONSE, stream, encode_body(None))
    assert check(harness) == NEVER
    assert pings(harness) == 1


def test_first_check_of_a_request_counts_from_the_last_byte(watched: ClientHarness) -> None:
    assert watched.client.first_silence_check(NOW + 3) == NOW + PING_AFTER
    assert watched.client.first_silence_check(NOW + 60) == NOW + 60 + PING_AFTER


def test_timeout_of_a_call_sends_a_ping_after_a_second_of_silence(watched: ClientHarness) -> None:
    watched.now += PING_AFTER_TIMEOUT - 0.1
    check(watched, PING_AFTER_TIMEOUT)
    assert pings(watched) == 0
    watched.now += 0.1
    check(watched, PING_AFTER_TIMEOUT)
    assert pings(watched) == 1


def test_ping_without_a_request_is_sent_if_it_is_wanted(harness: ClientHarness) -> None:
    harness.client.watch_silence()
    harness.now += 0.1
    assert check(harness, 0.0) == pytest.approx(ANSWER_WITHIN)
    assert pings(harness) == 1


def test_bytes_that_wait_before_a_ping_extend_its_time(watched: ClientHarness) -> None:
    watched.now += PING_AFTER
    check(watched, unsent=100)
    for unsent in (60, 30):
        watched.now += ANSWER_WITHIN + 0.1
        assert check(watched, unsent=unsent) == pytest.approx(ANSWER_WITHIN, abs=0.01)
        assert not watched.client.is_silent
    watched.now += ANSWER_WITHIN + 0.1
    check(watched, unsent=30)
    assert watched.client.is_silent


def test_bytes_sent_since_the_last_byte_arrived_extend_the_time_of_a_ping(watched: ClientHarness) -> None:
    watched.receive_frame(PONG)
    for _ in range(3):
        watched.now += 1
        watched.request(params={"blob": bytes(BYTES_PER_SECOND // 8)})
        watched.client.data_to_send()
    watched.now += PING_AFTER
    assert check(watched) == pytest.approx(ANSWER_WITHIN + 3 / 8, abs=0.02)


def test_first_bytes_of_a_large_frame_are_not_silence(watched: ClientHarness) -> None:
    watched.now += PING_AFTER
    check(watched)
    watched.now += 1
    data = watched.frame(RESPONSE, 1, encode_body("x" * 1_000))
    watched.receive_data(data[:100])
    assert check(watched) == PING_AFTER


def test_ping_is_not_queued_while_the_transport_is_blocked(watched: ClientHarness) -> None:
    watched.client.is_output_blocked = True
    watched.now += PING_AFTER
    watched.now += check(watched)
    check(watched)
    assert pings(watched) == 0
    assert watched.client.is_silent


def test_connection_that_is_not_watched_is_never_silent(harness: ClientHarness) -> None:
    harness.request()
    harness.now += 60
    assert check(harness) == NEVER
    assert not harness.client.is_silent
    assert not harness.client.has_answered_since(harness.client)


def test_closed_connection_is_not_checked(watched: ClientHarness) -> None:
    watched.client.end()
    watched.now += PING_AFTER
    assert check(watched) == NEVER
