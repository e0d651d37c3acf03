"""Every token is refused while nobody can say which are good; and sessions are forgotten in slices."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import WALL, Desk
from zcproto.errors import Code
from zcproto.sessions.token import id_from_text, id_text


def test_while_all_are_refused_no_token_is_good() -> None:
    desk = Desk()
    opened = desk.open()
    before = desk.registry.generation
    desk.registry.refuse_all()
    assert desk.registry.closed
    assert desk.registry.generation > before  # who remembers a session checks it again
    assert desk.code(opened.token) is Code.UNAVAILABLE
    assert desk.code(b"x" * 32) is Code.UNAVAILABLE
    assert desk.ended == []
    desk.registry.stop_refusing()
    assert not desk.registry.closed
    assert desk.good(opened.token).id == opened.session.id
    assert desk.code(b"x" * 32) is Code.UNAUTHENTICATED


def test_what_is_revoked_meanwhile_is_revoked_afterwards() -> None:
    desk = Desk()
    opened = desk.open()
    desk.registry.refuse_all()
    assert desk.registry.revoke(opened.session.id, user=None, reason="lost")
    desk.registry.stop_refusing()
    assert desk.code(opened.token) is Code.TOKEN_REVOKED
    assert desk.ended == [(opened.session.id, Code.TOKEN_REVOKED, "lost")]


def test_a_session_that_is_taken_in_meanwhile_is_good_afterwards() -> None:
    desk = Desk()
    desk.registry.refuse_all()
    opened = desk.open()
    assert desk.code(opened.token) is Code.UNAVAILABLE
    desk.registry.stop_refusing()
    desk.good(opened.token)


@pytest.mark.parametrize("max_slots", [1, 7, 10_000])
def test_all_sessions_but_some_are_forgotten_in_slices(max_slots: int) -> None:
    desk = Desk(per_user=1000)
    opened = [desk.open(f"user{number % 3}") for number in range(50)]
    desk.registry.revoke(opened[0].session.id, user=None, reason="")
    told = len(desk.ended)
    kept = {id_from_text(each.session.id) for each in opened[::10]}
    start, slices = desk.registry.forget_unless(kept.__contains__, 0, max_slots), 1
    while start:
        start, slices = desk.registry.forget_unless(kept.__contains__, start, max_slots), slices + 1
    assert slices > 1 or max_slots == 10_000
    codes = [
        None if not isinstance(code, Code) else code
        for code in (desk.registry.check(each.token, WALL) for each in opened)
    ]
    assert codes == [
        Code.TOKEN_REVOKED if n == 0 else None if n % 10 == 0 else Code.UNAUTHENTICATED for n in range(50)
    ]
    assert len(desk.ended) == told
    assert desk.registry.tombstones == 1


def test_what_ended_since_a_time_is_told_by_its_code() -> None:
    desk = Desk(per_user=1, when_full="evict_oldest")
    replaced, old, new, lives = desk.open("ada"), desk.open("old"), desk.open("new"), desk.open("lives")
    desk.open("ada")
    desk.refresh(lives.refresh_token, WALL + 10)  # its old token is remembered, the session lives
    desk.registry.info(old.session.id, WALL + 4)
    desk.registry.revoke(old.session.id, user=None, reason="")
    desk.registry.info(lives.session.id, WALL + 5)
    desk.registry.revoke(new.session.id, user=None, reason="")
    for code, since, expected in (
        (Code.TOKEN_REVOKED, WALL + 4, {old.session.id, new.session.id}),
        (Code.TOKEN_REVOKED, WALL + 5, {new.session.id}),
        (Code.TOKEN_REVOKED, WALL + 6, set()),
        (Code.SESSION_REPLACED, WALL, {replaced.session.id}),
    ):
        assert {id_text(ended.id) for ended in desk.registry.ended_since(code, since)} == expected


def test_an_empty_table_is_through_at_once() -> None:
    assert Desk().registry.forget_unless(lambda session_id: False, 0, 10) == 0
