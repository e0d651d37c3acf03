"""Test keepalive of a client: PING, the timeout without PONG, and silence while requests wait."""

from __future__ import annotations

import pytest

from tests.connection.helpers import WELCOME_MAP, ClientHarness, ended
from tests.helpers import NOW
from zcproto.connection.client import PONG_TIMEOUT
from zcproto.connection.events import NEVER, ClientEvent, ConnectionEnded
from zcproto.connection.silence import ANSWER_WITHIN, BYTES_PER_SECOND, PING_AFTER, PING_AFTER_TIMEOUT
from zcproto.wire.frame import EVENT, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body


def timeout(harness: ClientHarness) -> list[ClientEvent]:
    return harness.client.handle_timeout(harness.wall, harness.now)


def test_idle_connection_pings_after_a_third_of_idle_timeout(harness: ClientHarness) -> None:
    assert harness.client.next_deadline() == NOW + 100
    harness.now = NOW + 99
    assert timeout(harness) == []
    assert harness.sent() == []
    harness.now = NOW + 100
    assert timeout(harness) == []
    assert [frame[1] for frame in harness.sent()] == [PING]
    assert harness.client.next_deadline() == harness.now + PONG_TIMEOUT


def test_pong_keeps_connection_alive(harness: ClientHarness) -> None:
    harness.now = NOW + 100
    timeout(harness)
    harness.now += 1
    assert harness.receive_frame(PONG) == []
    assert harness.client.next_deadline() == NOW + 200


def test_missing_pong_closes_connection_after_timeout(harness: ClientHarness) -> None:
    harness.now = NOW + 100
    timeout(harness)
    harness.now += PONG_TIMEOUT
    event = ended(timeout(harness))
    assert event == ConnectionEnded(None, "the server did not answer a PING")
    assert timeout(harness) == []
    assert harness.client.next_deadline() == NEVER


def test_any_fresh_frame_after_ping_keeps_connection_alive(harness: ClientHarness) -> None:
    harness.now = NOW + 100
    timeout(harness)
    harness.now += 5
    harness.receive_frame(EVENT, 0, encode_body(["a", None]))
    harness.now += 5
    assert timeout(harness) == []
    assert harness.client.next_deadline() == NOW + 200


def test_stale_pong_does_not_keep_connection_alive(harness: ClientHarness) -> None:
    harness.now = NOW + 100
    timeout(harness)
    harness.now += 5
    harness.receive_stale()
    harness.now += 5
    assert ended(timeout(harness)).code is None


def test_active_connection_does_not_ping(harness: ClientHarness) -> None:
    harness.now = NOW + 50
    harness.receive_frame(RESPONSE, harness.request(), b"\xc0")
    harness.sent()
    harness.now = NOW + 100
    assert timeout(harness) == []
    assert harness.sent() == []
    harness.now = NOW + 150
    harness.receive_frame(EVENT, 0, encode_body(["a", None]))  # it sends nothing meanwhile
    harness.now = NOW + 200
    timeout(harness)
    assert [frame[1] for frame in harness.sent()] == [PING]


def test_connection_that_only_receives_pings(harness: ClientHarness) -> None:
    harness.now = NOW + 90
    harness.receive_frame(EVENT, 0, encode_body(["a", None]))
    harness.now = NOW + 100
    timeout(harness)
    assert [frame[1] for frame in harness.sent()] == [PING]


def test_connection_that_only_sends_pings(harness: ClientHarness) -> None:
    harness.now = NOW + 90
    harness.request()
    harness.now = NOW + 100
    timeout(harness)
    assert [frame[1] for frame in harness.sent()] == [REQUEST, PING]


def test_next_ping_does_not_extend_pong_timeout() -> None:
    harness = ClientHarness(WELCOME_MAP | {"idle_timeout_ms": 3_000})
    harness.now = NOW + 1
    timeout(harness)
    for second in range(2, 11):
        harness.now = NOW + second
        assert timeout(harness) == []
    assert [frame[1] for frame in harness.sent()] == [PING] * 10
    harness.now = NOW + 1 + PONG_TIMEOUT
    assert ended(timeout(harness)).code is None


def test_ping_interval_has_a_minimum() -> None:
    harness = ClientHarness(WELCOME_MAP | {"idle_timeout_ms": 1})
    assert harness.client.next_deadline() == NOW + 0.25


def test_no_keepalive_without_idle_timeout() -> None:
    harness = ClientHarness(WELCOME_MAP | {"idle_timeout_ms": 0})
    assert harness.client.next_deadline() == NEVER


def test_ping_behind_bytes_that_the_server_still_receives_is_not_late(harness: ClientHarness) -> None:
    for _ in range(100):
        harness.client.ping(harness.wall)
    size = len(harness.client.data_to_send())

    def after(seconds: float, unsent: int) -> list[ClientEvent]:
        harness.now += seconds
        events = harness.client.handle_timeout(harness.wall, harness.now, unsent)
        harness.client.data_to_send()
        return events

    assert after(100, size) == []
    assert after(PONG_TIMEOUT, size // 2) == []
    assert harness.client.next_deadline() == harness.now + PONG_TIMEOUT
    assert after(PONG_TIMEOUT, 0) == [], "the PING itself has been sent since"
    assert after(PONG_TIMEOUT, 0) == [ConnectionEnded(None, "the server did not answer a PING")]


def test_server_that_receives_nothing_before_a_ping_is_dead(harness: ClientHarness) -> None:
    for _ in range(100):
        harness.client.ping(harness.wall)
    size = len(harness.client.data_to_send())
    harness.now += 100
    assert harness.client.handle_timeout(harness.wall, harness.now, size) == []
    size += len(harness.client.data_to_send())
    harness.now += PONG_TIMEOUT
    assert ended(harness.client.handle_timeout(harness.wall, harness.now, size)).code is None


def test_no_ping_is_queued_while_output_is_blocked(harness: ClientHarness) -> None:
    harness.client.is_output_blocked = True
    harness.now = NOW + 100
    timeout(harness)
    assert harness.sent() == []
    harness.now += PONG_TIMEOUT
    assert ended(timeout(harness)).reason == "the server did not answer a PING"


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
