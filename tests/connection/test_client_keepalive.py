"""Test keepalive of a client: PING, and the timeout without PONG."""

from __future__ import annotations

from tests.connection.helpers import WELCOME_MAP, ClientHarness, ended
from tests.helpers import NOW
from zcproto.connection.client import PONG_TIMEOUT
from zcproto.connection.events import NEVER, ClientEvent, ConnectionEnded
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
