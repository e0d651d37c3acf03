"""What time does to a connection: opening a session, idleness, expiry."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import NOW, WALL, ConnectionPair, small_registry
from zcproto.connection.events import NEVER, ConnectionEnded, RequestEnded
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN, PONG, Kind

HOUR_MS = 3_600_000


def ends(pair: ConnectionPair, reason: str) -> None:
    """The connection ends now, announced by a GOAWAY."""
    assert pair.timeout() == [ConnectionEnded(None, reason)]
    answer = pair.answer()
    assert answer.kind is Kind.GOAWAY
    assert answer.value == {"reason": reason, "retry_after_ms": 0}
    assert answer.token == NO_TOKEN
    assert pair.server.state is State.CLOSED
    assert pair.server.next_deadline() == NEVER
    assert pair.timeout() == []


def lasts(pair: ConnectionPair) -> None:
    assert pair.timeout() == []
    assert pair.answers() == []


# --- a session must be opened ---------------------------------------------------------------------------


def test_a_connection_without_a_session_ends_after_the_time_for_opening_one(pair: ConnectionPair) -> None:
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == NOW + 10
    pair.clock.advance(9.999)
    lasts(pair)
    pair.clock.advance(0.001)
    ends(pair, "no_session")


@pytest.mark.parametrize("kind", ["public requests", "pings", "refused tokens", "stale frames"])
def test_what_opens_no_session_gives_no_more_time(pair: ConnectionPair, kind: str) -> None:
    for _ in range(9):
        pair.clock.advance(1)
        if kind == "public requests":
            pair.respond(pair.get(pair.request(1, "server.info")))
        elif kind == "pings":
            pair.send(pair.ping())
        else:
            pair.send(pair.request(1, token=b"?" * 32, timestamp=0 if kind == "stale frames" else None))
        pair.timeout()
    pair.answers()
    pair.clock.advance(1)
    ends(pair, "no_session")


@pytest.mark.parametrize("how", ["opened", "used"])
def test_a_session_ends_the_waiting(pair: ConnectionPair, how: str) -> None:
    pair.clock.advance(9.999)
    if how == "opened":
        pair.login()
    else:
        pair.send(pair.request(1, token=pair.open_session().token))
    pair.clock.advance(100)
    lasts(pair)


def test_a_connection_left_without_a_session_has_the_time_once_more(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    pair.clock.advance(100)
    pair.server.leave(first.session.id, pair.clock.now())
    pair.server.next_deadline()
    pair.clock.advance(50)
    lasts(pair)
    pair.server.leave(second.session.id, pair.clock.now())
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == NOW + 160
    pair.clock.advance(5)
    pair.server.leave(second.session.id, pair.clock.now())  # once more, by whoever is late
    pair.clock.advance(4.999)
    lasts(pair)
    pair.clock.advance(0.001)
    ends(pair, "no_session")


def test_the_time_for_opening_is_a_setting_and_goes_on_over_requests_in_flight() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(open_timeout_s=2.5))
    request = pair.hold(pair.request(1, "session.open"))
    pair.clock.advance(2.5)
    ends(pair, "no_session")
    assert not pair.respond(request)


# --- idleness -------------------------------------------------------------------------------------------


@pytest.fixture
def calm() -> ConnectionPair:
    """A connection with a session that says nothing of its own."""
    pair = ConnectionPair(
        small_registry(lifetime_ms=1_000 * HOUR_MS), ConnectionSettings(idle_timeout_s=300.0)
    )
    pair.login()
    pair.server.next_deadline()
    return pair


def test_a_silent_connection_ends_after_the_idle_timeout(calm: ConnectionPair) -> None:
    assert calm.server.next_deadline() == NOW + 300
    assert calm.welcome.value["idle_timeout_ms"] == 300_000
    calm.clock.advance(299.999)
    lasts(calm)
    calm.clock.advance(0.001)
    ends(calm, "idle")


@pytest.mark.parametrize("kind", ["ping", "pong", "request", "cancel", "refused", "stale"])
def test_each_frame_is_a_sign_of_life(calm: ConnectionPair, kind: str) -> None:
    for _ in range(5):
        calm.clock.advance(299)
        frames = {
            "ping": calm.ping,
            "pong": lambda: calm.frame(PONG),
            "request": lambda: calm.request(1),
            "cancel": lambda: calm.cancel(1),
            "refused": lambda: calm.request(1, token=b"?" * 32),
            "stale": lambda: calm.request(1, timestamp=0),
        }
        calm.send(frames[kind]())
        assert calm.timeout() == []
        assert calm.server.next_deadline() == calm.clock.now() + 300
    calm.answers()
    calm.clock.advance(300)
    ends(calm, "idle")


def test_a_frame_that_never_ends_is_no_sign_of_life(calm: ConnectionPair) -> None:
    data = calm.request(1, params={"a": "x" * 400})
    for at in range(300):
        assert calm.send(data[at : at + 1]) == []
        calm.clock.advance(1)
        if at < 299:
            lasts(calm)
    ends(calm, "idle")


def test_what_the_server_sends_is_no_sign_of_life(calm: ConnectionPair) -> None:
    calm.clock.advance(299)
    (session_id,) = calm.server.session_ids
    calm.server.send_event(session_id, "pins.next", {}, calm.clock.wall())
    calm.answers()
    calm.clock.advance(1)
    ends(calm, "idle")


def test_who_waits_for_an_answer_is_not_idle(calm: ConnectionPair) -> None:
    request = calm.hold(calm.request(1))
    calm.clock.advance(300)
    lasts(calm)
    assert calm.server.next_deadline() == NOW + 600
    calm.clock.advance(1)
    calm.respond(request)
    calm.answers()
    calm.clock.advance(298.9)
    lasts(calm)
    calm.clock.advance(0.1)
    ends(calm, "idle")


def test_a_deadline_is_told_as_long_as_anything_may_be_due(calm: ConnectionPair) -> None:
    """An edge that asks only then must not be left without one when a long request ends."""
    request = calm.hold(calm.request(1))
    for _ in range(3):
        calm.clock.advance(300)
        lasts(calm)
        assert calm.server.next_deadline() <= calm.clock.now() + 300
    calm.respond(request)
    assert calm.server.next_deadline() <= calm.clock.now() + 300


def test_handling_time_early_does_nothing(calm: ConnectionPair) -> None:
    for _ in range(50):
        lasts(calm)
        calm.clock.advance(1)


def test_several_things_due_at_once_all_happen(calm: ConnectionPair) -> None:
    request = calm.hold(calm.request(1, meta={"deadline_ms": 300_000}))
    calm.clock.advance(300)
    assert calm.timeout() == [
        RequestEnded(request, Code.DEADLINE_EXCEEDED),
        ConnectionEnded(None, "idle"),
    ]
    assert [answer.kind for answer in calm.answers()] == [Kind.ERROR, Kind.GOAWAY]


def test_while_draining_the_end_is_not_announced_twice(calm: ConnectionPair) -> None:
    calm.server.go_away("draining", 1_000, calm.clock.wall())
    assert calm.answer().value == {"reason": "draining", "retry_after_ms": 1_000}
    calm.clock.advance(300)
    assert calm.timeout() == [ConnectionEnded(None, "idle")]
    assert calm.answers() == []


# --- session.expiring -----------------------------------------------------------------------------------


def lifetimes(**settings: Any) -> ConnectionPair:
    registry = small_registry(lifetime_ms=100_000, idle_timeout_ms=None, **settings)
    return ConnectionPair(registry, ConnectionSettings(idle_timeout_s=10_000.0))


def test_an_expiring_session_is_told_once_when_a_tenth_is_left() -> None:
    pair = lifetimes()
    opened = pair.login()
    assert pair.server.next_deadline() == NOW + 90
    pair.clock.advance(89.999)
    lasts(pair)
    pair.clock.advance(0.001)
    assert pair.timeout() == []
    answer = pair.answer()
    assert answer.event == ("session.expiring", {"expires_at": WALL + 100_000})
    assert (answer.stream, answer.token) == (0, opened.token)
    pair.get(pair.request(1))
    pair.clock.advance(9)
    lasts(pair)


def test_each_session_is_told_at_its_own_time() -> None:
    pair = lifetimes()
    sessions = []
    for user in ("ada", "ben", "eve"):
        sessions.append(pair.login(user))
        pair.server.next_deadline()
        pair.clock.advance(10)
    pair.registry.close(sessions[1].session)
    pair.server.leave(sessions[1].session.id, pair.clock.now())
    told = []
    while len(told) < 2:
        deadline = pair.server.next_deadline()
        pair.clock.advance(deadline - pair.clock.now())
        assert pair.timeout() == []
        told += [(pair.clock.now() - NOW, answer.token) for answer in pair.answers()]
    assert told == [(90, sessions[0].token), (110, sessions[2].token)]
    assert pair.server.next_deadline() > NOW + 1_000


def test_a_session_used_in_its_last_tenth_is_told_at_once() -> None:
    pair = lifetimes()
    opened = pair.open_session()
    pair.clock.advance(95)
    pair.send(pair.ping())
    pair.answers()
    pair.server.next_deadline()
    pair.send(pair.request(1, token=opened.token))
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == pair.clock.now()
    assert pair.timeout() == []
    assert pair.answer().event[0] == "session.expiring"


def test_a_refreshed_session_is_told_anew_with_its_new_token() -> None:
    pair = lifetimes()
    opened = pair.login()
    pair.clock.advance(90)
    pair.timeout()
    pair.answers()
    assert opened.refresh_token is not None
    again = pair.registry.refresh(
        opened.refresh_token, client="test/1", address="192.0.2.7", wall=pair.clock.wall()
    )
    pair.use(again)
    pair.clock.advance(89.999)
    lasts(pair)
    pair.clock.advance(0.001)
    assert pair.timeout() == []
    answer = pair.answer()
    assert answer.event == ("session.expiring", {"expires_at": WALL + 190_000})
    assert answer.token == again.token


def test_a_clock_set_back_does_not_make_expiry_come_late_in_real_time() -> None:
    pair = lifetimes()
    pair.login()
    pair.clock.wall_ms -= 1_000_000
    pair.clock.now_s += 90
    assert pair.timeout() == []
    assert pair.answer().event[0] == "session.expiring"
