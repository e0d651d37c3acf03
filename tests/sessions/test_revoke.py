"""Ending sessions by a word."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, Desk
from zcproto.errors import Code, NotFound


def test_a_revoked_token_is_dead_at_once() -> None:
    desk = Desk()
    opened, other = desk.open(), desk.open()
    generation = desk.registry.generation
    assert desk.registry.revoke(opened.session.id, user="alice", reason="lost phone")
    assert desk.registry.generation > generation
    assert desk.code(opened.token) is Code.TOKEN_REVOKED
    assert desk.good(other.token)
    assert desk.ended == [(opened.session.id, Code.TOKEN_REVOKED, "lost phone")]
    assert (len(desk.registry), desk.registry.revoked) == (1, 1)


@pytest.mark.parametrize("user", [None, "alice"])
def test_the_owner_or_the_operator_may_revoke(user: str | None) -> None:
    desk = Desk()
    assert desk.registry.revoke(desk.open().session.id, user=user, reason="test")


@pytest.mark.parametrize("user", ["bob", "", "alice ", "Alice", "nobody"])
def test_nobody_revokes_the_session_of_another(user: str) -> None:
    desk = Desk()
    opened = desk.open("alice")
    desk.open("bob")
    assert not desk.registry.revoke(opened.session.id, user=user, reason="test")
    assert desk.good(opened.token)
    assert desk.ended == []


def test_a_session_is_revoked_once() -> None:
    desk = Desk()
    session = desk.open().session
    assert desk.registry.revoke(session.id, user=None, reason="test")
    assert not desk.registry.revoke(session.id, user=None, reason="test")
    with pytest.raises(NotFound):
        desk.registry.info(session.id, WALL)
    assert (len(desk.ended), desk.registry.revoked) == (1, 1)


def test_a_lapsed_session_can_be_revoked_and_is_no_event() -> None:
    desk = Desk()
    opened = desk.open()
    desk.clean(WALL + DAY)
    desk.ended.clear()
    assert desk.registry.revoke(opened.session.id, user="alice", reason="test")
    assert desk.code(opened.token, WALL + DAY) is Code.TOKEN_REVOKED
    assert (desk.ended, desk.registry.lapsed) == ([], 0)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_all_sessions_of_a_user_end(count: int) -> None:
    desk = Desk()
    opened = [desk.open("alice") for _ in range(count)]
    other = desk.open("bob")
    assert desk.registry.revoke_user("alice", "left") == count
    assert [desk.code(each.token) for each in opened] == [Code.TOKEN_REVOKED] * count
    assert desk.ended == [(each.session.id, Code.TOKEN_REVOKED, "left") for each in opened]
    assert desk.good(other.token)
    assert desk.registry.list("alice", WALL) == []
    assert desk.registry.revoke_user("alice", "left") == 0


def test_revoking_a_user_takes_the_lapsed_sessions_too() -> None:
    desk = Desk()
    lapsed = desk.open()
    desk.open(wall=WALL + HOUR)
    desk.clean(WALL + HOUR)
    assert desk.registry.revoke_user("alice", "left") == 2
    assert desk.code(lapsed.token, WALL + HOUR) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("dead_limit", [0, 10, 10_000])
def test_all_sessions_of_all_users_end(count: int, dead_limit: int) -> None:
    desk = Desk(dead_limit=dead_limit)
    opened = [desk.open(f"user {number // 5}") for number in range(count)]
    assert desk.registry.revoke_all("key leaked") == count
    remembered = min(count, dead_limit)
    codes = [desk.code(each.token) for each in opened]
    assert codes.count(Code.TOKEN_REVOKED) == remembered
    assert codes.count(Code.UNAUTHENTICATED) == count - remembered
    assert len(desk.ended) == count
    assert (len(desk.registry), desk.registry.kept, desk.registry.revoked) == (0, 0, count)
    assert desk.strings == (0, 0, 0)
    desk.good(desk.open().token)


def test_close_ends_the_session_it_is_given() -> None:
    desk = Desk()
    opened = desk.open()
    desk.registry.close(desk.good(opened.token))
    assert desk.code(opened.token) is Code.TOKEN_REVOKED
    assert desk.ended == [(opened.session.id, Code.TOKEN_REVOKED, "closed")]


def test_closing_twice_never_ends_the_session_that_has_the_slot_now() -> None:
    desk = Desk(dead_limit=0)
    first = desk.open("alice")
    desk.registry.close(first.session)
    second = desk.open("alice")
    assert second.session.slot == first.session.slot
    desk.registry.close(first.session)
    assert desk.good(second.token)
    assert desk.registry.revoked == 1


def test_a_session_known_from_before_a_refresh_can_still_be_closed() -> None:
    desk = Desk()
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    desk.registry.close(first.session)
    assert desk.code(second.token) is Code.TOKEN_REVOKED
