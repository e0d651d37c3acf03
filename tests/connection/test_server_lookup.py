"""Test the lookup of unknown tokens in a store that several servers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import ConnectionPair, small_registry
from zcproto.connection.events import ConnectionEnded, Request, ServerEvent, SessionJoined, TokenUnknown
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.token import id_from_text
from zcproto.wire.message import encode_error

HOUR_MS = 3_600_000
REFUSAL = encode_error(Code.UNAVAILABLE, "the store is out", {"retry_after_ms": 5})


@pytest.fixture
def pair() -> ConnectionPair:
    """Return a connection that looks up unknown tokens."""
    return ConnectionPair(settings=ConnectionSettings(looks_up=True))


class SessionInStore:
    """A session that exists only in the store until its record is restored."""

    def __init__(self, pair: ConnectionPair) -> None:
        opened = pair.open_session()
        session_id = id_from_text(opened.session.id)
        assert session_id is not None
        record = pair.registry.record(session_id)
        assert record is not None
        pair.registry.forget(session_id)
        self.id = opened.session.id
        self.token = opened.token
        self.record: SessionRecord = record


def receive_until_lookup(pair: ConnectionPair, data: bytes) -> tuple[TokenUnknown, Iterator[ServerEvent]]:
    """Receive data until a token has to be looked up; return that event and the remaining events."""
    events = pair.receive_data(data)
    unknown = next(events)
    assert isinstance(unknown, TokenUnknown)
    return unknown, events


def test_token_found_by_lookup_is_accepted_for_waiting_frame(pair: ConnectionPair) -> None:
    session = SessionInStore(pair)
    unknown, events = receive_until_lookup(
        pair, pair.request(1, token=session.token) + pair.request(2, token=session.token)
    )
    assert (unknown.token, unknown.code, unknown.refusal) == (session.token, Code.UNAUTHENTICATED, None)
    pair.registry.restore(session.record)
    joined, first, second = events
    assert joined == SessionJoined(session.id)
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert first.session is second.session is not None
    assert pair.answers() == []


def test_token_not_found_by_lookup_is_refused(pair: ConnectionPair) -> None:
    unknown, events = receive_until_lookup(pair, pair.request(1, token=b"x" * 32) + pair.request(2))
    assert list(events) != []  # the next frame is handled
    first, _ = [*pair.answers(), None]
    assert (first.stream, first.code) == (1, Code.UNAUTHENTICATED)
    assert unknown.refusal is None


def test_failed_lookup_refuses_frame_with_given_error(pair: ConnectionPair) -> None:
    unknown, events = receive_until_lookup(pair, pair.request(1, token=b"x" * 32))
    unknown.refusal = REFUSAL
    assert list(events) == []
    answer = pair.answer()
    assert (answer.stream, answer.code, answer.body) == (1, Code.UNAVAILABLE, REFUSAL)


def test_each_frame_with_unknown_token_is_looked_up(pair: ConnectionPair) -> None:
    session = SessionInStore(pair)
    unknown, events = receive_until_lookup(
        pair, pair.request(1, token=session.token) + pair.request(2, token=session.token)
    )
    unknown.refusal = REFUSAL
    again = next(events)
    assert isinstance(again, TokenUnknown)
    pair.registry.restore(session.record)
    assert [type(event) for event in events] == [SessionJoined, Request]


def test_expired_token_is_looked_up(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    pair.clock.advance(HOUR_MS / 1000)
    unknown, events = receive_until_lookup(pair, pair.request(1, token=opened.token))
    assert unknown.code is Code.TOKEN_EXPIRED
    assert list(events) == []
    assert pair.answer().code == Code.TOKEN_EXPIRED


def test_revoked_token_is_not_looked_up(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    pair.registry.revoke(opened.session.id, user=None, reason="")
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.TOKEN_REVOKED


def test_frame_without_token_is_not_looked_up(pair: ConnectionPair) -> None:
    assert pair.get(pair.request(1)).session is None


def test_session_revoked_while_joining_after_lookup_is_refused(pair: ConnectionPair) -> None:
    session = SessionInStore(pair)
    _, events = receive_until_lookup(pair, pair.request(1, token=session.token))
    pair.registry.restore(session.record)
    assert isinstance(next(events), SessionJoined)
    pair.registry.revoke(session.id, user=None, reason="")
    assert list(events) == []
    assert pair.answer().code == Code.TOKEN_REVOKED


def test_connection_closed_during_lookup_handles_no_frame(pair: ConnectionPair) -> None:
    session = SessionInStore(pair)
    _, events = receive_until_lookup(pair, pair.request(1, token=session.token))
    pair.registry.restore(session.record)
    pair.server.end()
    assert list(events) == []
    assert pair.answers() == []


def test_unknown_token_is_refused_when_lookup_is_off() -> None:
    pair = ConnectionPair()
    assert pair.refused(pair.request(1, token=b"x" * 32)).code == Code.UNAUTHENTICATED


@pytest.mark.parametrize("looks_up", [False, True])
def test_refuse_all_skips_lookup_and_keeps_connection(looks_up: bool) -> None:
    pair = ConnectionPair(small_registry(), ConnectionSettings(looks_up=looks_up))
    pair.login()
    assert pair.get(pair.request(1)).session is not None
    pair.registry.refuse_all()
    for stream in (1, 2):
        answer = pair.refused(pair.request(stream))
        assert (answer.code, answer.error.details) == (Code.UNAVAILABLE, {"retry_after_ms": 1_000})
    assert pair.refused(pair.request(1, token=b"x" * 32)).code == Code.UNAVAILABLE
    assert not any(isinstance(event, ConnectionEnded) for event in pair.timeout())
    pair.registry.stop_refusing()
    assert pair.get(pair.request(1)).session is not None


def test_session_in_use_is_refused_once_the_registry_is_not_trusted() -> None:
    pair = ConnectionPair(small_registry(), ConnectionSettings(looks_up=True))
    pair.registry.trusted_until = pair.clock.wall() + 500
    pair.login()
    assert pair.get(pair.request(1)).session is not None
    pair.clock.advance(0.5)  # the process was stopped, and no timer has run since
    for stream in (1, 2):
        answer = pair.refused(pair.request(stream))
        assert (answer.code, answer.error.details) == (Code.UNAVAILABLE, {"retry_after_ms": 50})
    pair.registry.trusted_until += 1
    assert pair.get(pair.request(1)).session is not None


def test_repr_of_token_unknown_hides_token(pair: ConnectionPair) -> None:
    unknown, _ = receive_until_lookup(pair, pair.request(1, token=b"secret" + b"x" * 26))
    assert repr(unknown) == f"TokenUnknown(code={Code.UNAUTHENTICATED!r})"
