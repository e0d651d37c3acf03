"""Opening sessions, and how many a user may have."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, Desk
from zcproto.errors import Code, InvalidArgument, NotFound, ResourceExhausted
from zcproto.sessions.registry import MAX_TEXT


def test_an_opened_session_is_told_in_full() -> None:
    desk = Desk()
    opened = desk.open("alice", operator=True, client="zc/2.0", address="2001:db8::1")
    assert len(opened.token) == 32
    assert opened.refresh_token is not None
    assert len(opened.refresh_token) == 32
    assert opened.refresh_expires_at == WALL + 30 * DAY
    session = opened.session
    assert (session.user, session.operator) == ("alice", True)
    assert (session.expires_at, session.valid_until) == (WALL + DAY, WALL + HOUR)
    info = desk.registry.info(session.id, WALL)
    assert (info.id, info.user, info.client, info.address) == (session.id, "alice", "zc/2.0", "2001:db8::1")
    assert (info.created_at, info.last_used_at, info.expires_at) == (WALL, WALL, WALL + DAY)
    assert (info.live, info.bound, info.operator) == (True, False, True)
    assert info.refresh_expires_at == WALL + 30 * DAY
    assert (len(desk.registry), desk.registry.opened) == (1, 1)


def test_without_refresh_there_is_no_refresh_token() -> None:
    desk = Desk(refresh=False)
    opened = desk.open()
    assert (opened.refresh_token, opened.refresh_expires_at) == (None, None)
    assert desk.registry.info(opened.session.id, WALL).refresh_expires_at is None


def test_ids_and_tokens_are_all_different() -> None:
    desk = Desk()
    opened = [desk.open(f"user {number // 5}") for number in range(200)]
    assert len({each.session.id for each in opened}) == 200
    assert len({each.token for each in opened} | {each.refresh_token for each in opened}) == 400


@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_one_more_than_the_limit_is_refused(limit: int) -> None:
    desk = Desk(per_user=limit)
    tokens = [desk.open().token for _ in range(limit)]
    with pytest.raises(ResourceExhausted) as caught:
        desk.open()
    assert caught.value.details == {"limit": limit}
    assert all(desk.good(token) for token in tokens)
    assert (len(desk.registry), desk.registry.opened) == (limit, limit)
    assert desk.ended == []
    desk.open("bob")


@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_the_oldest_is_evicted_if_so_configured(limit: int) -> None:
    desk = Desk(per_user=limit, when_full="evict_oldest")
    opened = [desk.open() for _ in range(limit)]
    for round_, oldest in enumerate(opened):
        generation = desk.registry.generation
        desk.open()
        assert desk.code(oldest.token) is Code.SESSION_REPLACED
        assert desk.registry.generation > generation
        assert desk.ended[round_][:2] == (oldest.session.id, Code.SESSION_REPLACED)
        assert len(desk.registry) == limit
    assert desk.registry.replaced == len(desk.ended) == limit


def test_the_oldest_is_the_one_opened_first_whatever_was_used_or_refreshed_since() -> None:
    desk = Desk(per_user=2, when_full="evict_oldest")
    first, second = desk.open(), desk.open()
    refreshed = desk.refresh(first.refresh_token, WALL + 5)
    desk.good(refreshed.token, WALL + 10)
    desk.open(wall=WALL + 20)
    assert desk.code(refreshed.token, WALL + 20) is Code.SESSION_REPLACED
    assert desk.good(second.token, WALL + 20)


@pytest.mark.parametrize("when_full", ["refuse", "evict_oldest"])
def test_a_lapsed_session_makes_room_without_a_word(when_full: str) -> None:
    desk = Desk(per_user=2, when_full=when_full)
    old, young = desk.open(), desk.open(wall=WALL + HOUR - 1)
    desk.clean(WALL + HOUR)
    assert (len(desk.registry), desk.registry.lapsed) == (1, 1)
    told = len(desk.ended)
    newest = desk.open(wall=WALL + HOUR)
    assert len(desk.ended) == told
    assert desk.code(old.token, WALL + HOUR) is Code.TOKEN_EXPIRED
    assert desk.good(young.token, WALL + HOUR)
    assert desk.good(newest.token, WALL + HOUR)
    assert (desk.registry.lapsed, desk.registry.replaced) == (0, 0)
    with pytest.raises(NotFound):
        desk.registry.info(old.session.id, WALL + HOUR)


@pytest.mark.parametrize("lapsed", range(1, 6))
def test_a_user_is_never_locked_out_by_lapsed_sessions(lapsed: int) -> None:
    desk = Desk()
    for number in range(5):
        desk.open(wall=WALL if number < lapsed else WALL + HOUR)
    for _ in range(lapsed):
        desk.open(wall=WALL + HOUR)
    with pytest.raises(ResourceExhausted):
        desk.open(wall=WALL + HOUR)
    assert (len(desk.registry), desk.registry.lapsed) == (5, 0)


def test_the_oldest_lapsed_session_goes_first() -> None:
    desk = Desk(per_user=3)
    live, old, young = desk.open(), desk.open(), desk.open()
    desk.good(live.token, WALL + HOUR - 1)
    desk.open(wall=WALL + HOUR)
    assert desk.registry.info(young.session.id, WALL + HOUR).live is False
    with pytest.raises(NotFound):
        desk.registry.info(old.session.id, WALL + HOUR)
    assert desk.refresh(young.refresh_token, WALL + HOUR).session.id == young.session.id


@pytest.mark.parametrize("refresh", [False, True])
def test_expired_sessions_do_not_count_even_before_they_are_cleaned(refresh: bool) -> None:
    desk = Desk(refresh=refresh)
    opened = [desk.open() for _ in range(5)]
    desk.open(wall=WALL + DAY)
    assert len(desk.registry) == 1
    assert {each[0] for each in desk.ended} == {each.session.id for each in opened}


def test_expiry_noticed_on_a_refused_login_is_told_too() -> None:
    desk = Desk(per_user=1)
    desk.open("bob")
    old = desk.open("alice")
    desk.refresh(old.refresh_token, WALL + HOUR)  # notices that the token had lapsed
    with pytest.raises(ResourceExhausted):
        desk.open("alice", WALL + HOUR)
    assert desk.ended == [(old.session.id, Code.TOKEN_EXPIRED, "idle")]


def test_all_users_together_are_limited_too() -> None:
    desk = Desk(max_sessions=3)
    opened = [desk.open(f"user {number}") for number in range(3)]
    with pytest.raises(ResourceExhausted) as caught:
        desk.open("one more")
    assert set(caught.value.details) == {"retry_after_ms"}
    desk.registry.close(opened[0].session)
    desk.open("one more")


def test_the_dead_take_no_place_of_the_living() -> None:
    desk = Desk(max_sessions=1, dead_limit=600)
    for number in range(500):
        opened = desk.open(f"user {number}")
        desk.refresh(opened.refresh_token)
        desk.registry.close(opened.session)
    assert desk.registry.tombstones == 600


@pytest.mark.parametrize("field", ["user", "client"])
@pytest.mark.parametrize("length", [MAX_TEXT, MAX_TEXT + 1, 10**6])
def test_names_have_a_limit(field: str, length: int) -> None:
    desk = Desk()
    arguments = {"user": "alice", "client": "zc/1"} | {field: "x" * length}
    if length <= MAX_TEXT:
        assert desk.open(**arguments).session.user == arguments["user"]
    else:
        with pytest.raises(InvalidArgument, match=field):
            desk.open(**arguments)
        assert desk.registry.opened == 0


@pytest.mark.parametrize("text", ["", "ü" * 128, "\ud800", "a\0b", "日本", "\n", "x" * 24])
def test_any_text_is_kept_as_it_is(text: str) -> None:
    desk = Desk()
    session = desk.open(text, client=text, address=text).session
    info = desk.registry.info(session.id, WALL)
    assert (info.user, info.client, info.address) == (text, text, text)
    assert [each.id for each in desk.registry.list(text, WALL)] == [session.id]


def test_a_users_sessions_are_listed_the_oldest_first() -> None:
    desk = Desk()
    ids = []
    for number in range(5):
        ids.append(desk.open("alice", WALL + number).session.id)
        desk.open("bob", WALL + number)
    assert [info.id for info in desk.registry.list("alice", WALL + 9)] == ids
    assert [info.created_at for info in desk.registry.list("alice", WALL + 9)] == [WALL + n for n in range(5)]
    assert desk.registry.list("nobody", WALL) == []


def test_a_lapsed_session_is_listed_as_such() -> None:
    desk = Desk()
    desk.open()
    (info,) = desk.registry.list("alice", WALL + HOUR)
    assert not info.live
    assert desk.registry.list("alice", WALL + 30 * DAY) == []


@pytest.mark.parametrize("session_id", ["", "x", "A" * 22, "A" * 21 + "B", "\ud800" * 22, "x" * 10**5])
def test_an_unknown_id_is_not_found(session_id: str) -> None:
    desk = Desk()
    desk.open()
    with pytest.raises(NotFound):
        desk.registry.info(session_id, WALL)
    assert not desk.registry.revoke(session_id, user=None, reason="test")


def test_a_second_observer_is_told_too() -> None:
    desk = Desk()
    other: list[str] = []
    desk.registry.observers.append(lambda session_id, code, reason: other.append(session_id))
    session = desk.open().session
    desk.registry.close(session)
    assert other == [session.id] == [each[0] for each in desk.ended]


def test_nothing_is_kept_for_nobody_to_hear() -> None:
    desk = Desk()
    desk.registry.observers.clear()
    desk.registry.close(desk.open().session)
    assert desk.registry._ended == []


def test_an_observer_sees_the_change_complete() -> None:
    desk = Desk(when_full="evict_oldest", per_user=1)
    first = desk.open()
    seen: list[tuple[object, int]] = []
    desk.registry.observers.append(
        lambda *_: seen.append((desk.registry.check(first.token, WALL), len(desk.registry)))
    )
    desk.open()
    assert seen == [(Code.SESSION_REPLACED, 1)]
