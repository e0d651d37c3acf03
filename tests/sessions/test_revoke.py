"""Test revocation of sessions."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, RegistryHarness
from zcproto.errors import Code, NotFound
from zcproto.sessions import OpenedSession


def test_revoked_token_is_refused_at_once(harness: RegistryHarness) -> None:
    opened, other = harness.open(), harness.open()
    generation = harness.registry.generation
    assert harness.registry.revoke(opened.session.id, user="alice", reason="lost phone")
    assert harness.registry.generation > generation
    assert harness.code(opened.token) is Code.TOKEN_REVOKED
    assert harness.good(other.token)
    assert harness.ended == [(opened.session.id, Code.TOKEN_REVOKED, "lost phone")]
    assert (len(harness.registry), harness.registry.revoked) == (1, 1)


@pytest.mark.parametrize("user", [None, "alice"])
def test_owner_or_operator_can_revoke(harness: RegistryHarness, user: str | None) -> None:
    assert harness.registry.revoke(harness.open().session.id, user=user, reason="test")


@pytest.mark.parametrize("user", ["bob", "", "alice ", "Alice", "mallory"])
def test_user_cannot_revoke_session_of_another(harness: RegistryHarness, user: str) -> None:
    opened = harness.open("alice")
    harness.open("bob")
    assert not harness.registry.revoke(opened.session.id, user=user, reason="test")
    assert harness.good(opened.token)
    assert harness.ended == []


def test_second_revocation_returns_false(harness: RegistryHarness) -> None:
    session = harness.open().session
    assert harness.registry.revoke(session.id, user=None, reason="test")
    assert not harness.registry.revoke(session.id, user=None, reason="test")
    with pytest.raises(NotFound):
        harness.registry.info(session.id, WALL)
    assert (len(harness.ended), harness.registry.revoked) == (1, 1)


def test_revoking_lapsed_session_is_silent(harness: RegistryHarness, opened: OpenedSession) -> None:
    harness.clean(WALL + DAY)
    harness.ended.clear()
    assert harness.registry.revoke(opened.session.id, user="alice", reason="test")
    assert harness.code(opened.token, WALL + DAY) is Code.TOKEN_REVOKED
    assert (harness.ended, harness.registry.lapsed) == ([], 0)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_revoke_user_ends_all_sessions_of_user(harness: RegistryHarness, count: int) -> None:
    opened = [harness.open("alice") for _ in range(count)]
    other = harness.open("bob")
    assert harness.registry.revoke_user("alice", "left") == count
    assert [harness.code(each.token) for each in opened] == [Code.TOKEN_REVOKED] * count
    assert harness.ended == [(each.session.id, Code.TOKEN_REVOKED, "left") for each in opened]
    assert harness.good(other.token)
    assert harness.registry.list("alice", WALL) == []
    assert harness.registry.revoke_user("alice", "left") == 0


def test_revoke_user_ends_lapsed_sessions(harness: RegistryHarness) -> None:
    lapsed = harness.open()
    harness.open(wall=WALL + HOUR)
    harness.clean(WALL + HOUR)
    assert harness.registry.revoke_user("alice", "left") == 2
    assert harness.code(lapsed.token, WALL + HOUR) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("dead_limit", [0, 10, 10_000])
def test_revoke_all_ends_all_sessions(count: int, dead_limit: int) -> None:
    harness = RegistryHarness(dead_limit=dead_limit)
    opened = [harness.open(f"user {number // 5}") for number in range(count)]
    assert harness.registry.revoke_all("key leaked") == count
    remembered = min(count, dead_limit)
    codes = [harness.code(each.token) for each in opened]
    assert codes.count(Code.TOKEN_REVOKED) == remembered
    assert codes.count(Code.UNAUTHENTICATED) == count - remembered
    assert len(harness.ended) == count
    assert (len(harness.registry), harness.registry.kept, harness.registry.revoked) == (0, 0, count)
    assert harness.strings == (0, 0, 0)
    harness.good(harness.open().token)


def test_close_ends_session(harness: RegistryHarness, opened: OpenedSession) -> None:
    harness.registry.close(harness.good(opened.token))
    assert harness.code(opened.token) is Code.TOKEN_REVOKED
    assert harness.ended == [(opened.session.id, Code.TOKEN_REVOKED, "closed")]


def test_second_close_does_not_end_session_that_reuses_slot() -> None:
    harness = RegistryHarness(dead_limit=0)
    first = harness.open("alice")
    harness.registry.close(first.session)
    second = harness.open("alice")
    assert second.session.slot == first.session.slot
    harness.registry.close(first.session)
    assert harness.good(second.token)
    assert harness.registry.revoked == 0, "closed by its client"


def test_session_can_be_closed_after_refresh(harness: RegistryHarness) -> None:
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    harness.registry.close(first.session)
    assert harness.code(second.token) is Code.TOKEN_REVOKED
