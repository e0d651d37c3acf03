"""Test refresh tokens: single use, reuse detection, grace and expiry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sessions.helpers import DAY, HOUR, SECOND, WALL, CountedEntropy, RegistryHarness
from zcproto.common.roles import OPERATORS
from zcproto.errors import (
    Code,
    InvalidArgument,
    SessionReplaced,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
)
from zcproto.sessions import OpenedSession
from zcproto.sessions.token import TOKEN_SIZE, digest_of

GRACE = 10 * SECOND
LATER = WALL + GRACE


@pytest.mark.requirement("refresh")
def test_refresh_gives_new_pair_for_same_session(harness: RegistryHarness) -> None:
    first = harness.open(roles=OPERATORS, bound=True)
    second = harness.refresh(first.refresh_token, WALL + HOUR // 2, client="zc/2", address="192.0.2.9")
    assert second.session.id == first.session.id
    assert second.refresh_expires_at == first.refresh_expires_at == WALL + 30 * DAY
    assert second.token != first.token
    assert second.refresh_token != first.refresh_token
    assert second.session.expires_at == WALL + HOUR // 2 + DAY
    assert (second.session.roles, second.session.bound) == (OPERATORS, True)
    info = harness.registry.info(first.session.id, WALL + HOUR // 2)
    assert (info.created_at, info.client, info.address) == (WALL, "zc/2", "192.0.2.9")
    assert (len(harness.registry), harness.registry.opened, harness.registry.refreshed) == (1, 1, 1)
    assert harness.good(second.token, WALL + HOUR // 2).id == first.session.id


@pytest.mark.requirement("refresh")
def test_refresh_invalidates_old_pair_silently(harness: RegistryHarness) -> None:
    first = harness.open()
    generation = harness.registry.generation
    harness.refresh(first.refresh_token)
    assert harness.registry.generation > generation
    assert harness.code(first.token) is Code.TOKEN_REVOKED
    assert harness.ended == []
    with pytest.raises(TokenRevoked):
        harness.refresh(first.refresh_token, LATER)


def test_refresh_does_not_count_against_limit() -> None:
    harness = RegistryHarness(per_user=1)
    opened = harness.open()
    for number in range(20):
        opened = harness.refresh(opened.refresh_token, WALL + number)
    assert len(harness.registry) == 1


@pytest.mark.requirement("refresh")
@pytest.mark.parametrize("generations", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("back", [1, 2, 10, 40])
def test_reuse_of_any_spent_refresh_token_ends_session(generations: int, back: int) -> None:
    harness = RegistryHarness(dead_limit=2, grace_limit=1)
    opened = harness.open()
    tokens = [opened.refresh_token]
    for _ in range(generations):
        opened = harness.refresh(tokens[-1])
        tokens.append(opened.refresh_token)
    if back > generations:
        assert harness.good(opened.token)
        return
    with pytest.raises(TokenRevoked):
        harness.refresh(tokens[-1 - back], LATER)
    assert harness.code(opened.token, LATER) is Code.TOKEN_REVOKED
    with pytest.raises(TokenRevoked):
        harness.refresh(tokens[-1], LATER)
    assert harness.ended == [(opened.session.id, Code.TOKEN_REVOKED, "refresh token reused")]
    assert (harness.registry.refresh_reused, harness.registry.revoked, len(harness.registry)) == (1, 1, 0)


def test_reuse_does_not_end_other_sessions_of_user(harness: RegistryHarness) -> None:
    other = harness.open()
    opened = harness.open()
    harness.refresh(opened.refresh_token)
    with pytest.raises(TokenRevoked):
        harness.refresh(opened.refresh_token, LATER)
    assert harness.good(other.token)


def test_reuse_ends_lapsed_session(harness: RegistryHarness) -> None:
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        harness.refresh(first.refresh_token, WALL + 2 * DAY)
    with pytest.raises(TokenRevoked):
        harness.refresh(second.refresh_token, WALL + 2 * DAY)
    assert [each[1] for each in harness.ended] == [Code.TOKEN_EXPIRED]


@pytest.mark.parametrize("tail", [b"\0" * 16, b"\xff" * 16])
def test_right_family_with_wrong_rest_ends_session(harness: RegistryHarness, tail: bytes) -> None:
    opened = harness.open()
    assert opened.refresh_token is not None
    with pytest.raises(TokenRevoked):
        harness.refresh(opened.refresh_token[:16] + tail)
    assert harness.code(opened.token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 33, 48, 1000])
def test_refresh_token_of_wrong_length_is_unknown(harness: RegistryHarness, length: int) -> None:
    opened = harness.open()
    assert opened.refresh_token is not None
    with pytest.raises(Unauthenticated):
        harness.refresh((opened.refresh_token * 40)[:length])
    assert harness.good(opened.token)


@pytest.mark.parametrize("token", [b"\0" * 32, b"\xff" * 32, bytes(range(32))])
def test_unknown_refresh_token_is_unauthenticated(harness: RegistryHarness, token: bytes) -> None:
    harness.open()
    with pytest.raises(Unauthenticated):
        harness.refresh(token)
    assert harness.registry.refresh_reused == 0


@pytest.mark.requirement("refresh")
def test_access_token_is_not_accepted_as_refresh_token(
    harness: RegistryHarness, opened: OpenedSession
) -> None:
    with pytest.raises(Unauthenticated):
        harness.refresh(opened.token)
    assert harness.good(opened.token)


# The grace


@pytest.mark.parametrize("after", [0, 1, GRACE - 1])
def test_same_client_gets_same_pair_within_grace(harness: RegistryHarness, after: int) -> None:
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    again = harness.refresh(first.refresh_token, WALL + after)
    assert (again.token, again.refresh_token) == (second.token, second.refresh_token)
    assert (again.refresh_expires_at, again.session.id) == (second.refresh_expires_at, second.session.id)
    assert again.session.expires_at == second.session.expires_at
    assert (harness.registry.refreshed, harness.registry.refresh_reused) == (1, 0)
    assert harness.good(again.token, WALL + after)


@pytest.mark.parametrize(
    ("grace_ms", "after", "who"),
    [
        *((GRACE, after, {}) for after in (GRACE, GRACE + 1, HOUR, DAY)),
        (0, 0, {}),
        (GRACE, 1, {"client": "zc/2"}),
        (GRACE, 1, {"address": "192.0.2.2"}),
    ],
)
def test_repeat_without_grace_is_reuse(grace_ms: int, after: int, who: dict[str, str]) -> None:
    harness = RegistryHarness(refresh_grace_ms=grace_ms)
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        harness.refresh(first.refresh_token, WALL + after, **who)
    assert harness.code(second.token, WALL + after) is Code.TOKEN_REVOKED


def test_grace_is_for_the_refreshing_client(harness: RegistryHarness) -> None:
    first = harness.open(client="old", address="192.0.2.1")
    second = harness.refresh(first.refresh_token, client="new", address="192.0.2.2")
    again = harness.refresh(first.refresh_token, client="new", address="192.0.2.2")
    assert again.token == second.token


def test_only_last_spent_token_has_grace(harness: RegistryHarness) -> None:
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    third = harness.refresh(second.refresh_token)
    assert harness.refresh(second.refresh_token).token == third.token
    with pytest.raises(TokenRevoked):
        harness.refresh(first.refresh_token)


def test_oldest_pair_above_limit_loses_its_grace() -> None:
    harness = RegistryHarness(grace_limit=2)
    opened = [harness.open(f"user {number}") for number in range(3)]
    refreshed = [harness.refresh(each.refresh_token) for each in opened]
    for number in (1, 2):
        assert harness.refresh(opened[number].refresh_token).token == refreshed[number].token
    with pytest.raises(TokenRevoked):
        harness.refresh(opened[0].refresh_token)


def test_pair_of_ended_session_does_not_count_towards_the_limit() -> None:
    harness = RegistryHarness(grace_limit=2)
    alice, bob, carol = (harness.open(user) for user in ("alice", "bob", "carol"))
    refreshed = harness.refresh(alice.refresh_token)
    harness.refresh(bob.refresh_token)
    harness.registry.close(bob.session)
    harness.refresh(carol.refresh_token)
    assert harness.refresh(alice.refresh_token).token == refreshed.token


def test_pairs_are_removed_from_memory_after_the_grace(harness: RegistryHarness) -> None:
    harness.refresh(harness.open().refresh_token)
    harness.clean(LATER - 1)
    assert len(harness.registry._grace) == 1
    harness.clean(LATER)
    assert len(harness.registry._grace) == 0


def test_replaced_pair_counts_as_the_newest() -> None:
    harness = RegistryHarness(grace_limit=2)
    alice, bob, carol = (harness.open(user) for user in ("alice", "bob", "carol"))
    first = harness.refresh(alice.refresh_token, WALL)
    harness.refresh(bob.refresh_token, WALL + 1)
    second = harness.refresh(first.refresh_token, WALL + 2)
    harness.refresh(carol.refresh_token, WALL + 3)
    assert harness.refresh(first.refresh_token, WALL + 3).token == second.token
    with pytest.raises(TokenRevoked):
        harness.refresh(bob.refresh_token, WALL + 3)


def test_pair_is_repeated_for_lapsed_session() -> None:
    harness = RegistryHarness(idle_timeout_ms=SECOND)
    first = harness.open()
    second = harness.refresh(first.refresh_token)
    again = harness.refresh(first.refresh_token, WALL + 2 * SECOND)
    assert again.token == second.token
    assert harness.code(again.token, WALL + 2 * SECOND) is Code.TOKEN_EXPIRED
    assert harness.good(harness.refresh(again.refresh_token, WALL + 2 * SECOND).token, WALL + 2 * SECOND)


# Time


@pytest.mark.parametrize("wall", [WALL + HOUR, WALL + DAY, WALL + 2 * DAY, WALL + 30 * DAY - 1])
@pytest.mark.parametrize("seen", [False, True])
def test_refresh_revives_lapsed_session(harness: RegistryHarness, wall: int, seen: bool) -> None:
    first = harness.open()
    if seen:
        harness.clean(wall)
        assert (len(harness.registry), harness.registry.lapsed) == (0, 1)
    second = harness.refresh(first.refresh_token, wall)
    assert second.session.id == first.session.id
    assert (len(harness.registry), harness.registry.lapsed) == (1, 0)
    assert harness.good(second.token, wall)
    assert [each[1] for each in harness.ended] == [Code.TOKEN_EXPIRED]


@pytest.mark.parametrize("wall", [WALL + 30 * DAY, WALL + 31 * DAY])
@pytest.mark.parametrize("cleaned", [False, True])
def test_refresh_token_expires_absolutely(harness: RegistryHarness, wall: int, cleaned: bool) -> None:
    opened = harness.open()
    if cleaned:
        harness.clean(wall)
    with pytest.raises(TokenExpired):
        harness.refresh(opened.refresh_token, wall)
    assert (len(harness.registry), harness.registry.lapsed) == (0, 0)
    with pytest.raises(TokenExpired):
        harness.refresh(opened.refresh_token, wall - DAY)


def test_chain_of_refreshes_does_not_outlive_limit(harness: RegistryHarness) -> None:
    opened = harness.open()
    for day in range(1, 30):
        opened = harness.refresh(opened.refresh_token, WALL + day * DAY)
        assert opened.session.expires_at == WALL + (day + 1) * DAY
    opened = harness.refresh(opened.refresh_token, WALL + 30 * DAY - HOUR)
    assert opened.session.expires_at == opened.refresh_expires_at == WALL + 30 * DAY
    assert harness.code(opened.token, WALL + 30 * DAY) is Code.TOKEN_EXPIRED
    with pytest.raises(TokenExpired):
        harness.refresh(opened.refresh_token, WALL + 30 * DAY)


def test_refresh_lifetime_below_token_lifetime_only_ends_refreshing() -> None:
    harness = RegistryHarness(refresh_lifetime_ms=HOUR, idle_timeout_ms=None)
    opened = harness.open()
    with pytest.raises(TokenExpired):
        harness.refresh(opened.refresh_token, WALL + HOUR)
    assert harness.good(opened.token, WALL + HOUR)
    assert harness.code(opened.token, WALL + DAY) is Code.TOKEN_EXPIRED
    assert harness.registry.lapsed == 0


@pytest.mark.parametrize("dead_limit", [0, 1])
def test_refresh_of_expired_session_is_refused_without_tombstones(dead_limit: int) -> None:
    harness = RegistryHarness(dead_limit=dead_limit)
    opened = harness.open()
    with pytest.raises(TokenExpired):
        harness.refresh(opened.refresh_token, WALL + 30 * DAY)


# Refresh of an ended session


def close(harness: RegistryHarness, opened: OpenedSession) -> None:
    harness.registry.close(opened.session)


@pytest.mark.parametrize(
    ("settings", "end", "wall", "error"),
    [
        ({}, close, WALL, TokenRevoked),
        (
            {"per_user": 1, "when_full": "evict_oldest"},
            lambda harness, _: harness.open(),
            WALL,
            SessionReplaced,
        ),
        ({"per_user": 1}, lambda harness, _: harness.open(wall=WALL + HOUR), WALL + HOUR, TokenExpired),
        ({"dead_keep_ms": SECOND}, close, WALL + SECOND, Unauthenticated),
        ({}, lambda harness, opened: None, WALL + 30 * DAY, TokenExpired),
    ],
    ids=["revoked", "evicted", "evicted when lapsed", "forgotten", "expired"],
)
def test_refresh_of_ended_session_names_the_reason_and_no_user(
    settings: dict[str, Any],
    end: Callable[[RegistryHarness, OpenedSession], object],
    wall: int,
    error: type[Exception],
) -> None:
    harness = RegistryHarness(**settings)
    opened = harness.open("alice")
    end(harness, opened)
    with pytest.raises(error) as caught:
        harness.refresh(opened.refresh_token, wall)
    assert harness.registry.refresh_reused == 0
    text = repr(caught.value) + str(caught.value)
    for secret in ("alice", (opened.refresh_token or b"").hex(), opened.session.id):
        assert secret not in text


def test_client_name_is_limited_in_length(harness: RegistryHarness, opened: OpenedSession) -> None:
    with pytest.raises(InvalidArgument, match="client"):
        harness.refresh(opened.refresh_token, client="x" * 129)
    assert harness.good(opened.token)


def test_repeating_entropy_changes_nothing(harness: RegistryHarness, opened: OpenedSession) -> None:
    harness.entropy.calls = 0
    with pytest.raises(RuntimeError, match="repeated itself"):
        harness.refresh(opened.refresh_token)
    assert harness.good(opened.token)


def test_failing_entropy_changes_nothing() -> None:
    source, is_failing = CountedEntropy(), True

    def entropy(size: int) -> bytes:
        if is_failing and size != TOKEN_SIZE:
            raise OSError("no random bytes")
        return source(size)

    harness = RegistryHarness(entropy)
    opened = harness.open()
    with pytest.raises(OSError, match="no random bytes"):
        harness.refresh(opened.refresh_token)
    is_failing = False
    assert harness.good(opened.token)
    assert harness.refresh(opened.refresh_token).session.id == opened.session.id


# --- observers of rotations -----------------------------------------------------------------------------


def rotations(harness: RegistryHarness) -> list[tuple[str, bytes]]:
    """Return what an observer gets from now on."""
    seen: list[tuple[str, bytes]] = []
    harness.registry.rotation_observers.append(lambda *rotation: seen.append(rotation))
    return seen


def test_refresh_notifies_of_the_new_token_once(harness: RegistryHarness) -> None:
    first = harness.open()
    seen = rotations(harness)
    second = harness.refresh(first.refresh_token)
    assert seen == [(first.session.id, digest_of(second.token))]
    harness.refresh(first.refresh_token)  # within the grace
    assert len(seen) == 1


def test_session_read_from_a_store_notifies_of_a_token_that_may_be_new(harness: RegistryHarness) -> None:
    opened = harness.open()
    registry, raw_id = harness.registry, opened.session.raw_id
    record = registry.record(raw_id)
    assert record is not None
    seen = rotations(harness)
    registry.restore(record, make_room=True)
    assert seen == [], "it has this token"
    registry.restore(record._replace(token_digest=b"n" * 32), make_room=False)
    assert seen == [(opened.session.id, b"n" * 32)]
    registry.forget(raw_id)
    registry.restore(record._replace(token_digest=b"m" * 32), make_room=True)
    assert seen[1:] == [(opened.session.id, b"m" * 32)]
    registry.forget(raw_id)
    registry.restore(record._replace(token_digest=b"o" * 32))
    assert len(seen) == 2, "a store is loaded before there are connections"


def test_session_that_ends_before_its_rotation_is_announced_is_not_reported(harness: RegistryHarness) -> None:
    opened = harness.open()
    seen = rotations(harness)
    made = harness.registry.new_rotation(opened.refresh_token or b"", client="", address="", wall=WALL)
    assert made is not None
    harness.registry.rotate(made[0])
    harness.registry.close(opened.session)
    assert seen == []


def test_session_expires_on_demand(harness: RegistryHarness) -> None:
    opened = harness.open()
    expires_at = opened.session.expires_at
    for session_id, wall in (
        ("no id", expires_at),
        ("A" * 22, expires_at),
        (opened.session.id, expires_at - 1),
    ):
        harness.registry.touch(opened.session, expires_at - 1)
        harness.registry.expire(session_id, wall)
        assert harness.ended == []
    harness.registry.expire(opened.session.id, expires_at)
    assert [(each[0], each[1]) for each in harness.ended] == [(opened.session.id, Code.TOKEN_EXPIRED)]
    assert harness.registry.lapsed == 1
