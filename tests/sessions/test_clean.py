"""Test cleaning in slices: expired sessions and old tombstones."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, WALL, RegistryHarness, used_slots
from zcproto.errors import Code
from zcproto.sessions import OpenedSession
from zcproto.sessions.slab import CHUNK


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("max_slots", [1, 5, 7, 100, 5000])
def test_clean_in_slices_ends_all_expired_sessions(refresh: bool, max_slots: int) -> None:
    harness = RegistryHarness(refresh=refresh)
    old = [harness.open(f"old {number}") for number in range(30)]
    young = [harness.open(f"young {number}", WALL + HOUR) for number in range(30)]
    expired = 0
    while harness.registry.sweeps == 0:
        expired += harness.registry.clean(WALL + HOUR, max_slots)
    assert expired == harness.registry.expired == len(harness.ended) == 30
    assert (len(harness.registry), harness.registry.lapsed) == (30, 30 * refresh)
    assert all(harness.code(each.token, WALL + HOUR) is Code.TOKEN_EXPIRED for each in old)
    assert all(harness.good(each.token, WALL + HOUR) for each in young)


def test_clean_keeps_live_sessions(harness: RegistryHarness) -> None:
    harness.open()
    generation = harness.registry.generation
    assert harness.clean(WALL + HOUR - 1) == 0
    assert harness.registry.generation == generation


def test_slice_stops_at_end_of_table(harness: RegistryHarness) -> None:
    harness.open()
    for sweeps in range(1, 4):
        harness.registry.clean(WALL, 10 * CHUNK)
        assert harness.registry.sweeps == sweeps


def test_scanned_slot_that_needs_nothing_costs_one() -> None:
    harness = RegistryHarness(refresh=True)
    for number in range(30):
        harness.open(f"user {number}")
    harness.clean(WALL + HOUR)
    assert harness.registry.lapsed == 30
    sweeps = harness.registry.sweeps
    for calls in range(1, 9):
        harness.registry.clean(WALL + HOUR, CHUNK // 4)
        assert harness.registry.sweeps == sweeps + calls // 4


def test_empty_table_is_swept_at_once(harness: RegistryHarness) -> None:
    assert harness.registry.clean(WALL, 1) == 0
    assert harness.registry.sweeps == 1


def test_dropping_tombstones_does_not_starve_the_scan() -> None:
    harness = RegistryHarness(dead_keep_ms=0)
    harness.open("alice")
    for number in range(100):
        harness.registry.close(harness.open(f"user {number}").session)
    assert harness.registry.clean(WALL + HOUR, 20) == 1
    assert 90 < harness.registry.tombstones < 100


def test_clean_returns_memory_over_several_calls(harness: RegistryHarness) -> None:
    slab = harness.table.slab
    *slots, last = [slab.allocate() for _ in range(12 * CHUNK)]
    for slot in (*slots, last):
        slab.free_slot(slot)
    assert slab.size == 4 * CHUNK
    harness.registry.clean(WALL, 1)
    assert slab.size == CHUNK


def test_lapsed_session_ends_with_its_refresh_token(harness: RegistryHarness, opened: OpenedSession) -> None:
    assert harness.clean(WALL + DAY) == 1
    assert harness.clean(WALL + 30 * DAY - 1) == 0
    assert harness.registry.kept == 1
    assert harness.clean(WALL + 30 * DAY) == 0
    assert (harness.registry.kept, harness.registry.expired, len(harness.ended)) == (0, 1, 1)
    assert harness.code(opened.token, WALL + 30 * DAY) is Code.TOKEN_EXPIRED


def test_tombstones_are_dropped_after_their_lifetime(harness: RegistryHarness) -> None:
    for number in range(50):
        harness.registry.close(harness.open(f"user {number}", WALL + number * MINUTE).session)
    harness.clean(WALL + 49 * MINUTE)
    assert harness.registry.tombstones == 10
    harness.clean(WALL + 58 * MINUTE)
    assert harness.registry.tombstones == 1
    harness.clean(WALL + 59 * MINUTE)
    assert harness.registry.tombstones == 0
    assert used_slots(harness.table.slab) == 0


@pytest.mark.parametrize("back", [1, HOUR, DAY])
def test_clock_going_back_ends_and_drops_nothing(harness: RegistryHarness, back: int) -> None:
    live, dead = harness.open(), harness.open()
    harness.good(live.token, WALL + 30 * MINUTE)
    harness.registry.close(dead.session)
    assert harness.clean(WALL - back) == 0
    assert harness.good(live.token, WALL - back)
    assert harness.code(dead.token, WALL - back) is Code.TOKEN_REVOKED


def test_clock_far_ahead_ends_all_sessions_and_announces_it(harness: RegistryHarness) -> None:
    opened = [harness.open(f"user {number}") for number in range(20)]
    harness.clean(WALL + 365 * DAY)
    assert {each[0] for each in harness.ended} == {each.session.id for each in opened}
    assert harness.registry.kept == 0


def test_string_use_counts_survive_refreshes(harness: RegistryHarness) -> None:
    first = harness.open("alice", client="a", address="1")
    second = harness.open("alice", client="a", address="1")
    assert harness.strings == (1, 1, 1)
    harness.refresh(second.refresh_token, client="b", address="1")
    assert harness.strings == (1, 2, 1)
    harness.refresh(first.refresh_token, client="b", address="2")
    assert harness.strings == (1, 1, 2)
    harness.registry.revoke_user("alice", "test")
    assert harness.strings == (0, 0, 0)
