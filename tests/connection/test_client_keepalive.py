"""When a client pings, and when it takes the server for dead."""

from __future__ import annotations

from tests.connection.helpers import GREETING, Conversation, ended
from tests.helpers import NOW
from zcproto.connection.client import PONG_TIMEOUT
from zcproto.connection.events import NEVER, ClientEvent, ConnectionEnded
from zcproto.wire.frame import EVENT, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body


def timeout(talk: Conversation) -> list[ClientEvent]:
    return talk.client.handle_timeout(talk.wall, talk.now)


def test_a_quiet_connection_pings_at_a_third_of_the_idle_timeout(talk: Conversation) -> None:
    assert talk.client.next_deadline() == NOW + 100
    talk.now = NOW + 99
    assert timeout(talk) == []
    assert talk.sent() == []
    talk.now = NOW + 100
    assert timeout(talk) == []
    assert [frame[1] for frame in talk.sent()] == [PING]
    assert talk.client.next_deadline() == talk.now + PONG_TIMEOUT


def test_a_pong_keeps_it_alive_until_the_next_look(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 1
    assert talk.say(PONG) == []
    assert talk.client.next_deadline() == NOW + 200


def test_ten_seconds_without_an_answer_to_a_ping_end_it(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += PONG_TIMEOUT
    event = ended(timeout(talk))
    assert event == ConnectionEnded(None, "the server did not answer a PING")
    assert timeout(talk) == []
    assert talk.client.next_deadline() == NEVER


def test_any_fresh_frame_after_the_ping_shows_that_the_server_lives(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 5
    talk.say(EVENT, 0, encode_body(["a", None]))
    talk.now += 5
    assert timeout(talk) == []
    assert talk.client.next_deadline() == NOW + 200


def test_a_stale_pong_does_not_show_that_the_server_lives(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 5
    talk.stale()
    talk.now += 5
    assert ended(timeout(talk)).code is None


def test_a_busy_connection_does_not_ping(talk: Conversation) -> None:
    talk.now = NOW + 50
    talk.say(RESPONSE, talk.request(), b"\xc0")
    talk.sent()
    talk.now = NOW + 100
    assert timeout(talk) == []
    assert talk.sent() == []
    talk.now = NOW + 200
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [PING]


def test_one_that_only_hears_pings_all_the_same_for_the_server_counts_what_it_hears(
    talk: Conversation,
) -> None:
    talk.now = NOW + 90
    talk.say(EVENT, 0, encode_body(["a", None]))
    talk.now = NOW + 100
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [PING]


def test_one_that_only_sends_pings_too_for_the_server_may_be_dead(talk: Conversation) -> None:
    talk.now = NOW + 90
    talk.request()
    talk.now = NOW + 100
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [REQUEST, PING]


def test_a_ping_that_waits_for_its_pong_is_not_forgotten_at_the_next_look() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 3_000})
    talk.now = NOW + 1
    timeout(talk)
    first = talk.client._pong_deadline
    talk.now = NOW + 2
    timeout(talk)
    assert talk.client._pong_deadline == first
    assert [frame[1] for frame in talk.sent()] == [PING, PING]


def test_a_tiny_idle_timeout_makes_no_flood() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 1})
    assert talk.client.next_deadline() == NOW + 0.25


def test_a_server_without_an_idle_timeout_needs_no_keepalive() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 0})
    assert talk.client.next_deadline() == NEVER
