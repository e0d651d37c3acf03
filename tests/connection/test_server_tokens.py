"""Test tokens of a server connection: sessions that join, leave, expire, and are revoked."""

from __future__ import annotations

import gc
import sys

import pytest

from tests.connection.helpers import count_checks
from tests.helpers import WALL, ConnectionPair, small_registry
from zcproto.connection.events import Request, ServerEvent, SessionJoined
from zcproto.connection.server import JoinedSession, ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, SessionSettings
from zcproto.wire.frame import NO_TOKEN, Kind
from zcproto.wire.message import MessageError, encode_body

HOUR_MS = 3_600_000


def notify_connection(pair: ConnectionPair) -> list[tuple[str, Code, str]]:
    """Act as the edge: expired sessions leave the connection, others send `session.revoked`."""
    ended: list[tuple[str, Code, str]] = []

    def observer(session_id: str, code: Code, reason: str) -> None:
        ended.append((session_id, code, reason))
        if code is Code.TOKEN_EXPIRED:
            pair.server.leave(session_id, pair.clock.now())
        else:
            pair.server.session_revoked(session_id, reason, pair.clock.wall(), pair.clock.now())

    pair.registry.observers.append(observer)
    return ended


# --- sessions of a connection -------------------------------------------------------------------------


def test_first_frame_of_session_joins_connection(pair: ConnectionPair) -> None:
    opened = pair.open_session()
    joined, request = pair.send(pair.request(1, token=opened.token))
    assert joined == SessionJoined(opened.session.id)
    assert isinstance(request, Request)
    assert request.session.user == "ada"
    assert list(pair.server.sessions) == [opened.session.id]
    assert pair.get(pair.request(1, token=opened.token)).session is request.session


def test_session_opened_on_this_connection_is_not_announced(pair: ConnectionPair) -> None:
    pair.login()
    assert isinstance(pair.get(pair.request(1)), Request)


def test_connection_can_carry_many_sessions(pair: ConnectionPair) -> None:
    sessions = [pair.open_session(f"user{n}") for n in range(5)]
    for opened in sessions:
        pair.send(pair.request(1, token=opened.token))
    assert set(pair.server.sessions) == {opened.session.id for opened in sessions}
    for _ in range(3):
        for opened in sessions:
            request = pair.get(pair.request(1, token=opened.token))
            assert request.session.user == opened.session.user
            assert request.token == opened.token
            pair.respond(request)
            assert pair.answer().token == opened.token


# --- several tokens in turn ------------------------------------------------------------------------------


def log_in_several(pair: ConnectionPair, users: int = 3) -> list[OpenedSession]:
    """Return sessions that have been used on this connection."""
    sessions = [pair.open_session(f"user{number}") for number in range(users)]
    for each in sessions:
        pair.send(pair.request(1, token=each.token))
    return sessions


def users_of(events: list[ServerEvent | Request]) -> list[str]:
    return [each.session.user for each in events if isinstance(each, Request) and each.session is not None]


@pytest.mark.parametrize("in_one_read", [False, True])
def test_tokens_in_turn_are_looked_up_once(pair: ConnectionPair, in_one_read: bool) -> None:
    sessions = log_in_several(pair)
    checks = count_checks(pair.registry)
    frames = [pair.request(number, token=each.token) for each in sessions for number in (1, 2)]
    events = pair.send(b"".join(frames)) if in_one_read else [pair.get(frame) for frame in frames]
    assert users_of(events) == ["user0", "user0", "user1", "user1", "user2", "user2"]
    assert checks == ([], [])


def test_token_is_not_looked_up_after_another_session_was_opened_here(pair: ConnectionPair) -> None:
    first = pair.login()
    pair.get(pair.request(1))
    pair.login("eve")
    checks = count_checks(pair.registry)
    assert users_of([pair.get(pair.request(1, token=first.token))]) == ["ada"]
    assert checks == ([], [])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_end_of_one_session_leaves_the_others_accepted(pair: ConnectionPair, which: int) -> None:
    sessions = log_in_several(pair)
    pair.registry.close(sessions[which].session)
    looked_up, again = count_checks(pair.registry)
    left = [each for each in sessions if each is not sessions[which]]
    assert users_of([pair.get(pair.request(1, token=each.token)) for each in left]) == [
        each.session.user for each in left
    ]
    for _ in range(2):
        assert len([pair.get(pair.request(1, token=each.token)) for each in left]) == 2
    assert (looked_up, again) == ([], [each.session.user for each in left])
    for _ in range(2):
        assert pair.refused(pair.request(1, token=sessions[which].token)).code == Code.TOKEN_REVOKED
        assert users_of([pair.get(pair.request(1, token=left[0].token))]) == [left[0].session.user]
    assert looked_up == [sessions[which].token] * 2


def test_end_of_a_session_elsewhere_costs_no_look_up(pair: ConnectionPair) -> None:
    pair.login()
    pair.get(pair.request(1))
    checks = count_checks(pair.registry)
    for _ in range(3):
        pair.registry.close(pair.open_session("eve").session)
        assert users_of([pair.get(pair.request(1)), pair.get(pair.request(1))]) == ["ada", "ada"]
        assert pair.get(pair.request(1, token=NO_TOKEN)).session is None
    assert checks == ([], ["ada"] * 3)


@pytest.mark.parametrize("how", ["refuse_all", "distrust"])
def test_no_earlier_token_is_accepted_while_all_are_refused(pair: ConnectionPair, how: str) -> None:
    sessions = log_in_several(pair)
    getattr(pair.registry, how)()
    for each in sessions * 2:
        assert pair.refused(pair.request(1, token=each.token)).code == Code.UNAVAILABLE
    pair.registry.stop_refusing()
    pair.registry.trusted_until = 2**62
    events = [pair.get(pair.request(1, token=each.token)) for each in sessions]
    assert users_of(events) == ["user0", "user1", "user2"]


@pytest.mark.parametrize("in_turn", [False, True])
def test_tokens_checked_again_are_trusted_no_longer_than_others(pair: ConnectionPair, in_turn: bool) -> None:
    sessions = log_in_several(pair, 2)[in_turn - 1 :]
    pair.registry.distrust()
    pair.registry.trusted_until = pair.clock.wall() + 100
    for each in sessions:
        pair.get(pair.request(1, token=each.token))
    pair.clock.advance(0.1)
    for each in sessions:
        assert pair.refused(pair.request(1, token=each.token)).code == Code.UNAVAILABLE


def test_earlier_token_is_refused_after_a_refresh(pair: ConnectionPair) -> None:
    pair = ConnectionPair(small_registry(refresh=True))
    first, second = log_in_several(pair, 2)
    refreshed = pair.registry.refresh(
        first.refresh_token or b"", client="test/1", address="192.0.2.7", wall=pair.clock.wall()
    )
    assert pair.refused(pair.request(1, token=first.token)).code == Code.TOKEN_REVOKED
    pair.get(pair.request(1, token=second.token))
    pair.use(refreshed)
    assert users_of([pair.get(pair.request(1, token=refreshed.token))]) == ["user0"]
    assert users_of([pair.get(pair.request(1, token=second.token))]) == ["user1"]
    assert pair.refused(pair.request(1, token=first.token)).code == Code.TOKEN_REVOKED


def test_earlier_token_of_a_session_that_left_joins_again(pair: ConnectionPair) -> None:
    first, _ = log_in_several(pair, 2)
    pair.registry.close(pair.open_session("eve").session)
    pair.server.leave(first.session.id, pair.clock.now())
    joined, _ = pair.send(pair.request(1, token=first.token))
    assert joined == SessionJoined(first.session.id)


def test_earlier_tokens_expire_to_the_millisecond() -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=10_000))
    first, second = log_in_several(pair, 2)
    for _ in range(4):
        pair.clock.advance(9.0)
        assert users_of([pair.get(pair.request(1, token=second.token))]) == ["user1"]
        assert users_of([pair.get(pair.request(1, token=first.token))]) == ["user0"]
    pair.clock.advance(9.999)
    assert users_of([pair.get(pair.request(1, token=second.token))]) == ["user1"]
    pair.clock.advance(0.001)
    (request,) = pair.send(pair.request(1, token=second.token) + pair.request(2, token=first.token))
    assert users_of([request]) == ["user1"]
    assert pair.answer().code == Code.TOKEN_EXPIRED


@pytest.mark.parametrize("in_turn", [False, True])
def test_shorter_idle_limit_applies_to_tokens_accepted_before(in_turn: bool) -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=60_000))
    first, second = log_in_several(pair, 2)
    pair.registry.reconfigure(
        SessionSettings(max_sessions=64, dead_limit=64, grace_limit=16, idle_timeout_ms=5_000)
    )
    for _ in range(3):
        pair.clock.advance(4.0)
        if in_turn:
            assert users_of([pair.get(pair.request(1, token=first.token))]) == ["user0"]
        assert users_of([pair.get(pair.request(1, token=second.token))]) == ["user1"]
    pair.clock.advance(5.0)
    assert pair.refused(pair.request(1, token=first.token)).code == Code.TOKEN_EXPIRED
    assert pair.refused(pair.request(1, token=second.token)).code == Code.TOKEN_EXPIRED


def test_refused_frame_does_not_count_as_use_of_an_earlier_token(pair: ConnectionPair) -> None:
    first, _ = log_in_several(pair, 2)
    pair.clock.advance(100.0)
    pair.refused(pair.request(1, token=first.token, timestamp=WALL))
    assert pair.registry.info(first.session.id, pair.clock.wall()).last_used_at == WALL


@pytest.mark.parametrize("cycle", ["closed", "refreshed", "refreshed-among-others"])
def test_dead_tokens_of_ten_thousand_cycles_leave_nothing(cycle: str) -> None:
    """Each cycle kept a token with its rules, about 1,000 bytes."""
    pair = ConnectionPair(small_registry(refresh=True))
    ended = notify_connection(pair)
    opened = pair.login("eve")
    other = pair.login("bob")

    def run(cycles: int) -> None:
        nonlocal opened
        for _ in range(cycles):
            pair.clock.advance(0.001)
            if cycle == "refreshed-among-others":
                pair.get(pair.request(1, token=other.token))
            if cycle == "closed":
                pair.registry.close(opened.session)
                opened = pair.open_session("eve")
            else:
                opened = pair.registry.refresh(
                    opened.refresh_token or b"", client="test/1", address="192.0.2.7", wall=pair.clock.wall()
                )
            if cycle == "closed":
                pair.get(pair.request(1, token=NO_TOKEN))  # session.open
            pair.use(opened)
            pair.get(pair.request(1))
            pair.answers()
            ended.clear()

    run(200)  # the tables have their size
    gc.collect()
    before = sys.getallocatedblocks()
    run(10_000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 1_000
    assert users_of([pair.get(pair.request(1)), pair.get(pair.request(1, token=other.token))]) == [
        "eve",
        "bob",
    ]


def test_connection_of_one_session_keeps_no_other_tokens(pair: ConnectionPair) -> None:
    pair.get(pair.request(1, token=NO_TOKEN))
    pair.token = pair.open_session().token
    pair.send(pair.request(1))
    pair.registry.refuse_all()
    pair.refused(pair.request(1))
    pair.registry.stop_refusing()
    pair.get(pair.request(1))
    assert pair.server.tokens._all is None


def test_frames_are_limited_again_without_a_session(pair: ConnectionPair) -> None:
    opened = pair.login()
    large = pair.request(1, params={"data": bytes(20_000)})
    assert len([pair.send(large[:100]), pair.get(large[100:])]) == 2
    pair.registry.close(opened.session)
    pair.server.leave(opened.session.id, pair.clock.now())
    assert pair.fatal(pair.request(1, params={"data": bytes(20_000)})).code == Code.FRAME_TOO_LARGE


def test_token_is_valid_on_several_connections() -> None:
    registry = small_registry()
    first, second = (ConnectionPair(registry, salt=bytes([n] * 8)) for n in (1, 2))
    first.login()
    assert first.get(first.request(1)).session is not None
    joined, _ = second.send(second.request(1, token=first.token))
    assert isinstance(joined, SessionJoined)


def test_request_without_token_has_no_session_after_login(pair: ConnectionPair) -> None:
    pair.login()
    pair.get(pair.request(1))
    request = pair.get(pair.request(1, token=NO_TOKEN))
    assert request.session is None
    assert request.token == NO_TOKEN
    pair.respond(request)
    assert pair.answer().token == NO_TOKEN
    assert pair.get(pair.request(1)).session is not None


def test_requests_without_token_are_not_looked_up_in_registry(pair: ConnectionPair) -> None:
    for _ in range(3):
        assert pair.get(pair.request(1, "server.info")).session is None
    assert pair.registry.checks_refused == 0


@pytest.mark.parametrize("method", ["echo", "server.info", "session.open"])
def test_unknown_token_is_refused_for_any_method(pair: ConnectionPair, method: str) -> None:
    answer = pair.refused(pair.request(4, method, token=b"?" * 32))
    assert (answer.stream, answer.code, answer.token) == (4, Code.UNAUTHENTICATED, b"?" * 32)
    assert list(pair.server.sessions) == []


@pytest.mark.parametrize("bit", [0, 7, 128, 255])
def test_token_with_one_bit_changed_is_refused(pair: ConnectionPair, bit: int) -> None:
    pair.login()
    pair.get(pair.request(1))
    wrong = (int.from_bytes(pair.token, "big") ^ 1 << bit).to_bytes(32, "big")
    assert pair.refused(pair.request(1, token=wrong)).code == Code.UNAUTHENTICATED


def test_refused_token_does_not_affect_next_frame(pair: ConnectionPair) -> None:
    pair.login()
    for token in (b"?" * 32, b"!" * 32, b"?" * 32):
        assert pair.refused(pair.request(1, token=token)).code == Code.UNAUTHENTICATED
        assert pair.get(pair.request(1)).session is not None
        assert pair.refused(pair.request(1, token=token)).code == Code.UNAUTHENTICATED
        assert pair.get(pair.request(1, "server.info", token=NO_TOKEN)).session is None


def test_token_of_ping_is_not_checked(pair: ConnectionPair) -> None:
    assert pair.send(pair.ping(token=b"?" * 32)) == []
    answer = pair.answer()
    assert answer.kind is Kind.PONG
    assert answer.token == b"?" * 32
    assert pair.registry.checks_refused == 0


# --- ended tokens -------------------------------------------------------------------------------------


def revoke(pair: ConnectionPair, opened: OpenedSession) -> None:
    pair.registry.revoke(opened.session.id, user=None, reason="revoked by its user")


def test_revoked_token_is_refused_from_next_frame(pair: ConnectionPair) -> None:
    opened = pair.login()
    pair.get(pair.request(1))
    revoke(pair, opened)
    for _ in range(3):
        assert pair.refused(pair.request(1)).code == Code.TOKEN_REVOKED


@pytest.mark.requirement("expiration")
def test_token_expires_at_absolute_limit_to_the_millisecond() -> None:
    pair = ConnectionPair(small_registry(lifetime_ms=HOUR_MS, idle_timeout_ms=None))
    opened = pair.login()
    pair.clock.advance(3_599.999)
    pair.get(pair.request(1))
    pair.clock.advance(0.001)
    assert pair.clock.wall() == opened.session.expires_at
    assert pair.refused(pair.request(1)).code == Code.TOKEN_EXPIRED


@pytest.mark.requirement("expiration")
def test_unused_token_expires_at_idle_limit_to_the_millisecond() -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=60_000))
    pair.login()
    for _ in range(5):
        pair.clock.advance(59.999)
        pair.get(pair.request(1))
    pair.clock.advance(60)
    assert pair.refused(pair.request(1)).code == Code.TOKEN_EXPIRED


def test_frequent_use_keeps_session_alive() -> None:
    pair = ConnectionPair(small_registry(idle_timeout_ms=5_000))
    pair.login()
    for _ in range(100):
        pair.clock.advance(0.4)
        pair.get(pair.request(1))
    pair.clock.advance(3.999)  # the recorded last use may be up to a second early
    pair.get(pair.request(1))


@pytest.mark.parametrize("every_ms", [1, 250, 499])
def test_session_in_use_stays_alive_with_shortest_idle_limit(every_ms: int) -> None:
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


@pytest.mark.parametrize("frames", [1, 2])
def test_last_use_of_a_valid_token_is_recorded_without_a_check(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ConnectionPair()
    opened = pair.login()
    pair.get(pair.request(1))
    checked: list[bytes] = []
    monkeypatch.setattr(type(pair.registry), "check", lambda registry, token, wall: checked.append(token))
    for _ in range(5):
        pair.clock.advance(1.5)
        assert len(pair.send(b"".join(pair.request(n + 1) for n in range(frames)))) == frames
        assert pair.registry.info(opened.session.id, pair.clock.wall()).last_used_at == pair.clock.wall()
    assert checked == []


def test_last_use_is_recorded_at_most_once_per_second() -> None:
    pair = ConnectionPair()
    opened = pair.login()
    used = []
    for _ in range(25):
        pair.get(pair.request(1))
        used.append(pair.registry.info(opened.session.id, pair.clock.wall()).last_used_at - WALL)
        pair.clock.advance(0.1)
    assert sorted(set(used)) == [0, 1_000, 2_000]


def test_evicted_session_is_refused_as_replaced() -> None:
    pair = ConnectionPair(small_registry(per_user=1, when_full="evict_oldest"))
    pair.login()
    pair.get(pair.request(1))
    pair.open_session()
    assert pair.refused(pair.request(1)).code == Code.SESSION_REPLACED


def test_refresh_gives_new_token_and_revokes_old_one(pair: ConnectionPair) -> None:
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
    assert list(pair.server.sessions) == [opened.session.id]


def test_refused_token_is_not_remembered(pair: ConnectionPair) -> None:
    """A token can become valid later, for example after a login at another server."""
    opened = ConnectionPair(small_registry()).login()
    assert pair.refused(pair.request(1, token=opened.token)).code == Code.UNAUTHENTICATED
    assert pair.open_session().token == opened.token
    assert isinstance(pair.send(pair.request(1, token=opened.token))[0], SessionJoined)


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED])
def test_refusals_contain_no_token(pair: ConnectionPair, code: Code) -> None:
    opened = pair.login()
    if code is Code.TOKEN_REVOKED:
        revoke(pair, opened)
    elif code is Code.TOKEN_EXPIRED:
        pair.clock.advance(30 * 3_600)
    else:
        pair.token = b"secret-secret-secret-secret-32.."
    answer = pair.refused(pair.request(1))
    assert answer.code == code
    assert answer.error.details == ({"reason": "unknown_token"} if code is Code.UNAUTHENTICATED else {})
    assert "session" in answer.error.message
    assert pair.token.hex() not in answer.body.hex()


# --- within one read ----------------------------------------------------------------------------------


def test_session_closed_by_request_refuses_next_request_of_same_read(pair: ConnectionPair) -> None:
    opened = pair.login()
    notify_connection(pair)
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
    assert list(pair.server.sessions) == []
    assert pair.refused(pair.request(4, token=opened.token)).code == Code.TOKEN_REVOKED


def test_session_opened_by_request_is_valid_for_next_request_of_same_read(pair: ConnectionPair) -> None:
    token = ConnectionPair(small_registry()).open_session().token  # the next token of the registry
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


def test_session_revoked_while_joining_is_refused(pair: ConnectionPair) -> None:
    """The edge may pause at any event while the peer does not read."""
    opened = pair.open_session()
    notify_connection(pair)
    data = pair.request(1, token=opened.token) + pair.request(2, token=opened.token)
    events = pair.receive_data(data)
    assert next(events) == SessionJoined(opened.session.id)
    revoke(pair, opened)
    assert list(events) == []
    revoked, *refusals = pair.answers()
    assert revoked.event[0] == "session.revoked"
    assert [answer.code for answer in refusals] == [Code.TOKEN_REVOKED] * 2
    assert list(pair.server.sessions) == []


def test_revoking_another_session_while_joining_has_no_effect(pair: ConnectionPair) -> None:
    opened, other = pair.open_session(), pair.open_session("ben")
    events = pair.receive_data(pair.request(1, token=opened.token))
    next(events)
    revoke(pair, other)
    (request,) = events
    assert isinstance(request, Request)


def test_connection_closed_by_request_ignores_rest_of_same_read(pair: ConnectionPair) -> None:
    data = pair.request(1, "server.info") + pair.request(2, "server.info")
    events = pair.receive_data(data)
    next(events)
    pair.server.end()
    assert list(events) == []
    assert pair.answers() == []


# --- events ---------------------------------------------------------------------------------------------


def test_session_revoked_event_has_token_of_its_session(pair: ConnectionPair) -> None:
    first, second = pair.login("ada"), pair.login("ben")
    ended = notify_connection(pair)
    revoke(pair, first)
    answer = pair.answer()
    assert answer.event == ("session.revoked", {"reason": "revoked by its user"})
    assert (answer.stream, answer.token) == (0, first.token)
    assert ended == [(first.session.id, Code.TOKEN_REVOKED, "revoked by its user")]
    assert list(pair.server.sessions) == [second.session.id]
    pair.get(pair.request(1, token=second.token))


def test_events_of_sessions_not_joined_are_not_sent(pair: ConnectionPair) -> None:
    pair.login()
    other = pair.open_session("ben")
    pair.server.session_revoked(other.session.id, "x", pair.clock.wall(), pair.clock.now())
    assert not pair.server.send_event(other.session.id, "pins.next", {}, pair.clock.wall())
    pair.server.leave(other.session.id, pair.clock.now())
    assert pair.answers() == []
    assert len(list(pair.server.sessions)) == 1


def test_event_has_token_of_joined_session(pair: ConnectionPair) -> None:
    opened = pair.login()
    assert pair.server.send_event(opened.session.id, "pins.next", {"from": 1}, pair.clock.wall())
    answer = pair.answer()
    assert answer.event == ("pins.next", {"from": 1})
    assert (answer.stream, answer.token) == (0, opened.token)


def test_oversized_event_raises() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(max_frame=500, max_frame_before_session=200))
    opened = pair.login()
    room = pair.settings.max_body - len(encode_body(["pins.next", b""])) - 1
    assert pair.server.send_event(opened.session.id, "pins.next", bytes(room), WALL)
    assert len(pair.answer().body) == pair.settings.max_body
    with pytest.raises(MessageError):
        pair.server.send_event(opened.session.id, "pins.next", bytes(room + 1), WALL)
    assert pair.answers() == []


def test_closed_connection_sends_no_event(pair: ConnectionPair) -> None:
    opened = pair.login()
    pair.server.end()
    assert not pair.server.send_event(opened.session.id, "pins.next", {}, pair.clock.wall())
    pair.server.session_revoked(opened.session.id, "x", pair.clock.wall(), pair.clock.now())
    assert pair.answers() == []
    assert list(pair.server.sessions) == []


def test_repr_hides_token_and_params(pair: ConnectionPair) -> None:
    opened = pair.login()
    request = pair.get(pair.request(1, params={"password": "hunter2"}))
    shown = [repr(pair.server), repr(request), repr(SessionJoined(opened.session.id))]
    shown.append(repr(JoinedSession(opened.token, "ada", 1, 2.0, 3)))
    text = "".join(shown)
    assert opened.token.hex() not in text
    assert repr(opened.token)[2:-1] not in text
    assert "hunter2" not in text
    assert "JoinedSession(expires_at=1)" in text


def test_connection_has_no_instance_dict() -> None:
    assert not hasattr(ConnectionPair().server, "__dict__")
    assert "__dict__" not in dir(ServerConnection)
