"""Test the lists and indexes of the table with several sessions of one user."""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.sessions.helpers import SECOND, WALL, RegistryHarness, used_slots
from zcproto.errors import Code


def entries(harness: RegistryHarness) -> tuple[int, int, int]:
    """Return the used slots and the entries of both indexes."""
    return used_slots(harness.table.slab), harness.table.tokens.count, harness.table.ids.count


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_other_sessions_of_user_stay_listed_oldest_first_in_any_order_of_revocation(
    order: tuple[int, ...],
) -> None:
    harness = RegistryHarness(refresh=False)
    opened = [harness.open(wall=WALL + number) for number in range(4)]
    left = [each.session.id for each in opened]
    for number in order:
        assert harness.registry.revoke(opened[number].session.id, user="alice", reason="test")
        left.remove(opened[number].session.id)
        assert [info.id for info in harness.registry.list("alice", WALL + SECOND)] == left
    assert harness.registry.kept == 0


@pytest.mark.parametrize("first", range(4))
def test_revoke_user_after_one_of_four_sessions_leaves_none(harness: RegistryHarness, first: int) -> None:
    opened = [harness.open() for _ in range(4)]
    other = harness.open("bob")
    harness.registry.revoke(opened[first].session.id, user="alice", reason="test")
    assert harness.registry.revoke_user("alice", "test") == 3
    assert [harness.code(each.token) for each in opened] == [Code.TOKEN_REVOKED] * 4
    assert harness.good(other.token)
    assert harness.registry.kept == 1


@pytest.mark.parametrize("gone", range(4))
def test_oldest_session_left_is_evicted_first(gone: int) -> None:
    harness = RegistryHarness(per_user=4, when_full="evict_oldest")
    opened = [harness.open(wall=WALL + number) for number in range(4)]
    harness.registry.revoke(opened.pop(gone).session.id, user="alice", reason="test")
    harness.open(wall=WALL + 4)
    for oldest in opened:
        harness.open(wall=WALL + 5)
        assert harness.code(oldest.token, WALL + 5) is Code.SESSION_REPLACED
        assert harness.registry.kept == 4


def test_dropped_sessions_and_tombstones_leave_both_indexes() -> None:
    harness = RegistryHarness(per_user=8, dead_limit=3, dead_keep_ms=SECOND)
    opened = [harness.open() for _ in range(8)]
    assert entries(harness) == (8, 8, 8)
    forgotten = harness.table.ids[harness.good(opened[0].token).slot]
    assert harness.registry.forget(forgotten)
    assert entries(harness) == (7, 7, 7)
    harness.refresh(opened[1].refresh_token)  # the tombstone of a token has no id
    assert entries(harness) == (8, 8, 7)
    for each in opened[2:7]:
        harness.registry.revoke(each.session.id, user=None, reason="test")
    assert entries(harness) == (5, 5, 5)
    harness.clean(WALL + SECOND)
    assert entries(harness) == (2, 2, 2)


def test_only_bound_sessions_have_a_key_in_the_table(harness: RegistryHarness) -> None:
    harness.open()
    assert len(harness.table.keys) == 0
    bound = harness.open(bound=True)
    assert len(harness.table.keys) == 1
    harness.registry.revoke(bound.session.id, user=None, reason="test")
    assert len(harness.table.keys) == 0


def test_full_table_of_sessions_and_tombstones_stays_within_its_capacity() -> None:
    harness = RegistryHarness(max_sessions=4, dead_limit=3, per_user=4)
    opened = [harness.open() for _ in range(4)]
    for _ in range(5):
        opened = [harness.refresh(each.refresh_token) for each in opened]
        assert (harness.registry.kept, harness.registry.tombstones) == (4, 3)
    for _ in range(5):
        harness.registry.revoke(opened.pop(0).session.id, user=None, reason="test")
        opened.append(harness.open())
        assert (harness.registry.kept, harness.registry.tombstones) == (4, 3)
    assert entries(harness)[:2] == (7, 7)
