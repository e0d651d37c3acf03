"""A session that was refreshed elsewhere: what a connection with the old token may still do, and until when."""

from __future__ import annotations

import pytest

from tests.helpers import NOW, ConnectionPair, small_registry
from zcproto.connection import refusals
from zcproto.connection.events import RequestEnded, ServerEvent, SessionJoined, SessionLeft
from zcproto.connection.server import ROTATION_GRACE_S
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.errors import Code, Unavailable
from zcproto.sessions import OpenedSession
from zcproto.sessions.token import digest_of
from zcproto.wire.frame import Kind
from zcproto.wire.message import encode_body

SETTINGS = ConnectionSettings(
    streams=StreamLimits(max_open=4, max_item=1_000),
    max_calls=4,
    idle_timeout_s=86_400.0,
    open_timeout_s=10.0,
)


class RotatedPair(ConnectionPair):
    """A connection with a session that has a stream, and a registration."""

    def __init__(self, lifetime_ms: int = 3_600_000) -> None:
        super().__init__(small_registry(refresh=True, lifetime_ms=lifetime_ms), SETTINGS)
        self.login()
        self.server.register(self.opened.session.id, frozenset({"approve"}), 4)
        self.stream = self.open(1)
        self.answers()

    def refresh(self) -> OpenedSession:
        """Refresh the session on another connection."""
        refreshed = self.registry.refresh(
            self.opened.refresh_token or b"", client="test/1", address="192.0.2.7", wall=self.clock.wall()
        )
        self.suspend(digest_of(refreshed.token))
        return refreshed

    def suspend(self, token_digest: bytes) -> bool:
        return self.server.suspend(self.opened.session.id, token_digest, self.clock.wall(), self.clock.now())

    def event(self) -> bool:
        return self.server.send_event(self.opened.session.id, "news", 1, self.clock.wall())

    def until_next(self) -> list[ServerEvent]:
        """Advance to each next deadline until something happens."""
        while True:
            self.clock.advance(self.server.next_deadline() - self.clock.now())
            if events := self.timeout():
                return events

    @property
    def passed(self) -> float:
        return self.clock.now() - NOW

    def assert_cut(self, events: list[ServerEvent], reason: str) -> None:
        left = SessionLeft(self.opened.session.id)
        assert events == [RequestEnded(self.stream, Code.CANCELLED, reason), left]
        assert self.server.sessions == {}


@pytest.fixture
def rotated() -> RotatedPair:
    return RotatedPair()


def test_refresh_elsewhere_stops_calls_and_events_at_once(rotated: RotatedPair) -> None:
    session_id = rotated.opened.session.id
    rotated.call()
    assert rotated.event()
    assert not rotated.server.is_suspended(session_id)
    rotated.refresh()
    assert rotated.server.is_suspended(session_id)
    with pytest.raises(Unavailable):
        rotated.call()
    assert not rotated.event()


def test_streams_are_cut_a_minute_later_to_the_millisecond(rotated: RotatedPair) -> None:
    rotated.refresh()
    rotated.assert_cut(rotated.until_next(), "token_rotated")
    assert rotated.passed == ROTATION_GRACE_S
    assert [answer.kind for answer in rotated.answers()] == [Kind.ERROR], "session.expiring is not sent"
    assert rotated.server.next_deadline() == NOW + ROTATION_GRACE_S + SETTINGS.open_timeout_s


def test_streams_are_cut_when_the_old_token_would_have_expired() -> None:
    rotated = RotatedPair(lifetime_ms=40_000)
    rotated.clock.advance(10)
    rotated.refresh()
    rotated.assert_cut(rotated.until_next(), "token_rotated")
    assert rotated.passed == 40


def test_later_refreshes_prolong_nothing(rotated: RotatedPair) -> None:
    rotated.refresh()
    rotated.clock.advance(30)
    assert not rotated.suspend(b"n" * 32)
    rotated.assert_cut(rotated.until_next(), "token_rotated")
    assert rotated.passed == ROTATION_GRACE_S


def test_newest_token_ends_the_suspension(rotated: RotatedPair) -> None:
    refreshed = rotated.refresh()
    rotated.clock.advance(59)
    joined, _ = rotated.send(rotated.request(7, token=refreshed.token))
    assert joined == SessionJoined(rotated.opened.session.id)
    assert rotated.event()
    rotated.call()
    rotated.clock.advance(2)
    assert rotated.timeout() == []
    assert rotated.server.is_held(rotated.stream)


def test_token_of_this_connection_suspends_nothing(rotated: RotatedPair) -> None:
    assert not rotated.suspend(digest_of(rotated.opened.token))
    assert not rotated.server.suspend("another", b"n" * 32, rotated.clock.wall(), rotated.clock.now())
    assert rotated.server.is_suspended("another"), "it is not used here"


def test_old_token_that_is_valid_again_ends_the_suspension(rotated: RotatedPair) -> None:
    """A failover of the store has lost the refresh."""
    rotated.suspend(b"n" * 32)
    joined, _ = rotated.send(rotated.request(7))
    assert joined == SessionJoined(rotated.opened.session.id)
    assert not rotated.server.is_suspended(rotated.opened.session.id)


def test_streams_end_when_their_token_expires() -> None:
    rotated = RotatedPair(lifetime_ms=40_000)
    rotated.assert_cut(rotated.until_next(), "token_expired")
    assert rotated.passed == 40
    assert [answer.kind for answer in rotated.answers()] == [Kind.EVENT, Kind.ERROR]
    assert rotated.registry.lapsed == 1


@pytest.mark.parametrize("has_stream", [True, False])
def test_edge_that_ends_an_expired_session_itself_gets_no_event(has_stream: bool) -> None:
    rotated = RotatedPair(lifetime_ms=40_000)
    cut: list[RequestEnded] = []
    if not has_stream:
        rotated.server.respond(rotated.stream, encode_body(None), rotated.clock.wall())

    def observer(session_id: str, code: Code, _: object) -> None:
        rotated.server.leave(session_id, rotated.clock.now())
        cut.extend(rotated.server.cut_streams(session_id, code, rotated.clock.wall()))

    rotated.registry.observers.append(observer)
    rotated.clock.advance(40)
    assert rotated.timeout() == []
    rotated.clock.advance(0.1)
    assert rotated.timeout() == []
    assert cut == [RequestEnded(rotated.stream, Code.CANCELLED, "token_expired")] * has_stream
    assert rotated.server.sessions == {}


def test_only_streams_that_may_not_go_on_are_cut(rotated: RotatedPair) -> None:
    kept, request = rotated.open(2), rotated.hold(rotated.request(3))
    cut = rotated.server.cut_denied(lambda stream: stream is kept, rotated.clock.wall())
    assert cut == [RequestEnded(rotated.stream, Code.CANCELLED, "denied")]
    assert [rotated.server.is_held(each) for each in (rotated.stream, kept, request)] == [False, True, True]
    assert rotated.answer().code == Code.CANCELLED


def test_stream_is_cut_with_the_error_of_the_server(rotated: RotatedPair) -> None:
    cut = rotated.server.cut(rotated.stream, refusals.TOO_MUCH_HELD, rotated.clock.wall())
    assert cut == RequestEnded(rotated.stream, Code.CANCELLED, "memory")
    assert (rotated.answer().code, rotated.server.in_flight) == (Code.CANCELLED, 0)


def test_connection_without_streams_cuts_none() -> None:
    pair = ConnectionPair(settings=SETTINGS)
    pair.login()
    assert pair.server.cut_denied(lambda _: False, pair.clock.wall()) == []
    assert pair.server.open_streams() == []


def test_other_sessions_of_the_connection_are_not_affected(rotated: RotatedPair) -> None:
    other = rotated.open_session("bob")
    rotated.refresh()
    rotated.send(rotated.request(7, token=other.token))
    rotated.token = other.token
    kept = rotated.open(2)
    events = rotated.until_next()
    assert events == [
        RequestEnded(rotated.stream, Code.CANCELLED, "token_rotated"),
        SessionLeft(rotated.opened.session.id),
    ]
    assert rotated.server.is_held(kept)
    assert list(rotated.server.sessions) == [other.session.id]
