"""What a check answers, and when a token stops being good."""

from __future__ import annotations

import os

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, Desk
from zcproto.errors import Code
from zcproto.sessions import Session

NONE = bytes(32)


def test_a_good_token_gives_its_session() -> None:
    desk = Desk()
    opened = desk.open("alice", operator=True)
    session = desk.good(opened.token, WALL + 5)
    assert session.id == opened.session.id
    assert (session.user, session.operator, session.slot) == ("alice", True, opened.session.slot)
    assert session.expires_at == WALL + DAY
    assert session.valid_until == WALL + 5 + HOUR
    assert session.expiring_at == WALL + DAY - DAY // 10


def test_each_token_gives_its_own_session() -> None:
    desk = Desk()
    opened = [desk.open(f"user {number}") for number in range(50)]
    for number, each in enumerate(opened):
        session = desk.good(each.token)
        assert (session.user, session.id) == (f"user {number}", each.session.id)


@pytest.mark.parametrize("token", [NONE, b"", b"x", b"x" * 31, b"x" * 33, b"x" * 100_000, bytes(range(32))])
@pytest.mark.parametrize("filled", [False, True])
def test_what_was_never_given_out_is_unauthenticated(token: bytes, filled: bool) -> None:
    desk = Desk()
    if filled:
        for number in range(20):
            desk.open(f"user {number}")
    assert desk.code(token) is Code.UNAUTHENTICATED


def test_each_bit_of_a_token_decides() -> None:
    desk = Desk()
    token = desk.open().token
    for bit in range(256):
        wrong = bytearray(token)
        wrong[bit // 8] ^= 1 << bit % 8
        assert desk.code(bytes(wrong)) is Code.UNAUTHENTICATED, bit
    desk.good(token)


def test_tokens_are_not_mistaken_for_each_other() -> None:
    desk = Desk()
    opened = desk.open()
    assert opened.refresh_token is not None
    assert desk.code(opened.refresh_token) is Code.UNAUTHENTICATED
    assert desk.good(opened.token).id == opened.session.id


@pytest.mark.parametrize("idle", [None, HOUR])
@pytest.mark.parametrize(
    ("before_end", "good"), [(2, True), (1, True), (0, False), (-1, False), (-DAY, False)]
)
def test_the_absolute_limit_is_exact_and_use_does_not_extend_it(
    idle: int | None, before_end: int, good: bool
) -> None:
    desk = Desk(idle_timeout_ms=idle)
    token = desk.open().token
    for minute in range(0, 24 * 60, 30):
        desk.good(token, WALL + minute * MINUTE)
    result = desk.registry.check(token, WALL + DAY - before_end)
    if good:
        assert isinstance(result, Session)
        assert result.valid_until == WALL + DAY
    else:
        assert result is Code.TOKEN_EXPIRED


@pytest.mark.parametrize(("silence", "good"), [(0, True), (HOUR - 1, True), (HOUR, False), (HOUR + 1, False)])
def test_the_idle_limit_is_exact_and_use_restarts_it(silence: int, good: bool) -> None:
    desk = Desk()
    token = desk.open().token
    desk.good(token, WALL + 40 * MINUTE)
    last = WALL + 80 * MINUTE
    desk.good(token, last)
    result = desk.registry.check(token, last + silence)
    assert isinstance(result, Session) if good else result is Code.TOKEN_EXPIRED


def test_without_an_idle_limit_only_the_lifetime_counts() -> None:
    desk = Desk(idle_timeout_ms=None)
    token = desk.open().token
    assert desk.good(token, WALL + DAY - 1).valid_until == WALL + DAY


def test_touch_counts_as_use() -> None:
    desk = Desk()
    session = desk.open().session
    desk.registry.touch(session, WALL + 50 * MINUTE)
    assert desk.registry.info(session.id, WALL + 100 * MINUTE).last_used_at == WALL + 50 * MINUTE


@pytest.mark.parametrize("use", ["touch", "check"])
def test_use_does_not_go_back_with_the_clock(use: str) -> None:
    desk = Desk()
    opened = desk.open()
    desk.good(opened.token, WALL + MINUTE)
    if use == "touch":
        desk.registry.touch(opened.session, WALL - DAY)
    else:
        assert desk.good(opened.token, WALL - DAY).valid_until == WALL + MINUTE + HOUR
    assert desk.registry.info(opened.session.id, WALL).last_used_at == WALL + MINUTE


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("seen_by", ["check", "clean", "info", "list", "open"])
@pytest.mark.parametrize("step_back", [1, HOUR, 2 * DAY])
def test_nothing_comes_back_to_life_when_the_clock_goes_back(
    refresh: bool, seen_by: str, step_back: int
) -> None:
    desk = Desk(refresh=refresh)
    opened = desk.open()
    end = WALL + DAY
    if seen_by == "check":
        desk.code(opened.token, end)
    elif seen_by == "clean":
        assert desk.clean(end) == 1
    elif seen_by == "info":
        if refresh:
            assert not desk.registry.info(opened.session.id, end).live
        else:
            assert desk.registry.list("alice", end) == []
    elif seen_by == "list":
        desk.registry.list("alice", end)
    else:
        desk.open("alice", end)
    assert desk.code(opened.token, end - step_back) is Code.TOKEN_EXPIRED
    assert desk.registry.expired == 1


@pytest.mark.parametrize("reason", ["expired", "idle"])
@pytest.mark.parametrize("refresh", [False, True])
def test_the_end_by_time_is_told_once(reason: str, refresh: bool) -> None:
    desk = Desk(refresh=refresh, idle_timeout_ms=None if reason == "expired" else HOUR)
    opened = desk.open()
    generation = desk.registry.generation
    for extra in range(3):
        assert (
            desk.code(opened.token, WALL + DAY - (1 if reason == "idle" else 0) + extra) is Code.TOKEN_EXPIRED
        )
    assert desk.ended == [(opened.session.id, Code.TOKEN_EXPIRED, reason)]
    assert (desk.registry.expired, desk.registry.checks_refused) == (1, 3)
    assert desk.registry.generation > generation
    assert (len(desk.registry), desk.registry.lapsed) == (0, int(refresh))


def test_a_check_alone_leaves_the_generation_as_it_is() -> None:
    desk = Desk()
    token = desk.open().token
    generation = desk.registry.generation
    desk.open("bob")
    desk.good(token, WALL + 1)
    desk.code(NONE)
    assert desk.registry.generation == generation


def test_a_dead_token_is_remembered_for_its_time_and_no_longer() -> None:
    desk = Desk(dead_keep_ms=10 * MINUTE)
    opened = desk.open()
    desk.good(opened.token, WALL + MINUTE)  # the time of death: revoke is told none
    desk.registry.revoke(opened.session.id, user=None, reason="test")
    assert desk.code(opened.token, WALL + 11 * MINUTE - 1) is Code.TOKEN_REVOKED
    assert desk.code(opened.token, WALL + 11 * MINUTE) is Code.UNAUTHENTICATED
    assert desk.registry.tombstones == 1
    desk.clean(WALL + 11 * MINUTE)
    assert desk.registry.tombstones == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 10])
def test_only_so_many_dead_are_remembered_the_last_ones(limit: int) -> None:
    desk = Desk(dead_limit=limit)
    tokens = []
    for number in range(12):
        opened = desk.open(f"user {number}")
        tokens.append(opened.token)
        desk.registry.close(opened.session)
    assert desk.registry.tombstones == limit
    codes = [desk.code(token) for token in tokens]
    assert codes == [Code.UNAUTHENTICATED] * (12 - limit) + [Code.TOKEN_REVOKED] * limit


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("refresh", [False, True])
def test_expiry_is_told_even_if_nothing_is_remembered(limit: int, refresh: bool) -> None:
    desk = Desk(dead_limit=limit, refresh=refresh)
    token = desk.open().token
    assert desk.code(token, WALL + DAY) is Code.TOKEN_EXPIRED


def test_no_token_is_in_the_table() -> None:
    desk = Desk()
    tokens = []
    for number in range(10):
        opened = desk.open(f"user {number}")
        tokens += [opened.token, opened.refresh_token]
    table = desk.registry._table
    memory = table.bytes[: table.slab.size * table.slab.record_size].tobytes()
    for token in tokens:
        assert token is not None
        assert token not in memory
        assert token[:16] not in memory
        assert token[16:] not in memory


def test_tokens_come_whole_from_the_source() -> None:
    given: list[bytes] = []

    def entropy(size: int) -> bytes:
        given.append(os.urandom(size))
        return given[-1]

    desk = Desk()
    desk.registry._entropy = entropy
    opened = desk.open()
    assert given == [opened.token, opened.refresh_token]
    desk.refresh(opened.refresh_token)
    assert [len(each) for each in given] == [32, 32, 32, 16]


@pytest.mark.parametrize("again", ["token", "family"])
def test_a_source_that_repeats_itself_is_refused(again: str) -> None:
    desk = Desk()
    values = iter([b"a" * 32, b"b" * 32, (b"a" if again == "token" else b"c") * 32, b"b" * 32])
    desk.registry._entropy = lambda size: next(values)[:size]
    desk.open()
    with pytest.raises(RuntimeError, match="repeated itself"):
        desk.open("bob")
    assert len(desk.registry) == 1
    assert desk.registry.list("bob", WALL) == []


def test_bits_of_tokens_are_evenly_spread() -> None:
    desk = Desk()
    desk.registry._entropy = os.urandom
    ones = 0
    for number in range(1000):
        opened = desk.open(f"user {number}")
        assert opened.refresh_token is not None
        ones += int.from_bytes(opened.token + opened.refresh_token, "big").bit_count()
    bits = 1000 * 512
    assert abs(ones - bits / 2) < 5 * (bits / 4) ** 0.5
