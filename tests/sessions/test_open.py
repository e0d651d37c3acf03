"""Test opening sessions and the limits per user and in total."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, RegistryHarness
from zcproto.common.roles import OPERATORS
from zcproto.errors import Code, InvalidArgument, NotFound, ResourceExhausted, TokenExpired
from zcproto.sessions import Session
from zcproto.sessions.registry import MAX_TEXT


def test_opened_session_has_all_fields(harness: RegistryHarness) -> None:
    opened = harness.open("alice", roles=OPERATORS, client="zc/2.0", address="2001:db8::1")
    assert len(opened.token) == 32
    assert opened.refresh_token is not None
    assert len(opened.refresh_token) == 32
    assert opened.refresh_expires_at == WALL + 30 * DAY
    session = opened.session
    assert (session.user, session.roles) == ("alice", OPERATORS)
    assert (session.expires_at, session.valid_until) == (WALL + DAY, WALL + HOUR)
    info = harness.registry.info(session.id, WALL)
    assert (info.id, info.user, info.client, info.address) == (session.id, "alice", "zc/2.0", "2001:db8::1")
    assert (info.created_at, info.last_used_at, info.expires_at) == (WALL, WALL, WALL + DAY)
    assert (info.live, info.bound, info.roles) == (True, False, OPERATORS)
    assert info.refresh_expires_at == WALL + 30 * DAY
    assert (len(harness.registry), harness.registry.opened) == (1, 1)


@pytest.mark.requirement("refresh")
@pytest.mark.parametrize(
    ("lifetime", "idle", "valid_for"),
    [(HOUR, DAY, HOUR), (DAY, HOUR, HOUR), (HOUR, None, HOUR)],
)
def test_session_is_valid_until_the_earlier_of_both_limits(
    lifetime: int, idle: int | None, valid_for: int
) -> None:
    harness = RegistryHarness(lifetime_ms=lifetime, idle_timeout_ms=idle)
    opened = harness.open()
    assert opened.session.valid_until == WALL + valid_for
    assert harness.good(opened.token).valid_until == WALL + valid_for
    assert opened.session.expiring_at == harness.good(opened.token).expiring_at == WALL + lifetime * 9 // 10
    refreshed = harness.refresh(opened.refresh_token, WALL + 1)
    assert refreshed.session.valid_until == WALL + 1 + valid_for
    assert refreshed.session.expiring_at == WALL + 1 + lifetime * 9 // 10
    repeated = harness.refresh(opened.refresh_token, WALL + 2)
    assert (repeated.token, repeated.session.valid_until) == (refreshed.token, WALL + 1 + valid_for)


def test_without_refresh_no_refresh_token_is_issued() -> None:
    harness = RegistryHarness(refresh=False)
    opened = harness.open()
    assert (opened.refresh_token, opened.refresh_expires_at) == (None, None)
    assert harness.registry.info(opened.session.id, WALL).refresh_expires_at is None


@pytest.mark.requirement("token_size")
def test_ids_and_tokens_are_unique(harness: RegistryHarness) -> None:
    opened = [harness.open(f"user {number // 5}") for number in range(200)]
    assert len({each.session.id for each in opened}) == 200
    assert len({each.token for each in opened} | {each.refresh_token for each in opened}) == 400


@pytest.mark.requirement("per_user")
@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_session_above_limit_is_refused(limit: int) -> None:
    harness = RegistryHarness(per_user=limit)
    tokens = [harness.open().token for _ in range(limit)]
    with pytest.raises(ResourceExhausted) as caught:
        harness.open()
    assert caught.value.details == {"limit": limit}
    assert all(harness.good(token) for token in tokens)
    assert (len(harness.registry), harness.registry.opened) == (limit, limit)
    assert harness.ended == []
    harness.open("bob")


@pytest.mark.requirement("per_user")
@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_oldest_session_is_evicted_if_configured(limit: int) -> None:
    harness = RegistryHarness(per_user=limit, when_full="evict_oldest")
    opened = [harness.open() for _ in range(limit)]
    for round_, oldest in enumerate(opened):
        generation = harness.registry.generation
        harness.open()
        assert harness.code(oldest.token) is Code.SESSION_REPLACED
        assert harness.registry.generation > generation
        assert harness.ended[round_][:2] == (oldest.session.id, Code.SESSION_REPLACED)
        assert len(harness.registry) == limit
    assert harness.registry.replaced == len(harness.ended) == limit


@pytest.mark.requirement("per_user")
def test_oldest_disconnected_session_is_evicted_as_if_it_had_expired() -> None:
    harness = RegistryHarness(per_user=3)
    first, second, third = (harness.open() for _ in range(3))
    disconnected = {second.session.raw_id, third.session.raw_id}
    harness.registry.is_disconnected = disconnected.__contains__
    newest = harness.open()
    assert harness.code(second.token) is Code.TOKEN_EXPIRED
    assert harness.ended == [
        (
            second.session.id,
            Code.TOKEN_EXPIRED,
            "ended without a connection, to make room for a newer session",
        )
    ]
    assert all(harness.good(each.token) for each in (first, third, newest))
    assert (len(harness.registry), harness.registry.replaced) == (3, 1)
    with pytest.raises(TokenExpired, match="open a new one"):
        harness.refresh(second.refresh_token)


def test_session_is_refused_while_all_are_in_use_and_the_message_has_the_cure() -> None:
    harness = RegistryHarness(per_user=2)
    used = [harness.open() for _ in range(2)]
    with pytest.raises(ResourceExhausted, match="in use; close another of its clients") as caught:
        harness.open()
    assert caught.value.details == {"limit": 2}
    assert all(harness.good(each.token) for each in used)
    refusing = RegistryHarness(per_user=1, when_full="refuse")
    refusing.registry.is_disconnected = lambda session_id: True
    refusing.open()
    with pytest.raises(ResourceExhausted, match="reached the limit of sessions; close one first"):
        refusing.open()


def test_lowered_limit_evicts_disconnected_sessions_until_it_holds() -> None:
    harness = RegistryHarness(per_user=5)
    opened = [harness.open() for _ in range(5)]
    harness.registry.is_disconnected = lambda session_id: session_id != opened[0].session.raw_id
    harness.registry.reconfigure(replace(harness.settings, per_user=2))
    newest = harness.open()
    assert [info.id for info in harness.registry.list("alice", WALL)] == [
        opened[0].session.id,
        newest.session.id,
    ]


def test_oldest_session_is_by_opening_not_by_use() -> None:
    harness = RegistryHarness(per_user=2, when_full="evict_oldest")
    first, second = harness.open(), harness.open()
    refreshed = harness.refresh(first.refresh_token, WALL + 5)
    harness.good(refreshed.token, WALL + 10)
    harness.open(wall=WALL + 20)
    assert harness.code(refreshed.token, WALL + 20) is Code.SESSION_REPLACED
    assert harness.good(second.token, WALL + 20)


@pytest.mark.parametrize("when_full", ["refuse", "evict_oldest"])
def test_lapsed_session_is_evicted_silently(when_full: str) -> None:
    harness = RegistryHarness(per_user=2, when_full=when_full)
    old, young = harness.open(), harness.open(wall=WALL + HOUR - 1)
    harness.clean(WALL + HOUR)
    assert (len(harness.registry), harness.registry.lapsed) == (1, 1)
    announced = len(harness.ended)
    newest = harness.open(wall=WALL + HOUR)
    assert len(harness.ended) == announced
    assert harness.code(old.token, WALL + HOUR) is Code.TOKEN_EXPIRED
    assert harness.good(young.token, WALL + HOUR)
    assert harness.good(newest.token, WALL + HOUR)
    assert (harness.registry.lapsed, harness.registry.replaced) == (0, 0)
    with pytest.raises(NotFound):
        harness.registry.info(old.session.id, WALL + HOUR)


@pytest.mark.parametrize("lapsed", range(1, 6))
def test_lapsed_sessions_never_lock_a_user_out(harness: RegistryHarness, lapsed: int) -> None:
    for number in range(5):
        harness.open(wall=WALL if number < lapsed else WALL + HOUR)
    for _ in range(lapsed):
        harness.open(wall=WALL + HOUR)
    with pytest.raises(ResourceExhausted):
        harness.open(wall=WALL + HOUR)
    assert (len(harness.registry), harness.registry.lapsed) == (5, 0)


def test_oldest_lapsed_session_is_evicted_first() -> None:
    harness = RegistryHarness(per_user=3)
    live, old, young = harness.open(), harness.open(), harness.open()
    harness.good(live.token, WALL + HOUR - 1)
    harness.open(wall=WALL + HOUR)
    assert harness.registry.info(young.session.id, WALL + HOUR).live is False
    with pytest.raises(NotFound):
        harness.registry.info(old.session.id, WALL + HOUR)
    assert harness.refresh(young.refresh_token, WALL + HOUR).session.id == young.session.id


@pytest.mark.parametrize("refresh", [False, True])
def test_expired_sessions_do_not_count_before_cleaning(refresh: bool) -> None:
    harness = RegistryHarness(refresh=refresh)
    opened = [harness.open() for _ in range(5)]
    harness.open(wall=WALL + DAY)
    assert len(harness.registry) == 1
    assert {each[0] for each in harness.ended} == {each.session.id for each in opened}


def test_expiry_found_by_refused_login_is_announced() -> None:
    harness = RegistryHarness(per_user=1)
    harness.open("bob")
    old = harness.open("alice")
    harness.refresh(old.refresh_token, WALL + HOUR)  # finds the token expired
    with pytest.raises(ResourceExhausted):
        harness.open("alice", WALL + HOUR)
    assert harness.ended == [(old.session.id, Code.TOKEN_EXPIRED, "idle")]


def test_total_number_of_sessions_is_limited() -> None:
    harness = RegistryHarness(max_sessions=3)
    opened = [harness.open(f"user {number}") for number in range(3)]
    with pytest.raises(ResourceExhausted) as caught:
        harness.open("one more")
    assert set(caught.value.details) == {"retry_after_ms"}
    harness.registry.close(opened[0].session)
    harness.open("one more")


def test_session_found_expired_while_the_server_is_full_is_announced() -> None:
    harness = RegistryHarness(max_sessions=1, refresh=True)
    old = harness.open("alice")
    with pytest.raises(ResourceExhausted):
        harness.open("alice", WALL + HOUR)
    assert harness.ended == [(old.session.id, Code.TOKEN_EXPIRED, "idle")]


def test_tombstones_do_not_count_as_sessions() -> None:
    harness = RegistryHarness(max_sessions=1, dead_limit=600)
    for number in range(500):
        opened = harness.open(f"user {number}")
        harness.refresh(opened.refresh_token)
        harness.registry.close(opened.session)
    assert harness.registry.tombstones == 600


@pytest.mark.parametrize("field", ["user", "client"])
@pytest.mark.parametrize("length", [MAX_TEXT, MAX_TEXT + 1, 10**6])
def test_names_are_limited_in_length(harness: RegistryHarness, field: str, length: int) -> None:
    arguments = {"user": "alice", "client": "zc/1"} | {field: "x" * length}
    if length <= MAX_TEXT:
        assert harness.open(**arguments).session.user == arguments["user"]
    else:
        with pytest.raises(InvalidArgument, match=field):
            harness.open(**arguments)
        assert harness.registry.opened == 0


@pytest.mark.parametrize("text", ["", "ü" * 128, "\ud800", "a\0b", "日本", "\n", "x" * 24])
def test_any_text_is_stored_unchanged(harness: RegistryHarness, text: str) -> None:
    session = harness.open(text, client=text, address=text).session
    info = harness.registry.info(session.id, WALL)
    assert (info.user, info.client, info.address) == (text, text, text)
    assert [each.id for each in harness.registry.list(text, WALL)] == [session.id]


def test_sessions_of_user_are_listed_oldest_first(harness: RegistryHarness) -> None:
    ids = []
    for number in range(5):
        ids.append(harness.open("alice", WALL + number).session.id)
        harness.open("bob", WALL + number)
    assert [info.id for info in harness.registry.list("alice", WALL + 9)] == ids
    assert [info.created_at for info in harness.registry.list("alice", WALL + 9)] == [
        WALL + n for n in range(5)
    ]
    assert harness.registry.list("mallory", WALL) == []


def test_lapsed_session_is_listed_as_not_live(harness: RegistryHarness) -> None:
    harness.open()
    (info,) = harness.registry.list("alice", WALL + HOUR)
    assert not info.live
    assert harness.registry.list("alice", WALL + 30 * DAY) == []


@pytest.mark.parametrize("session_id", ["", "x", "A" * 22, "A" * 21 + "B", "\ud800" * 22, "x" * 10**5])
def test_unknown_id_is_not_found(harness: RegistryHarness, session_id: str) -> None:
    harness.open()
    with pytest.raises(NotFound):
        harness.registry.info(session_id, WALL)
    assert not harness.registry.revoke(session_id, user=None, reason="test")


def test_every_observer_is_notified(harness: RegistryHarness) -> None:
    other: list[str] = []
    harness.registry.observers.append(lambda session_id, code, reason: other.append(session_id))
    session = harness.open().session
    harness.registry.close(session)
    assert other == [session.id] == [each[0] for each in harness.ended]


def test_new_observer_is_not_notified_of_earlier_endings(harness: RegistryHarness) -> None:
    observers = harness.registry.observers.copy()
    harness.registry.observers.clear()
    harness.registry.close(harness.open().session)
    harness.registry.observers += observers
    later = harness.open().session
    harness.registry.close(later)
    assert [each[0] for each in harness.ended] == [later.id]


def test_observer_sees_completed_change() -> None:
    harness = RegistryHarness(when_full="evict_oldest", per_user=1)
    first = harness.open()
    seen: list[tuple[object, int]] = []
    harness.registry.observers.append(
        lambda *_: seen.append((harness.registry.check(first.token, WALL), len(harness.registry)))
    )
    harness.open()
    assert seen == [(Code.SESSION_REPLACED, 1)]


def test_session_ends_at_a_given_time_and_has_no_refresh_token_that_would_not_prolong_it() -> None:
    harness = RegistryHarness()
    ends_at = WALL + HOUR
    opened = harness.registry.open("ada", client="", address="", wall=WALL, ends_at=ends_at)
    assert (opened.session.expires_at, opened.refresh_token, opened.refresh_expires_at) == (
        ends_at,
        None,
        None,
    )
    assert isinstance(harness.registry.check(opened.token, ends_at - 1), Session)
    assert harness.registry.check(opened.token, ends_at) is Code.TOKEN_EXPIRED


def test_refreshed_session_ends_at_a_given_time(harness: RegistryHarness) -> None:
    ends_at = WALL + 30 * HOUR
    opened = harness.registry.open("ada", client="", address="", wall=WALL, ends_at=ends_at)
    assert (opened.session.expires_at, opened.refresh_expires_at) == (WALL + 24 * HOUR, ends_at)
    assert opened.refresh_token is not None
    again = harness.registry.refresh(opened.refresh_token, client="", address="", wall=WALL + 20 * HOUR)
    assert (again.session.expires_at, again.refresh_expires_at) == (ends_at, ends_at)


def test_roles_share_their_text_and_leave_none_behind(harness: RegistryHarness) -> None:
    roles = frozenset({"admin", "operator"})
    sessions = [harness.open(f"u{number}", roles=roles).session for number in range(3)]
    assert {each.roles for each in sessions} == {roles}
    assert len(harness.table.keys) == 1
    for each in sessions:
        harness.registry.close(each)
    assert len(harness.table.keys) == 0
