"""Whose frame is it: tokens, sessions that join and leave a connection, and when they end."""

from __future__ import annotations

import pytest

from tests.helpers import WALL, ConnectionPair, small_registry
from zcproto.connection.events import Request, SessionJoined
from zcproto.connection.joined import JoinedSession
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession
from zcproto.wire.frame import NO_TOKEN, Kind
from zcproto.wire.message import MessageError, encode_body

HOUR_MS = 3_600_000


def tell(pair: ConnectionPair) -> list[tuple[str, Code, str]]:
    """Play the edge: sessions that end by themselves leave, others are told."""
    ended: list[tuple[str, Code, str]] = []

    def observer(session_id: str, code: Code, reason: str) -> None:
        ended.append((session_id, code, reason))
        if code is Code.TOKEN_EXPIRED:
            pair.server.leave(session_id, pair.clock.now())
        else:
            pair.server.session_revoked(session_id, reason, pair.clock.wall(), pair.clock.now())

    pair.registry.observers.append(observer)
    return ended


# --- which session ------------------------------------------------------------------------------------


def test_the_first_frame_of_a_session_joins_it(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    joined, request = pair.send(pair.request(1, token=opened.token))
    assert joined == SessionJoined(opened.session.id)
    assert isinstance(request, Request)
    assert request.session is not None
    assert request.session.user == "ada"
    assert list(pair.server.session_ids) == [opened.session.id]
    assert pair.get(pair.request(1, token=opened.token)).session is request.session


def test_a_session_opened_here_is_not_announced_again(pair: ConnectionPair) -> None:
    pair.login()
    assert isinstance(pair.get(pair.request(1)), Request)


def test_one_connection_may_carry_many_sessions(pair: ConnectionPair) -> None:
    sessions = [pair.open_session(f"user{n}") for n in range(5)]
    for opened in sessions:
        pair.send(pair.request(1, token=opened.token))
    assert set(pair.server.session_ids) == {opened.session.id for opened in sessions}
    for _ in range(3):
        for opened in sessions:
            request = pair.get(pair.request(1, token=opened.token))
            assert request.session is not None
            assert request.session.user == opened.session.user
            assert request.token == opened.token
            pair.respond(request)
            assert pair.answer().token == opened.token


def test_a_token_is_good_on_several_connections() -> None:
    registry = small_registry()
    first, second = (ConnectionPair(registry, salt=bytes([n] * 8)) for n in (1, 2))
    first.login()
    assert first.get(first.request(1)).session is not None
    joined, _ = second.send(second.request(1, token=first.token))
    assert isinstance(joined, SessionJoined)


def test_no_token_is_no_session_whatever_was_there_before(pair: ConnectionPair) -> None:
    pair.login()
    pair.get(pair.request(1))
    request = pair.get(pair.request(1, token=NO_TOKEN))
    assert request.session is None
    assert request.token == NO_TOKEN
    pair.respond(request)
    assert pair.answer().token == NO_TOKEN
    assert pair.get(pair.request(1)).session is not None


def test_no_token_again_and_again_asks_the_registry_nothing(pair: ConnectionPair) -> None:
    for _ in range(3):
        assert pair.get(pair.request(1, "server.info")).session is None
    assert pair.registry.checks_refused == 0


@pytest.mark.parametrize("method", ["echo", "server.info", "session.open"])
def test_an_unknown_token_is_refused_for_any_method(pair: ConnectionPair, method: str) -> None:
    answer = pair.refused(pair.request(4, method, token=b"?" * 32))
    assert (answer.stream, answer.code, answer.token) == (4, Code.UNAUTHENTICATED, b"?" * 32)
    assert list(pair.server.session_ids) == []


@pytest.mark.parametrize("bit", [0, 7, 128, 255])
def test_one_bit_off_is_an_unknown_token(pair: ConnectionPair, bit: int) -> None:
    pair.login()
    pair.get(pair.request(1))
    wrong = (int.from_bytes(pair.token, "big") ^ 1 << bit).to_bytes(32, "big")
    assert pair.refused(pair.request(1, token=wrong)).code == Code.UNAUTHENTICATED


def test_a_refused_token_changes_nothing_for_the_next_frame(pair: ConnectionPair) -> None:
    pair.login()
    for token in (b"?" * 32, b"!" * 32, b"?" * 32):
        assert pair.refused(pair.request(1, token=token)).code == Code.UNAUTHENTICATED
        assert pair.get(pair.request(1)).session is not None
        assert pair.refused(pair.request(1, token=token)).code == Code.UNAUTHENTICATED
        assert pair.get(pair.request(1, "server.info", token=NO_TOKEN)).session is None


def test_ping_and_pong_are_not_asked_for_a_token(pair: ConnectionPair) -> None:
    assert pair.send(pair.ping(token=b"?" * 32)) == []
    answer = pair.answer()
    assert answer.kind is Kind.PONG
    assert answer.token == b"?" * 32
    assert pair.registry.checks_refused == 0


# --- tokens that were good ----------------------------------------------------------------------------


def revoke(pair: ConnectionPair, opened: OpenedSession) -> None:
    pair.registry.revoke(opened.session.id, user=None, reason="revoked by its user")


def test_a_revoked_token_is_refused_from_the_next_frame_on(pair: ConnectionPair) -> None:
    opened = pair.login()
    pair.get(pair.request(1))
    revoke(pair, opened)
    for _ in range(3):
        assert pair.refused(pair.request(1)).code == Code.TOKEN_REVOKED


@pytest.mark.requirement("expiration")
def test_a_token_past_its_absolute_limit_is_expired_to_the_millisecond() -> None:
    pair = ConnectionPair(small_registry(lifetime_ms=HOUR_MS, idle_timeout_ms=None))
    opened = pair.login()
    pair.clock.advance(3_599.999)
    pair.get(pair.request(1))
    pair.clock.advance(0.001)
    assert pair.clock.wall() == opened.session.expires_at
    assert pair.refused(pair.request(1)).code == Code.TOKEN_EXPIRED


@pytest.mark.requirement("expiration")
def test_a_token_unused_for_too_long_is_expired_to_the_millisecond() -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=60_000))
    pair.login()
    for _ in range(5):
        pair.clock.advance(59.999)
        pair.get(pair.request(1))
    pair.clock.advance(60)
    assert pair.refused(pair.request(1)).code == Code.TOKEN_EXPIRED


def test_frequent_use_counts_as_use_though_it_is_not_always_written() -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=5_000))
    pair.login()
    for _ in range(100):
        pair.clock.advance(0.4)
        pair.get(pair.request(1))
    pair.clock.advance(3.999)  # what was used last may be noted up to a second early
    pair.get(pair.request(1))


@pytest.mark.parametrize("every_ms", [1, 250, 499])
def test_with_the_shortest_idle_limit_a_session_in_use_goes_on(every_ms: int) -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=1_000))
    pair.login()
    for _ in range(12):
        pair.clock.advance(every_ms / 1_000)
        pair.get(pair.request(1))
    for _ in range(12):
        pair.clock.advance(0.499)
        pair.get(pair.request(1))
    pair.clock.advance(1)
    assert pair.refused(pair.request(1)).code == Code.TOKEN_EXPIRED


def test_the_last_use_is_written_once_a_second_at_most() -> None:
    pair = ConnectionPair()
    opened = pair.login()
    used = []
    for _ in range(25):
        pair.get(pair.request(1))
        used.append(pair.registry.info(opened.session.id, pair.clock.wall()).last_used_at - WALL)
        pair.clock.advance(0.1)
    assert sorted(set(used)) == [0, 1_000, 2_000]


def test_a_replaced_session_is_told_apart() -> None:
    pair = ConnectionPair(small_registry(per_user=1, when_full="evict_oldest"))
    pair.login()
    pair.get(pair.request(1))
    pair.open_session()
    assert pair.refused(pair.request(1)).code == Code.SESSION_REPLACED


def test_a_refreshed_session_has_a_new_token_and_the_old_is_dead(pair: ConnectionPair) -> None:
    opened = pair.login()
    assert opened.refresh_token is not None
    pair.get(pair.request(1))
    again = pair.registry.refresh(
        opened.refresh_token, client="test/1", address="192.0.2.7", wall=pair.clock.wall()
    )
    assert pair.refused(pair.request(1)).code == Code.TOKEN_REVOKED
    joined, request = pair.send(pair.request(1, token=again.token))
    assert joined == SessionJoined(opened.session.id)
    assert isinstance(request, Request)
    assert list(pair.server.session_ids) == [opened.session.id]


def test_a_token_that_was_refused_may_be_good_later(pair: ConnectionPair) -> None:
    """As after a login elsewhere: nothing is remembered of a token that is not known."""
    opened = ConnectionPair(small_registry()).login()
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.UNAUTHENTICATED
    assert pair.open_session().token == opened.token
    assert isinstance(pair.send(pair.request(1, token=opened.token))[0], SessionJoined)


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED])
def test_refusals_say_what_to_do_and_nothing_of_the_token(pair: ConnectionPair, code: Code) -> None:
    opened = pair.login()
    if code is Code.TOKEN_REVOKED:
        revoke(pair, opened)
    elif code is Code.TOKEN_EXPIRED:
        pair.clock.advance(30 * 3_600)
    else:
        pair.token = b"secret-secret-secret-secret-32.."
    answer = pair.refused(pair.request(1))
    assert answer.code == code
    assert answer.error.details == {}
    assert "session" in answer.error.message
    assert pair.token.hex() not in answer.body.hex()


# --- within one read ----------------------------------------------------------------------------------


def test_a_session_closed_by_one_request_is_dead_for_the_next_of_the_same_read(pair: ConnectionPair) -> None:
    opened = pair.login()
    tell(pair)
    data = pair.request(1, "session.close") + pair.request(2) + pair.request(3)
    events = pair.receive_data(data)
    first = next(events)
    assert isinstance(first, Request)
    assert first.session is not None
    pair.registry.close(first.session)
    pair.respond(first)
    assert list(events) == []
    kinds = [(answer.kind, answer.stream) for answer in pair.answers() if answer.kind is not Kind.EVENT]
    assert kinds == [(Kind.RESPONSE, 1), (Kind.ERROR, 2), (Kind.ERROR, 3)]
    assert list(pair.server.session_ids) == []
    assert pair.refused(pair.request(4, token=opened.token)).code == Code.TOKEN_REVOKED


def test_a_session_opened_by_one_request_is_good_for_the_next_of_the_same_read(pair: ConnectionPair) -> None:
    token = ConnectionPair(small_registry()).open_session().token  # what the registry will give out
    large = {"text": "x" * 20_000}
    data = pair.request(1, "session.open", token=NO_TOKEN) + pair.request(2, params=large, token=token)
    events = pair.receive_data(data)
    first = next(events)
    assert isinstance(first, Request)
    assert pair.login().token == token
    pair.respond(first)
    (second,) = events
    assert isinstance(second, Request)
    assert second.params == large


def test_a_session_that_ends_while_its_joining_is_told_is_refused(pair: ConnectionPair) -> None:
    """The edge may stop at any event for as long as the peer does not read."""
    opened = pair.open_session()
    tell(pair)
    data = pair.request(1, token=opened.token) + pair.request(2, token=opened.token)
    events = pair.receive_data(data)
    assert next(events) == SessionJoined(opened.session.id)
    revoke(pair, opened)
    assert list(events) == []
    revoked, *refusals = pair.answers()
    assert revoked.event[0] == "session.revoked"
    assert [answer.code for answer in refusals] == [Code.TOKEN_REVOKED] * 2
    assert list(pair.server.session_ids) == []


def test_another_session_that_ends_then_changes_nothing(pair: ConnectionPair) -> None:
    opened, other = pair.open_session(), pair.open_session("ben")
    events = pair.receive_data(pair.request(1, token=opened.token))
    next(events)
    revoke(pair, other)
    (request,) = events
    assert isinstance(request, Request)


def test_a_connection_ended_by_one_request_takes_no_other_of_the_same_read(pair: ConnectionPair) -> None:
    data = pair.request(1, "server.info") + pair.request(2, "server.info")
    events = pair.receive_data(data)
    next(events)
    pair.server.end()
    assert list(events) == []
    assert pair.answers() == []


# --- what is told ---------------------------------------------------------------------------------------


def test_a_revocation_is_told_with_the_sessions_token(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    ended = tell(pair)
    revoke(pair, first)
    answer = pair.answer()
    assert answer.event == ("session.revoked", {"reason": "revoked by its user"})
    assert (answer.stream, answer.token) == (0, first.token)
    assert ended == [(first.session.id, Code.TOKEN_REVOKED, "revoked by its user")]
    assert list(pair.server.session_ids) == [second.session.id]
    pair.get(pair.request(1, token=second.token))


def test_a_session_that_was_not_used_here_is_none_of_this_connections_business(pair: ConnectionPair) -> None:
    pair.login()
    other = pair.open_session("ben")
    pair.server.session_revoked(other.session.id, "x", pair.clock.wall(), pair.clock.now())
    assert not pair.server.send_event(other.session.id, "pins.next", {}, pair.clock.wall())
    pair.server.leave(other.session.id, pair.clock.now())
    assert pair.answers() == []
    assert len(list(pair.server.session_ids)) == 1


def test_an_event_speaks_of_a_session_that_was_used_here(pair: ConnectionPair) -> None:
    opened = pair.login()
    assert pair.server.send_event(opened.session.id, "pins.next", {"from": 1}, pair.clock.wall())
    answer = pair.answer()
    assert answer.event == ("pins.next", {"from": 1})
    assert (answer.stream, answer.token) == (0, opened.token)


def test_an_event_that_no_frame_can_carry_is_a_fault_of_ours() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(max_frame=500, max_frame_before_session=200))
    opened = pair.login()
    room = pair.settings.max_body - len(encode_body(["pins.next", b""])) - 1
    assert pair.server.send_event(opened.session.id, "pins.next", bytes(room), WALL)
    assert len(pair.answer().body) == pair.settings.max_body
    with pytest.raises(MessageError):
        pair.server.send_event(opened.session.id, "pins.next", bytes(room + 1), WALL)
    assert pair.answers() == []


def test_after_the_end_no_event_is_sent(pair: ConnectionPair) -> None:
    opened = pair.login()
    pair.server.end()
    assert not pair.server.send_event(opened.session.id, "pins.next", {}, pair.clock.wall())
    pair.server.session_revoked(opened.session.id, "x", pair.clock.wall(), pair.clock.now())
    assert pair.answers() == []
    assert list(pair.server.session_ids) == []


def test_no_token_shows_in_what_is_printed(pair: ConnectionPair) -> None:
    opened = pair.login()
    request = pair.get(pair.request(1, params={"password": "hunter2"}))
    shown = [repr(pair.server), repr(request), repr(SessionJoined(opened.session.id))]
    shown.append(repr(JoinedSession(opened.token, 1, 2.0)))
    shown += [repr(joined) for joined in pair.server._sessions.values()]
    text = "".join(shown)
    assert opened.token.hex() not in text
    assert repr(opened.token)[2:-1] not in text
    assert "hunter2" not in text
    assert "JoinedSession(expires_at=1)" in text


def test_a_connection_keeps_nothing_but_its_slots() -> None:
    assert not hasattr(ConnectionPair().server, "__dict__")
    assert "__dict__" not in dir(ServerConnection)
