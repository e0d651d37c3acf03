"""Tokens that are not known here may be good all the same, where several processes share the sessions."""

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
    """A connection where tokens are looked up."""
    return ConnectionPair(settings=ConnectionSettings(looks_up=True))


class Elsewhere:
    """A session that is known here only once it was restored."""

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


def begin(pair: ConnectionPair, data: bytes) -> tuple[TokenUnknown, Iterator[ServerEvent]]:
    """Give bytes to the server up to a token that is to be looked up."""
    events = pair.receive_data(data)
    unknown = next(events)
    assert isinstance(unknown, TokenUnknown)
    return unknown, events


def test_a_token_that_was_found_is_good_for_the_frame_that_waited(pair: ConnectionPair) -> None:
    session = Elsewhere(pair)
    unknown, events = begin(pair, pair.request(1, token=session.token) + pair.request(2, token=session.token))
    assert (unknown.token, unknown.code, unknown.refusal) == (session.token, Code.UNAUTHENTICATED, None)
    pair.registry.restore(session.record)
    joined, first, second = events
    assert joined == SessionJoined(session.id)
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert first.session is second.session is not None
    assert pair.answers() == []


def test_a_token_that_was_not_found_is_refused(pair: ConnectionPair) -> None:
    unknown, events = begin(pair, pair.request(1, token=b"x" * 32) + pair.request(2))
    assert list(events) != []  # what stands behind it goes on
    first, _ = [*pair.answers(), None]
    assert first is not None
    assert (first.stream, first.code) == (1, Code.UNAUTHENTICATED)
    assert unknown.refusal is None


def test_the_edge_may_refuse_what_it_cannot_find_out(pair: ConnectionPair) -> None:
    unknown, events = begin(pair, pair.request(1, token=b"x" * 32))
    unknown.refusal = REFUSAL
    assert list(events) == []
    answer = pair.answer()
    assert (answer.stream, answer.code, answer.body) == (1, Code.UNAVAILABLE, REFUSAL)


def test_each_frame_with_an_unknown_token_is_looked_up_for_itself(pair: ConnectionPair) -> None:
    session = Elsewhere(pair)
    unknown, events = begin(pair, pair.request(1, token=session.token) + pair.request(2, token=session.token))
    unknown.refusal = REFUSAL
    again = next(events)
    assert isinstance(again, TokenUnknown)
    pair.registry.restore(session.record)
    assert [type(event) for event in events] == [SessionJoined, Request]


def test_a_token_that_seems_expired_is_looked_up(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    pair.clock.advance(HOUR_MS / 1000)
    unknown, events = begin(pair, pair.request(1, token=opened.token))
    assert unknown.code is Code.TOKEN_EXPIRED
    assert list(events) == []
    assert pair.answer().code == Code.TOKEN_EXPIRED


def test_a_revoked_token_is_not(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    pair.registry.revoke(opened.session.id, user=None, reason="")
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.TOKEN_REVOKED


def test_frames_without_a_token_are_not(pair: ConnectionPair) -> None:
    assert pair.get(pair.request(1)).session is None


def test_a_session_that_ends_while_it_joins_is_refused(pair: ConnectionPair) -> None:
    session = Elsewhere(pair)
    _, events = begin(pair, pair.request(1, token=session.token))
    pair.registry.restore(session.record)
    assert isinstance(next(events), SessionJoined)
    pair.registry.revoke(session.id, user=None, reason="")
    assert list(events) == []
    assert pair.answer().code == Code.TOKEN_REVOKED


def test_a_connection_that_ended_meanwhile_goes_no_further(pair: ConnectionPair) -> None:
    session = Elsewhere(pair)
    _, events = begin(pair, pair.request(1, token=session.token))
    pair.registry.restore(session.record)
    pair.server.end()
    assert list(events) == []
    assert pair.answers() == []


def test_where_all_is_known_nothing_is_looked_up() -> None:
    pair = ConnectionPair()
    assert pair.refused(pair.request(1, token=b"x" * 32)).code == Code.UNAUTHENTICATED


@pytest.mark.parametrize("looks_up", [False, True])
def test_while_all_are_refused_nothing_is_looked_up_and_the_connection_stays(looks_up: bool) -> None:
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


def test_no_token_is_printed(pair: ConnectionPair) -> None:
    unknown, _ = begin(pair, pair.request(1, token=b"secret" + b"x" * 26))
    assert repr(unknown) == f"TokenUnknown(code={Code.UNAUTHENTICATED!r})"
