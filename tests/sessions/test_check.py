"""Test the check of a token: results, expiry and tombstones."""

from __future__ import annotations

import os

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, RegistryHarness, new_session
from zcproto.common.roles import OPERATORS
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, Session

NONE = bytes(32)


def test_valid_token_gives_its_session(harness: RegistryHarness) -> None:
    opened = harness.open("alice", roles=OPERATORS)
    session = harness.good(opened.token, WALL + 5)
    assert session.id == opened.session.id
    assert (session.user, session.roles, session.slot) == ("alice", OPERATORS, opened.session.slot)
    assert session.expires_at == WALL + DAY
    assert session.valid_until == WALL + 5 + HOUR
    assert session.expiring_at == WALL + DAY - DAY // 10


def test_tokens_give_their_own_sessions(harness: RegistryHarness) -> None:
    opened = [harness.open(f"user {number}") for number in range(50)]
    for number, each in enumerate(opened):
        session = harness.good(each.token)
        assert (session.user, session.id) == (f"user {number}", each.session.id)


@pytest.mark.parametrize("token", [NONE, b"", b"x", b"x" * 31, b"x" * 33, b"x" * 100_000, bytes(range(32))])
@pytest.mark.parametrize("filled", [False, True])
def test_unknown_token_is_unauthenticated(harness: RegistryHarness, token: bytes, filled: bool) -> None:
    if filled:
        for number in range(20):
            harness.open(f"user {number}")
    assert harness.code(token) is Code.UNAUTHENTICATED


def test_token_with_one_bit_changed_is_refused(harness: RegistryHarness) -> None:
    token = harness.open().token
    for bit in range(256):
        wrong = bytearray(token)
        wrong[bit // 8] ^= 1 << bit % 8
        assert harness.code(bytes(wrong)) is Code.UNAUTHENTICATED, bit
    harness.good(token)


def test_tokens_with_same_hash_prefix_are_distinguished(
    harness: RegistryHarness, opened: OpenedSession
) -> None:
    assert opened.refresh_token is not None
    assert harness.code(opened.refresh_token) is Code.UNAUTHENTICATED
    assert harness.good(opened.token).id == opened.session.id


@pytest.mark.requirement("expiration")
@pytest.mark.parametrize("idle", [None, HOUR])
@pytest.mark.parametrize(
    ("before_end", "good"), [(2, True), (1, True), (0, False), (-1, False), (-DAY, False)]
)
def test_absolute_expiry_is_exact_and_not_extended_by_use(
    idle: int | None, before_end: int, good: bool
) -> None:
    harness = RegistryHarness(idle_timeout_ms=idle)
    token = harness.open().token
    for minute in range(0, 24 * 60, 30):
        harness.good(token, WALL + minute * MINUTE)
    result = harness.registry.check(token, WALL + DAY - before_end)
    if good:
        assert isinstance(result, Session)
        assert result.valid_until == WALL + DAY
    else:
        assert result is Code.TOKEN_EXPIRED


@pytest.mark.requirement("expiration")
@pytest.mark.parametrize(("silence", "good"), [(0, True), (HOUR - 1, True), (HOUR, False), (HOUR + 1, False)])
def test_idle_limit_is_exact_and_restarted_by_use(harness: RegistryHarness, silence: int, good: bool) -> None:
    token = harness.open().token
    harness.good(token, WALL + 40 * MINUTE)
    last = WALL + 80 * MINUTE
    harness.good(token, last)
    result = harness.registry.check(token, last + silence)
    assert isinstance(result, Session) if good else result is Code.TOKEN_EXPIRED


def test_second_check_looks_nothing_up_and_counts_as_use(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = RegistryHarness()
    session = harness.good(harness.open().token)
    monkeypatch.setattr(harness.registry._tokens, "find", lambda digest: pytest.fail("looked up"))
    assert harness.registry.check_again(session, WALL + 50 * MINUTE)
    assert harness.registry.check_again(session, WALL + 100 * MINUTE)
    assert harness.registry.info(session.id, WALL + 100 * MINUTE).last_used_at == WALL + 100 * MINUTE
    assert not harness.registry.check_again(session, WALL + 160 * MINUTE)


def test_second_check_of_a_bound_session_counts_as_use(harness: RegistryHarness) -> None:
    opened = harness.registry.open("alice", key="device:d", client="", address="", wall=WALL)
    session = harness.good(opened.token)
    assert harness.registry.check_again(session, WALL + 50 * MINUTE)
    assert harness.registry.check_again(session, WALL + 100 * MINUTE)
    assert session.valid_until == WALL + 160 * MINUTE
    assert not harness.registry.check_again(session, WALL + 160 * MINUTE)


@pytest.mark.parametrize("change", ["expires_at", "flags"])
def test_second_check_refuses_a_session_that_has_changed(harness: RegistryHarness, change: str) -> None:
    session = harness.good(harness.open().token)
    column = getattr(harness.table, change)
    column[session.slot] ^= 1
    assert not harness.registry.check_again(session, WALL)
    column[session.slot] ^= 1
    assert harness.registry.check_again(session, WALL)


@pytest.mark.parametrize("how", ["refuse_all", "distrust"])
def test_second_check_fails_while_all_tokens_are_refused(harness: RegistryHarness, how: str) -> None:
    session = harness.good(harness.open().token)
    getattr(harness.registry, how)()
    assert not harness.registry.check_again(session, WALL)


def test_without_idle_limit_only_lifetime_counts() -> None:
    harness = RegistryHarness(idle_timeout_ms=None)
    token = harness.open().token
    assert harness.good(token, WALL + DAY - 1).valid_until == WALL + DAY


def test_touch_counts_as_use(harness: RegistryHarness) -> None:
    session = harness.open().session
    harness.registry.touch(session, WALL + 50 * MINUTE)
    assert harness.registry.info(session.id, WALL + 100 * MINUTE).last_used_at == WALL + 50 * MINUTE


@pytest.mark.parametrize("use", ["touch", "check"])
def test_last_use_does_not_go_back_with_clock(
    harness: RegistryHarness, opened: OpenedSession, use: str
) -> None:
    harness.good(opened.token, WALL + MINUTE)
    if use == "touch":
        harness.registry.touch(opened.session, WALL - DAY)
    else:
        assert harness.good(opened.token, WALL - DAY).valid_until == WALL + MINUTE + HOUR
    assert harness.registry.info(opened.session.id, WALL).last_used_at == WALL + MINUTE


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("seen_by", ["check", "clean", "info", "list", "open"])
@pytest.mark.parametrize("step_back", [1, HOUR, 2 * DAY])
def test_expired_session_stays_expired_when_clock_goes_back(
    refresh: bool, seen_by: str, step_back: int
) -> None:
    # An opening looks at the user's sessions at the limit only.
    harness = RegistryHarness(refresh=refresh, per_user=1)
    opened = harness.open()
    end = WALL + DAY
    if seen_by == "check":
        harness.code(opened.token, end)
    elif seen_by == "clean":
        assert harness.clean(end) == 1
    elif seen_by == "info":
        if refresh:
            assert not harness.registry.info(opened.session.id, end).live
        else:
            assert harness.registry.list("alice", end) == []
    elif seen_by == "list":
        harness.registry.list("alice", end)
    else:
        harness.open("alice", end)
    assert harness.code(opened.token, end - step_back) is Code.TOKEN_EXPIRED
    assert harness.registry.expired == 1


@pytest.mark.parametrize("reason", ["expired", "idle"])
@pytest.mark.parametrize("refresh", [False, True])
def test_expiry_is_announced_once(reason: str, refresh: bool) -> None:
    harness = RegistryHarness(refresh=refresh, idle_timeout_ms=None if reason == "expired" else HOUR)
    opened = harness.open()
    generation = harness.registry.generation
    for extra in range(3):
        assert (
            harness.code(opened.token, WALL + DAY - (1 if reason == "idle" else 0) + extra)
            is Code.TOKEN_EXPIRED
        )
    assert harness.ended == [(opened.session.id, Code.TOKEN_EXPIRED, reason)]
    assert (harness.registry.expired, harness.registry.checks_refused) == (1, 3)
    assert harness.registry.generation > generation
    assert (len(harness.registry), harness.registry.lapsed) == (0, int(refresh))


def test_check_does_not_change_generation(harness: RegistryHarness) -> None:
    token = harness.open().token
    generation = harness.registry.generation
    harness.open("bob")
    harness.good(token, WALL + 1)
    harness.code(NONE)
    assert harness.registry.generation == generation


def test_tombstone_is_kept_for_its_lifetime() -> None:
    harness = RegistryHarness(dead_keep_ms=10 * MINUTE)
    opened = harness.open()
    harness.good(opened.token, WALL + MINUTE)  # sets the time of death, which revoke does not pass
    harness.registry.revoke(opened.session.id, user=None, reason="test")
    assert harness.code(opened.token, WALL + 11 * MINUTE - 1) is Code.TOKEN_REVOKED
    assert harness.code(opened.token, WALL + 11 * MINUTE) is Code.UNAUTHENTICATED
    assert harness.registry.tombstones == 1
    harness.clean(WALL + 11 * MINUTE)
    assert harness.registry.tombstones == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 10])
def test_tombstones_are_limited_to_the_newest(limit: int) -> None:
    harness = RegistryHarness(dead_limit=limit)
    tokens = []
    for number in range(12):
        opened = harness.open(f"user {number}")
        tokens.append(opened.token)
        harness.registry.close(opened.session)
    assert harness.registry.tombstones == limit
    codes = [harness.code(token) for token in tokens]
    assert codes == [Code.UNAUTHENTICATED] * (12 - limit) + [Code.TOKEN_REVOKED] * limit


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("refresh", [False, True])
def test_expiry_is_announced_without_tombstones(limit: int, refresh: bool) -> None:
    harness = RegistryHarness(dead_limit=limit, refresh=refresh)
    token = harness.open().token
    assert harness.code(token, WALL + DAY) is Code.TOKEN_EXPIRED


def test_table_contains_no_token(harness: RegistryHarness) -> None:
    tokens = []
    for number in range(10):
        opened = harness.open(f"user {number}")
        tokens += [opened.token, opened.refresh_token]
    table = harness.table
    memory = table.bytes[: table.slab.size * table.slab.record_size].tobytes()
    for token in tokens:
        assert token is not None
        assert token not in memory
        assert token[:16] not in memory
        assert token[16:] not in memory


def test_tokens_come_unchanged_from_entropy() -> None:
    given: list[bytes] = []

    def entropy(size: int) -> bytes:
        given.append(os.urandom(size))
        return given[-1]

    harness = RegistryHarness(entropy)
    opened = harness.open()
    assert given == [opened.token, opened.refresh_token]
    harness.refresh(opened.refresh_token)
    assert [len(each) for each in given] == [32, 32, 32, 16]


@pytest.mark.parametrize("again", ["token", "family"])
@pytest.mark.parametrize("per_user", [1, 5])
def test_repeating_entropy_is_refused(again: str, per_user: int) -> None:
    repeated = [(b"a" if again == "token" else b"c") * 32, (b"b" if again == "family" else b"d") * 32]
    values = iter([b"a" * 32, b"b" * 32, *repeated, *repeated, *repeated])
    harness = RegistryHarness(lambda size: next(values)[:size], per_user=per_user, when_full="evict_oldest")
    opened = harness.open()
    for user in ("alice", "bob"):
        with pytest.raises(RuntimeError, match="repeated itself"):
            harness.open(user)
    with pytest.raises(RuntimeError, match="repeated itself"):
        new_session(harness.registry, "bob", client="zc/1", address="192.0.2.1", wall=WALL)
    assert (len(harness.registry), harness.registry.opened, harness.strings) == (1, 1, (1, 1, 1))
    assert harness.registry.list("bob", WALL) == []
    assert harness.good(opened.token).user == "alice"


@pytest.mark.requirement("token_size")
def test_token_bits_are_evenly_distributed() -> None:
    harness = RegistryHarness(os.urandom)
    ones = 0
    for number in range(1000):
        opened = harness.open(f"user {number}")
        assert opened.refresh_token is not None
        ones += int.from_bytes(opened.token + opened.refresh_token, "big").bit_count()
    bits = 1000 * 512
    assert abs(ones - bits / 2) < 5 * (bits / 4) ** 0.5
