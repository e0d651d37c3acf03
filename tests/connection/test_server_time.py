"""Test timeouts of a server connection: opening a session, idleness, and session expiry."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import NOW, WALL, ConnectionPair, small_registry
from zcproto.connection.events import NEVER, ConnectionEnded, GoAwayReason, RequestEnded, SessionLeft
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import NO_TOKEN, PONG, Kind

HOUR_MS = 3_600_000


def assert_closes(pair: ConnectionPair, reason: str) -> None:
    """Assert that the connection closes now, after a GOAWAY."""
    assert pair.timeout() == [ConnectionEnded(None, reason)]
    answer = pair.answer()
    assert answer.kind is Kind.GOAWAY
    assert answer.value == {"reason": reason, "retry_after_ms": 0}
    assert answer.token == NO_TOKEN
    assert pair.server.state is State.CLOSED
    assert pair.server.next_deadline() == NEVER
    assert pair.timeout() == []


def assert_stays_open(pair: ConnectionPair) -> None:
    assert pair.timeout() == []
    assert pair.answers() == []


# --- open timeout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle_timeout_s", [300.0, 4.0])
def test_first_deadline_is_known_from_the_settings(idle_timeout_s: float) -> None:
    pair = ConnectionPair(settings=ConnectionSettings(idle_timeout_s=idle_timeout_s))
    assert not pair.server.deadline_moved
    assert pair.settings.first_timeout_s == min(10.0, idle_timeout_s)
    assert pair.server.next_deadline() == NOW + pair.settings.first_timeout_s


def test_connection_without_session_closes_after_open_timeout(pair: ConnectionPair) -> None:
    pair.clock.advance(9.999)
    assert_stays_open(pair)
    pair.clock.advance(0.001)
    assert_closes(pair, "no_session")


@pytest.mark.parametrize("kind", ["public requests", "pings", "refused tokens", "stale frames"])
def test_frames_without_session_do_not_extend_open_timeout(pair: ConnectionPair, kind: str) -> None:
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
    assert_closes(pair, "no_session")


@pytest.mark.parametrize("how", ["opened", "used"])
def test_session_stops_open_timeout(pair: ConnectionPair, how: str) -> None:
    pair.clock.advance(9.999)
    if how == "opened":
        pair.login()
    else:
        pair.send(pair.request(1, token=pair.open_session().token))
    pair.clock.advance(100)
    assert_stays_open(pair)


def test_open_timeout_restarts_when_last_session_ends(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    pair.clock.advance(100)
    pair.server.leave(first.session.id, pair.clock.now())
    pair.server.next_deadline()
    pair.clock.advance(50)
    assert_stays_open(pair)
    pair.server.leave(second.session.id, pair.clock.now())
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == NOW + 160
    pair.clock.advance(5)
    pair.server.leave(second.session.id, pair.clock.now())  # a late duplicate changes nothing
    pair.clock.advance(4.999)
    assert_stays_open(pair)
    pair.clock.advance(0.001)
    assert_closes(pair, "no_session")


def test_open_timeout_is_configurable_and_ignores_requests_in_flight() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(open_timeout_s=2.5))
    request = pair.hold(pair.request(1, "session.open"))
    pair.clock.advance(2.5)
    assert_closes(pair, "no_session")
    assert not pair.respond(request)


# --- idle timeout ---------------------------------------------------------------------------------------


@pytest.fixture
def idle_pair() -> ConnectionPair:
    """Return a connection with a session that sends nothing unasked before its idle timeout."""
    pair = ConnectionPair(
        small_registry(lifetime_ms=1_000 * HOUR_MS), ConnectionSettings(idle_timeout_s=300.0)
    )
    pair.login()
    pair.server.next_deadline()
    return pair


def test_silent_connection_closes_after_idle_timeout(idle_pair: ConnectionPair) -> None:
    assert idle_pair.server.next_deadline() == NOW + 300
    assert idle_pair.welcome.value["idle_timeout_ms"] == 300_000
    idle_pair.clock.advance(299.999)
    assert_stays_open(idle_pair)
    idle_pair.clock.advance(0.001)
    assert_closes(idle_pair, "idle")


@pytest.mark.parametrize("kind", ["ping", "pong", "request", "cancel", "refused", "stale"])
def test_any_received_frame_restarts_idle_timeout(idle_pair: ConnectionPair, kind: str) -> None:
    for _ in range(5):
        idle_pair.clock.advance(299)
        frames = {
            "ping": idle_pair.ping,
            "pong": lambda: idle_pair.frame(PONG),
            "request": lambda: idle_pair.request(1),
            "cancel": lambda: idle_pair.cancel(1),
            "refused": lambda: idle_pair.request(1, token=b"?" * 32),
            "stale": lambda: idle_pair.request(1, timestamp=0),
        }
        idle_pair.send(frames[kind]())
        assert idle_pair.timeout() == []
        assert idle_pair.server.next_deadline() == idle_pair.clock.now() + 300
    idle_pair.answers()
    idle_pair.clock.advance(300)
    assert_closes(idle_pair, "idle")


def test_incomplete_header_does_not_restart_idle_timeout(idle_pair: ConnectionPair) -> None:
    data = idle_pair.request(1, params={"a": "x" * 400})
    for at in range(60):
        assert idle_pair.send(data[at : at + 1]) == []
        idle_pair.clock.advance(5)
        if at < 59:
            assert_stays_open(idle_pair)
    assert_closes(idle_pair, "idle")


def test_sent_event_does_not_restart_idle_timeout(idle_pair: ConnectionPair) -> None:
    idle_pair.clock.advance(299)
    (session_id,) = idle_pair.server.sessions
    idle_pair.server.send_event(session_id, "pins.next", {}, idle_pair.clock.wall())
    idle_pair.answers()
    idle_pair.clock.advance(1)
    assert_closes(idle_pair, "idle")


def test_request_in_flight_counts_as_activity(idle_pair: ConnectionPair) -> None:
    request = idle_pair.hold(idle_pair.request(1))
    idle_pair.clock.advance(300)
    assert_stays_open(idle_pair)
    assert idle_pair.server.next_deadline() == NOW + 600
    idle_pair.clock.advance(1)
    idle_pair.respond(request)
    idle_pair.answers()
    idle_pair.clock.advance(298.9)
    assert_stays_open(idle_pair)
    idle_pair.clock.advance(0.1)
    assert_closes(idle_pair, "idle")


def test_next_deadline_is_set_while_request_is_in_flight(idle_pair: ConnectionPair) -> None:
    """An edge that only runs at deadlines must always have one, also when a long request ends."""
    request = idle_pair.hold(idle_pair.request(1))
    for _ in range(3):
        idle_pair.clock.advance(300)
        assert_stays_open(idle_pair)
        assert idle_pair.server.next_deadline() <= idle_pair.clock.now() + 300
    idle_pair.respond(request)
    assert idle_pair.server.next_deadline() <= idle_pair.clock.now() + 300


def test_early_timeout_does_nothing(idle_pair: ConnectionPair) -> None:
    for _ in range(50):
        assert_stays_open(idle_pair)
        idle_pair.clock.advance(1)


def test_request_deadline_and_idle_timeout_due_together_both_happen(idle_pair: ConnectionPair) -> None:
    request = idle_pair.hold(idle_pair.request(1, meta={"deadline_ms": 300_000}))
    idle_pair.clock.advance(300)
    assert idle_pair.timeout() == [
        RequestEnded(request, Code.DEADLINE_EXCEEDED),
        ConnectionEnded(None, "idle"),
    ]
    assert [answer.kind for answer in idle_pair.answers()] == [Kind.ERROR, Kind.GOAWAY]


def test_idle_draining_connection_sends_no_second_goaway(idle_pair: ConnectionPair) -> None:
    idle_pair.server.go_away("draining", 1_000, idle_pair.clock.wall())
    assert idle_pair.answer().value == {"reason": "draining", "retry_after_ms": 1_000}
    idle_pair.clock.advance(300)
    assert idle_pair.timeout() == [ConnectionEnded(None, "idle")]
    assert idle_pair.answers() == []


# --- session.expiring -----------------------------------------------------------------------------------


def lifetimes(**settings: Any) -> ConnectionPair:
    registry = small_registry(lifetime_ms=100_000, idle_timeout_ms=None, **settings)
    return ConnectionPair(registry, ConnectionSettings(idle_timeout_s=10_000.0))


def test_session_expiring_is_sent_once_at_last_tenth_of_lifetime() -> None:
    pair = lifetimes()
    opened = pair.login()
    assert pair.server.next_deadline() == NOW + 90
    pair.clock.advance(89.999)
    assert_stays_open(pair)
    pair.clock.advance(0.001)
    assert pair.timeout() == []
    answer = pair.answer()
    assert answer.event == ("session.expiring", {"expires_at": WALL + 100_000})
    assert (answer.stream, answer.token) == (0, opened.token)
    pair.get(pair.request(1))
    pair.clock.advance(9)
    assert_stays_open(pair)


def test_session_expiring_is_sent_for_each_session_at_its_own_time() -> None:
    pair = lifetimes()
    sessions = []
    for user in ("ada", "ben", "eve"):
        sessions.append(pair.login(user))
        pair.server.next_deadline()
        pair.clock.advance(10)
    pair.registry.close(sessions[1].session)
    pair.server.leave(sessions[1].session.id, pair.clock.now())
    sent = []
    while len(sent) < 2:
        deadline = pair.server.next_deadline()
        pair.clock.advance(deadline - pair.clock.now())
        assert pair.timeout() in ([], [SessionLeft(sessions[0].session.id)])  # it expires first
        sent += [(pair.clock.now() - NOW, answer.token) for answer in pair.answers()]
    assert sent == [(90, sessions[0].token), (110, sessions[2].token)]
    assert pair.server.next_deadline() == NOW + 120  # the last token expires
    pair.clock.advance(10)
    assert pair.timeout() == [SessionLeft(sessions[2].session.id)]


def test_first_session_moves_the_deadline_only_if_it_expires_before_the_open_deadline() -> None:
    pair = lifetimes()
    opened = pair.open_session()
    assert pair.server.next_deadline() == NOW + 10
    pair.send(pair.request(1, token=opened.token))
    assert not pair.server.deadline_moved  # the edge looks again at the open deadline
    assert pair.server.next_deadline() == NOW + 90
    pair.clock.advance(85)
    late = ConnectionPair(pair.registry, pair.settings, clock=pair.clock)
    late.server.next_deadline()
    late.send(late.request(1, token=opened.token))
    assert late.server.deadline_moved
    assert late.server.next_deadline() == NOW + 90


def test_requests_of_a_session_that_left_are_answered_before_the_connection_closes() -> None:
    """A clean end after GOAWAY means that requests without an answer were not run."""
    pair = lifetimes()
    opened = pair.login()
    run = pair.hold(pair.request(1))
    public = pair.hold(pair.request(2, token=NO_TOKEN))
    assert pair.server.suspend(opened.session.id, b"n" * 32, pair.clock.wall(), pair.clock.now())
    pair.clock.advance(60)
    assert pair.timeout() == [SessionLeft(opened.session.id)]
    pair.clock.advance(10)
    assert pair.timeout() == [
        RequestEnded(run, Code.CANCELLED),
        ConnectionEnded(None, GoAwayReason.NO_SESSION),
    ]
    assert [(answer.kind, answer.stream) for answer in pair.answers()] == [(Kind.ERROR, 1), (Kind.GOAWAY, 0)]
    assert pair.server.is_held(public)


def test_session_joined_in_last_tenth_gets_session_expiring_immediately() -> None:
    pair = lifetimes()
    pair.login("ben")
    opened = pair.open_session()
    pair.clock.advance(95)
    pair.timeout()
    pair.answers()
    pair.server.next_deadline()
    pair.send(pair.request(1, token=opened.token))
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == pair.clock.now()
    assert pair.timeout() == []
    assert pair.answer().event[0] == "session.expiring"


def test_refreshed_session_gets_session_expiring_again_with_new_token() -> None:
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
    assert_stays_open(pair)
    pair.clock.advance(0.001)
    assert pair.timeout() == []
    answer = pair.answer()
    assert answer.event == ("session.expiring", {"expires_at": WALL + 190_000})
    assert answer.token == again.token


def test_wall_clock_set_back_does_not_delay_session_expiring() -> None:
    pair = lifetimes()
    pair.login()
    pair.clock.wall_ms -= 1_000_000
    pair.clock.now_s += 90
    assert pair.timeout() == []
    assert pair.answer().event[0] == "session.expiring"
