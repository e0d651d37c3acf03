"""Sessions that are bound to a key: what they are bound to, when they count as used, and how a key ends them."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, Desk
from zcproto.errors import Code
from zcproto.sessions import OpenedSession

LAPTOP, PHONE = "device:laptop", "device:" + "é" * 100
CERTIFICATE = "tls:" + "0f" * 32


def bound(desk: Desk, key: str, user: str = "alice") -> OpenedSession:
    return desk.registry.open(user, operator=False, client="zc/1", address="192.0.2.1", wall=WALL, key=key)


@pytest.mark.parametrize("key", [LAPTOP, PHONE, CERTIFICATE])
def test_the_key_is_that_of_the_opening_also_after_a_refresh(key: str) -> None:
    desk = Desk()
    opened = bound(desk, key)
    assert opened.session.bound
    assert desk.registry.key_of(opened.session) == key
    assert desk.registry.info(opened.session.id, WALL).bound
    assert opened.refresh_token is not None
    refreshed = desk.registry.refresh(opened.refresh_token, client="", address="", wall=WALL)
    assert refreshed.session.bound
    assert desk.registry.key_of(refreshed.session) == key


def test_what_is_not_bound_or_has_ended_has_no_key() -> None:
    desk = Desk()
    free, ended = desk.open(), bound(desk, LAPTOP)
    assert desk.registry.key_of(free.session) == ""
    desk.registry.close(ended.session)
    assert desk.registry.key_of(ended.session) == ""
    other = Desk().open("bob")
    assert Desk().registry.key_of(other.session) == ""


def test_a_check_alone_does_not_keep_a_bound_session_alive() -> None:
    desk = Desk()
    opened = bound(desk, LAPTOP)
    for minute in range(0, 60, 10):
        session = desk.good(opened.token, WALL + minute * MINUTE)
        assert session.valid_until == WALL + HOUR
    assert desk.code(opened.token, WALL + HOUR) is Code.TOKEN_EXPIRED


def test_a_bound_session_counts_as_used_where_its_key_is_proved() -> None:
    desk = Desk()
    opened = bound(desk, LAPTOP)
    for minute in (30, 60, 90):
        session = desk.good(opened.token, WALL + minute * MINUTE)
        desk.registry.use(session, WALL + minute * MINUTE)
        assert session.valid_until == WALL + minute * MINUTE + HOUR
    assert desk.registry.info(opened.session.id, WALL + 90 * MINUTE).last_used_at == WALL + 90 * MINUTE
    desk.registry.use(session, WALL)  # a clock that goes back
    assert session.valid_until == WALL + 150 * MINUTE


def test_use_does_not_go_beyond_the_absolute_limit() -> None:
    desk = Desk(idle_timeout_ms=None)
    opened = bound(desk, LAPTOP)
    session = desk.good(opened.token, WALL + DAY - 1)
    desk.registry.use(session, WALL + DAY - 1)
    assert session.valid_until == WALL + DAY


def test_a_key_ends_its_users_sessions_and_no_others() -> None:
    desk = Desk()
    gone = [bound(desk, LAPTOP), bound(desk, LAPTOP)]
    stay = [bound(desk, PHONE), desk.open(), bound(desk, LAPTOP, "bob")]
    assert desk.registry.revoke_key("alice", LAPTOP, "removed") == 2
    assert desk.ended == [(each.session.id, Code.TOKEN_REVOKED, "removed") for each in gone]
    assert [desk.code(each.token) for each in gone] == [Code.TOKEN_REVOKED] * 2
    for each in stay:
        desk.good(each.token)
    assert desk.registry.revoke_key("alice", LAPTOP, "removed") == 0


def test_a_key_that_nobody_has_ends_nothing() -> None:
    desk = Desk()
    desk.open()
    assert desk.registry.revoke_key("alice", LAPTOP, "removed") == 0
    assert desk.registry.revoke_key("nobody", LAPTOP, "removed") == 0
    assert len(desk.registry) == 1


def test_a_lapsed_session_of_a_key_ends_too() -> None:
    desk = Desk()
    opened = bound(desk, LAPTOP)
    assert desk.code(opened.token, WALL + HOUR) is Code.TOKEN_EXPIRED
    assert desk.registry.revoke_key("alice", LAPTOP, "removed") == 1
    assert desk.registry.kept == 0
