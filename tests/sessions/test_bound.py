"""Test sessions bound to a key: their key, when they count as used, and revocation by key."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, RegistryHarness
from zcproto.errors import Code
from zcproto.sessions import OpenedSession

LAPTOP, PHONE = "device:laptop", "device:" + "é" * 100
CERTIFICATE = "tls:" + "0f" * 32


def bound(harness: RegistryHarness, key: str, user: str = "alice") -> OpenedSession:
    return harness.registry.open(user, client="zc/1", address="192.0.2.1", wall=WALL, key=key)


@pytest.mark.parametrize("key", [LAPTOP, PHONE, CERTIFICATE])
def test_key_stays_the_same_after_refresh(harness: RegistryHarness, key: str) -> None:
    opened = bound(harness, key)
    assert opened.session.bound
    assert harness.registry.key_of(opened.session) == key
    assert harness.registry.info(opened.session.id, WALL).bound
    assert opened.refresh_token is not None
    refreshed = harness.registry.refresh(opened.refresh_token, client="", address="", wall=WALL)
    assert refreshed.session.bound
    assert harness.registry.key_of(refreshed.session) == key


def test_unbound_or_ended_session_has_no_key(harness: RegistryHarness) -> None:
    free, ended = harness.open(), bound(harness, LAPTOP)
    assert harness.registry.key_of(free.session) == ""
    harness.registry.close(ended.session)
    assert harness.registry.key_of(ended.session) == ""
    other = RegistryHarness().open("bob")
    assert RegistryHarness().registry.key_of(other.session) == ""


def test_check_alone_does_not_count_as_use_of_bound_session(harness: RegistryHarness) -> None:
    opened = bound(harness, LAPTOP)
    for minute in range(0, 60, 10):
        session = harness.good(opened.token, WALL + minute * MINUTE)
        assert session.valid_until == WALL + HOUR
    assert harness.code(opened.token, WALL + HOUR) is Code.TOKEN_EXPIRED


def test_use_counts_after_key_is_proved(harness: RegistryHarness) -> None:
    opened = bound(harness, LAPTOP)
    for minute in (30, 60, 90):
        session = harness.good(opened.token, WALL + minute * MINUTE)
        harness.registry.use(session, WALL + minute * MINUTE)
        assert session.valid_until == WALL + minute * MINUTE + HOUR
    assert harness.registry.info(opened.session.id, WALL + 90 * MINUTE).last_used_at == WALL + 90 * MINUTE
    harness.registry.use(session, WALL)  # the clock goes back
    assert session.valid_until == WALL + 150 * MINUTE


def test_use_does_not_extend_absolute_expiry() -> None:
    harness = RegistryHarness(idle_timeout_ms=None)
    opened = bound(harness, LAPTOP)
    session = harness.good(opened.token, WALL + DAY - 1)
    harness.registry.use(session, WALL + DAY - 1)
    assert session.valid_until == WALL + DAY


def test_revoke_key_ends_only_sessions_with_that_key(harness: RegistryHarness) -> None:
    gone = [bound(harness, LAPTOP), bound(harness, LAPTOP)]
    stay = [bound(harness, PHONE), harness.open(), bound(harness, LAPTOP, "bob")]
    assert harness.registry.revoke_key("alice", LAPTOP, "removed") == 2
    assert harness.ended == [(each.session.id, Code.TOKEN_REVOKED, "removed") for each in gone]
    assert [harness.code(each.token) for each in gone] == [Code.TOKEN_REVOKED] * 2
    for each in stay:
        harness.good(each.token)
    assert harness.registry.revoke_key("alice", LAPTOP, "removed") == 0


def test_revoke_unknown_key_ends_nothing(harness: RegistryHarness) -> None:
    harness.open()
    assert harness.registry.revoke_key("alice", LAPTOP, "removed") == 0
    assert harness.registry.revoke_key("mallory", LAPTOP, "removed") == 0
    assert len(harness.registry) == 1


def test_revoke_key_ends_lapsed_session(harness: RegistryHarness) -> None:
    opened = bound(harness, LAPTOP)
    assert harness.code(opened.token, WALL + HOUR) is Code.TOKEN_EXPIRED
    assert harness.registry.revoke_key("alice", LAPTOP, "removed") == 1
    assert harness.registry.kept == 0
