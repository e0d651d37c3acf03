"""Cleaning in slices: what time has ended, and what need not be remembered any more."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, Desk
from zcproto.errors import Code
from zcproto.sessions.slab import CHUNK


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("max_slots", [1, 5, 7, 100, 5000])
def test_slices_end_everything_that_time_has_ended(refresh: bool, max_slots: int) -> None:
    desk = Desk(refresh=refresh)
    old = [desk.open(f"old {number}") for number in range(30)]
    young = [desk.open(f"young {number}", WALL + HOUR) for number in range(30)]
    expired = 0
    while desk.registry.sweeps == 0:
        expired += desk.registry.clean(WALL + HOUR, max_slots)
    assert expired == desk.registry.expired == len(desk.ended) == 30
    assert (len(desk.registry), desk.registry.lapsed) == (30, 30 * refresh)
    assert all(desk.code(each.token, WALL + HOUR) is Code.TOKEN_EXPIRED for each in old)
    assert all(desk.good(each.token, WALL + HOUR) for each in young)


def test_what_is_still_good_is_left_alone() -> None:
    desk = Desk()
    desk.open()
    generation = desk.registry.generation
    assert desk.clean(WALL + HOUR - 1) == 0
    assert desk.registry.generation == generation


def test_a_slice_ends_at_the_end_of_the_table() -> None:
    desk = Desk()
    desk.open()
    for sweeps in range(1, 4):
        desk.registry.clean(WALL, 10 * CHUNK)
        assert desk.registry.sweeps == sweeps


def test_an_empty_table_is_swept_in_no_time() -> None:
    desk = Desk()
    assert desk.registry.clean(WALL, 1) == 0
    assert desk.registry.sweeps == 1


def test_forgetting_does_not_keep_a_slice_from_its_round() -> None:
    desk = Desk(dead_keep_ms=0)
    desk.open("alice")
    for number in range(100):
        desk.registry.close(desk.open(f"user {number}").session)
    assert desk.registry.clean(WALL + HOUR, 20) == 1
    assert 90 < desk.registry.tombstones < 100


def test_cleaning_goes_on_giving_memory_back_where_a_call_stopped() -> None:
    desk = Desk()
    slab = desk.registry._table.slab
    *slots, last = [slab.allocate() for _ in range(12 * CHUNK)]
    for slot in (*slots, last):
        slab.free_slot(slot)
    assert slab.size == 4 * CHUNK
    desk.registry.clean(WALL, 1)
    assert slab.size == CHUNK


def test_a_lapsed_session_ends_when_its_refresh_token_does() -> None:
    desk = Desk()
    opened = desk.open()
    assert desk.clean(WALL + DAY) == 1
    assert desk.clean(WALL + 30 * DAY - 1) == 0
    assert desk.registry.kept == 1
    assert desk.clean(WALL + 30 * DAY) == 0
    assert (desk.registry.kept, desk.registry.expired, len(desk.ended)) == (0, 1, 1)
    assert desk.code(opened.token, WALL + 30 * DAY) is Code.TOKEN_EXPIRED


def test_the_dead_are_forgotten_in_their_time() -> None:
    desk = Desk()
    for number in range(50):
        desk.registry.close(desk.open(f"user {number}", WALL + number * MINUTE).session)
    desk.clean(WALL + 49 * MINUTE)
    assert desk.registry.tombstones == 10
    desk.clean(WALL + 58 * MINUTE)
    assert desk.registry.tombstones == 1
    desk.clean(WALL + 59 * MINUTE)
    assert desk.registry.tombstones == 0
    assert desk.registry._table.slab.used == 0


@pytest.mark.parametrize("back", [1, HOUR, DAY])
def test_a_clock_that_goes_back_ends_and_forgets_nothing(back: int) -> None:
    desk = Desk()
    live, dead = desk.open(), desk.open()
    desk.good(live.token, WALL + 30 * MINUTE)
    desk.registry.close(dead.session)
    assert desk.clean(WALL - back) == 0
    assert desk.good(live.token, WALL - back)
    assert desk.code(dead.token, WALL - back) is Code.TOKEN_REVOKED


def test_a_clock_far_ahead_ends_all_and_tells_it() -> None:
    desk = Desk()
    opened = [desk.open(f"user {number}") for number in range(20)]
    desk.clean(WALL + 365 * DAY)
    assert {each[0] for each in desk.ended} == {each.session.id for each in opened}
    assert desk.registry.kept == 0


def test_strings_are_counted_through_refreshes() -> None:
    desk = Desk()
    first = desk.open("alice", client="a", address="1")
    second = desk.open("alice", client="a", address="1")
    assert desk.strings == (1, 1, 1)
    desk.refresh(second.refresh_token, client="b", address="1")
    assert desk.strings == (1, 2, 1)
    desk.refresh(first.refresh_token, client="b", address="2")
    assert desk.strings == (1, 1, 2)
    desk.registry.revoke_user("alice", "test")
    assert desk.strings == (0, 0, 0)
