"""Refresh tokens: each works once, and a spent one ends the session."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, SECOND, WALL, Desk
from zcproto.errors import (
    Code,
    InvalidArgument,
    SessionReplaced,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
)

GRACE = 10 * SECOND
LATER = WALL + GRACE


def test_a_refresh_gives_a_new_pair_of_the_same_session() -> None:
    desk = Desk()
    first = desk.open(operator=True, bound=True)
    second = desk.refresh(first.refresh_token, WALL + HOUR // 2, client="zc/2", address="192.0.2.9")
    assert second.session.id == first.session.id
    assert second.refresh_expires_at == first.refresh_expires_at == WALL + 30 * DAY
    assert second.token != first.token
    assert second.refresh_token != first.refresh_token
    assert second.session.expires_at == WALL + HOUR // 2 + DAY
    assert (second.session.operator, second.session.bound) == (True, True)
    info = desk.registry.info(first.session.id, WALL + HOUR // 2)
    assert (info.created_at, info.client, info.address) == (WALL, "zc/2", "192.0.2.9")
    assert (len(desk.registry), desk.registry.opened, desk.registry.refreshed) == (1, 1, 1)
    assert desk.good(second.token, WALL + HOUR // 2).id == first.session.id


def test_both_old_tokens_are_dead_at_once_without_an_event() -> None:
    desk = Desk()
    first = desk.open()
    generation = desk.registry.generation
    desk.refresh(first.refresh_token)
    assert desk.registry.generation > generation
    assert desk.code(first.token) is Code.TOKEN_REVOKED
    assert desk.ended == []
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token, LATER)


def test_a_refresh_does_not_count_against_the_cap() -> None:
    desk = Desk(per_user=1)
    opened = desk.open()
    for number in range(20):
        opened = desk.refresh(opened.refresh_token, WALL + number)
    assert len(desk.registry) == 1


@pytest.mark.parametrize("generations", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("back", [1, 2, 10, 40])
def test_reuse_of_any_spent_token_ends_the_session(generations: int, back: int) -> None:
    desk = Desk(dead_limit=2, grace_limit=1)
    opened = desk.open()
    tokens = [opened.refresh_token]
    for _ in range(generations):
        opened = desk.refresh(tokens[-1])
        tokens.append(opened.refresh_token)
    if back > generations:
        assert desk.good(opened.token)
        return
    with pytest.raises(TokenRevoked):
        desk.refresh(tokens[-1 - back], LATER)
    assert desk.code(opened.token, LATER) is Code.TOKEN_REVOKED
    with pytest.raises(TokenRevoked):
        desk.refresh(tokens[-1], LATER)
    assert desk.ended == [(opened.session.id, Code.TOKEN_REVOKED, "refresh token reused")]
    assert (desk.registry.refresh_reused, desk.registry.revoked, len(desk.registry)) == (1, 1, 0)


def test_reuse_ends_no_other_session_of_the_user() -> None:
    desk = Desk()
    other = desk.open()
    opened = desk.open()
    desk.refresh(opened.refresh_token)
    with pytest.raises(TokenRevoked):
        desk.refresh(opened.refresh_token, LATER)
    assert desk.good(other.token)


def test_reuse_ends_a_lapsed_session_for_good() -> None:
    desk = Desk()
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token, WALL + 2 * DAY)
    with pytest.raises(TokenRevoked):
        desk.refresh(second.refresh_token, WALL + 2 * DAY)
    assert [each[1] for each in desk.ended] == [Code.TOKEN_EXPIRED]


@pytest.mark.parametrize("tail", [b"\0" * 16, b"\xff" * 16])
def test_who_knows_the_family_but_not_the_rest_ends_the_session(tail: bytes) -> None:
    desk = Desk()
    opened = desk.open()
    assert opened.refresh_token is not None
    with pytest.raises(TokenRevoked):
        desk.refresh(opened.refresh_token[:16] + tail)
    assert desk.code(opened.token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 33, 48, 1000])
def test_a_token_of_another_length_is_unknown_and_harms_nobody(length: int) -> None:
    desk = Desk()
    opened = desk.open()
    assert opened.refresh_token is not None
    with pytest.raises(Unauthenticated):
        desk.refresh((opened.refresh_token * 40)[:length])
    assert desk.good(opened.token)


@pytest.mark.parametrize("token", [b"\0" * 32, b"\xff" * 32, bytes(range(32))])
def test_an_unknown_token_is_unauthenticated(token: bytes) -> None:
    desk = Desk()
    desk.open()
    with pytest.raises(Unauthenticated):
        desk.refresh(token)
    assert desk.registry.refresh_reused == 0


def test_an_access_token_is_no_refresh_token() -> None:
    desk = Desk()
    opened = desk.open()
    with pytest.raises(Unauthenticated):
        desk.refresh(opened.token)
    assert desk.good(opened.token)


# The grace


@pytest.mark.parametrize("after", [0, 1, GRACE - 1])
def test_within_the_grace_the_same_client_gets_the_same_pair(after: int) -> None:
    desk = Desk()
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    again = desk.refresh(first.refresh_token, WALL + after)
    assert (again.token, again.refresh_token) == (second.token, second.refresh_token)
    assert (again.refresh_expires_at, again.session.id) == (second.refresh_expires_at, second.session.id)
    assert again.session.expires_at == second.session.expires_at
    assert (desk.registry.refreshed, desk.registry.refresh_reused) == (1, 0)
    assert desk.good(again.token, WALL + after)


@pytest.mark.parametrize("after", [GRACE, GRACE + 1, HOUR, DAY])
def test_after_the_grace_it_is_reuse(after: int) -> None:
    desk = Desk()
    first = desk.open()
    desk.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token, WALL + after)


@pytest.mark.parametrize("who", [{"client": "zc/2"}, {"address": "192.0.2.2"}])
def test_another_client_or_address_has_no_grace(who: dict[str, str]) -> None:
    desk = Desk()
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token, WALL + 1, **who)
    assert desk.code(second.token) is Code.TOKEN_REVOKED


def test_the_grace_is_for_the_client_that_refreshed_not_for_the_one_before() -> None:
    desk = Desk()
    first = desk.open(client="old", address="192.0.2.1")
    second = desk.refresh(first.refresh_token, client="new", address="192.0.2.2")
    again = desk.refresh(first.refresh_token, client="new", address="192.0.2.2")
    assert again.token == second.token


def test_only_the_token_spent_last_has_grace() -> None:
    desk = Desk()
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    third = desk.refresh(second.refresh_token)
    assert desk.refresh(second.refresh_token).token == third.token
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token)


def test_no_grace_if_so_configured() -> None:
    desk = Desk(refresh_grace_ms=0)
    first = desk.open()
    desk.refresh(first.refresh_token)
    with pytest.raises(TokenRevoked):
        desk.refresh(first.refresh_token)


def test_beyond_the_limit_of_kept_pairs_the_oldest_loses_its_grace() -> None:
    desk = Desk(grace_limit=2)
    opened = [desk.open(f"user {number}") for number in range(3)]
    refreshed = [desk.refresh(each.refresh_token) for each in opened]
    for number in (1, 2):
        assert desk.refresh(opened[number].refresh_token).token == refreshed[number].token
    with pytest.raises(TokenRevoked):
        desk.refresh(opened[0].refresh_token)


def test_kept_pairs_go_with_time_and_with_their_session() -> None:
    desk = Desk()
    first, second = desk.open("alice"), desk.open("bob")
    for opened in (first, second):
        desk.refresh(opened.refresh_token)
    assert len(desk.registry._grace) == 2
    desk.registry.close(first.session)
    assert len(desk.registry._grace) == 1
    desk.clean(LATER - 1)
    assert len(desk.registry._grace) == 1
    desk.clean(LATER)
    assert len(desk.registry._grace) == 0


def test_a_pair_kept_anew_does_not_hold_up_those_before_it() -> None:
    desk = Desk()
    alice, bob = desk.open("alice"), desk.open("bob")
    again = desk.refresh(alice.refresh_token, WALL)
    desk.refresh(bob.refresh_token, WALL + 1)
    desk.refresh(again.refresh_token, WALL + 2)
    desk.clean(WALL + 1 + GRACE)
    assert len(desk.registry._grace) == 1


def test_the_pair_is_given_again_even_if_the_session_lapsed_meanwhile() -> None:
    desk = Desk(idle_timeout_ms=SECOND)
    first = desk.open()
    second = desk.refresh(first.refresh_token)
    again = desk.refresh(first.refresh_token, WALL + 2 * SECOND)
    assert again.token == second.token
    assert desk.code(again.token, WALL + 2 * SECOND) is Code.TOKEN_EXPIRED
    assert desk.good(desk.refresh(again.refresh_token, WALL + 2 * SECOND).token, WALL + 2 * SECOND)


# Time


@pytest.mark.parametrize("wall", [WALL + HOUR, WALL + DAY, WALL + 2 * DAY, WALL + 30 * DAY - 1])
@pytest.mark.parametrize("seen", [False, True])
def test_a_lapsed_session_is_brought_back(wall: int, seen: bool) -> None:
    desk = Desk()
    first = desk.open()
    if seen:
        desk.clean(wall)
        assert (len(desk.registry), desk.registry.lapsed) == (0, 1)
    second = desk.refresh(first.refresh_token, wall)
    assert second.session.id == first.session.id
    assert (len(desk.registry), desk.registry.lapsed) == (1, 0)
    assert desk.good(second.token, wall)
    assert [each[1] for each in desk.ended] == [Code.TOKEN_EXPIRED]


@pytest.mark.parametrize("wall", [WALL + 30 * DAY, WALL + 31 * DAY])
@pytest.mark.parametrize("cleaned", [False, True])
def test_the_refresh_token_has_an_absolute_limit(wall: int, cleaned: bool) -> None:
    desk = Desk()
    opened = desk.open()
    if cleaned:
        desk.clean(wall)
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, wall)
    assert (len(desk.registry), desk.registry.lapsed) == (0, 0)
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, wall - DAY)


def test_no_chain_of_refreshes_outlives_the_limit() -> None:
    desk = Desk()
    opened = desk.open()
    for day in range(1, 30):
        opened = desk.refresh(opened.refresh_token, WALL + day * DAY)
        assert opened.session.expires_at == WALL + (day + 1) * DAY
    opened = desk.refresh(opened.refresh_token, WALL + 30 * DAY - HOUR)
    assert opened.session.expires_at == opened.refresh_expires_at == WALL + 30 * DAY
    assert desk.code(opened.token, WALL + 30 * DAY) is Code.TOKEN_EXPIRED
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, WALL + 30 * DAY)


def test_a_refresh_limit_below_the_lifetime_only_ends_refreshing() -> None:
    desk = Desk(refresh_lifetime_ms=HOUR, idle_timeout_ms=None)
    opened = desk.open()
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, WALL + HOUR)
    assert desk.good(opened.token, WALL + HOUR)
    assert desk.code(opened.token, WALL + DAY) is Code.TOKEN_EXPIRED
    assert desk.registry.lapsed == 0


@pytest.mark.parametrize("dead_limit", [0, 1])
def test_the_end_is_told_even_if_nothing_is_remembered(dead_limit: int) -> None:
    desk = Desk(dead_limit=dead_limit)
    opened = desk.open()
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, WALL + 30 * DAY)


# What became of the session


def test_a_revoked_session_says_so() -> None:
    desk = Desk()
    opened = desk.open()
    desk.registry.close(opened.session)
    with pytest.raises(TokenRevoked):
        desk.refresh(opened.refresh_token)
    assert desk.registry.refresh_reused == 0


def test_a_replaced_session_says_so() -> None:
    desk = Desk(per_user=1, when_full="evict_oldest")
    opened = desk.open()
    desk.open()
    with pytest.raises(SessionReplaced):
        desk.refresh(opened.refresh_token)


def test_a_lapsed_session_that_made_room_says_that_it_expired() -> None:
    desk = Desk(per_user=1)
    opened = desk.open()
    desk.open(wall=WALL + HOUR)
    with pytest.raises(TokenExpired):
        desk.refresh(opened.refresh_token, WALL + HOUR)


def test_a_forgotten_session_is_unknown() -> None:
    desk = Desk(dead_keep_ms=SECOND)
    opened = desk.open()
    desk.registry.close(opened.session)
    with pytest.raises(Unauthenticated):
        desk.refresh(opened.refresh_token, WALL + SECOND)


def test_the_clients_name_has_a_limit() -> None:
    desk = Desk()
    opened = desk.open()
    with pytest.raises(InvalidArgument, match="client"):
        desk.refresh(opened.refresh_token, client="x" * 129)
    assert desk.good(opened.token)


def test_a_source_that_repeats_itself_changes_nothing() -> None:
    desk = Desk()
    opened = desk.open()
    desk.registry._entropy = lambda size: opened.token[:size]
    with pytest.raises(RuntimeError, match="repeated itself"):
        desk.refresh(opened.refresh_token)
    assert desk.good(opened.token)


def test_a_source_that_fails_changes_nothing() -> None:
    desk = Desk()
    opened = desk.open()

    def entropy(size: int) -> bytes:
        if size != 32:
            raise OSError("no random bytes")
        return b"n" * 32

    real, desk.registry._entropy = desk.registry._entropy, entropy
    with pytest.raises(OSError, match="no random bytes"):
        desk.refresh(opened.refresh_token)
    desk.registry._entropy = real
    assert desk.good(opened.token)
    assert desk.refresh(opened.refresh_token).session.id == opened.session.id


@pytest.mark.parametrize("error", [Unauthenticated, TokenExpired, TokenRevoked, SessionReplaced])
def test_messages_say_what_to_do_and_name_nobody(error: type[Exception]) -> None:
    desk = Desk(per_user=1, when_full="evict_oldest")
    opened = desk.open("alice")
    assert opened.refresh_token is not None
    token, wall = opened.refresh_token, WALL
    if error is Unauthenticated:
        token = bytes(32)
    elif error is TokenExpired:
        wall += 30 * DAY
    elif error is TokenRevoked:
        desk.registry.close(opened.session)
    else:
        desk.open("alice")
    with pytest.raises(error) as caught:
        desk.refresh(token, wall)
    text = repr(caught.value) + str(caught.value)
    assert "alice" not in text
    assert token.hex() not in text
    assert opened.session.id not in text
