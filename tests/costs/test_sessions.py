"""Test the cost of sessions: bounded slices, and memory returned when sessions end."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, RegistryHarness, used_slots
from zcproto.errors import Code
from zcproto.sessions.slab import CHUNK
from zcproto.sessions.table import LEAST_BUCKETS

pytestmark = pytest.mark.no_cover  # coverage would distort the measurement


@pytest.mark.parametrize("max_slots", [10, 100, 1000])
def test_slice_does_bounded_work(max_slots: int) -> None:
    harness = RegistryHarness(refresh=False)
    for number in range(1000):
        harness.open(f"user {number}")
    worked = []
    while harness.registry.sweeps == 0:
        worked.append(harness.registry.clean(WALL + HOUR, max_slots))
    assert max(worked) <= max_slots // 5 + 1
    assert sum(worked) == 1000


@pytest.mark.parametrize("refresh", [False, True])
def test_memory_is_returned_when_sessions_are_gone(refresh: bool) -> None:
    harness = RegistryHarness(refresh=refresh, dead_limit=100)
    for number in range(4 * CHUNK):
        harness.open(f"user {number // 5}", client=f"client {number}", address=f"address {number}")
    table = harness.registry._table
    assert table.slab.size == 4 * CHUNK
    end = WALL + 31 * DAY
    for wall in (end, end + HOUR, end + 2 * HOUR):
        harness.clean(wall)
    assert table.slab.size <= 2 * CHUNK
    assert (table.users.slab.size, table.clients.slab.size, table.addresses.slab.size) == (
        CHUNK,
        CHUNK,
        CHUNK,
    )
    assert (table.tokens.buckets, table.ids.buckets) == (LEAST_BUCKETS, LEAST_BUCKETS)
    assert harness.strings == (0, 0, 0)


def test_memory_is_bounded_under_session_churn() -> None:
    harness = RegistryHarness(dead_limit=500)
    for number in range(2500):
        opened = harness.open(f"user {number}", client=f"client {number}", address=f"address {number}")
        if number % 3 == 0:
            opened = harness.refresh(
                opened.refresh_token, client=f"other {number}", address=f"moved {number}"
            )
        harness.registry.close(opened.session)
    table = harness.registry._table
    assert table.slab.size == CHUNK
    assert (table.users.slab.size, table.clients.slab.size, table.addresses.slab.size) == (
        CHUNK,
        CHUNK,
        CHUNK,
    )
    assert harness.strings == (0, 0, 0)
    assert table.tombstones == 500
    assert len(harness.registry._grace) == 0


@pytest.mark.parametrize("dead_limit", [0, 100, 10_000])
def test_memory_is_returned_after_revoke_all(dead_limit: int) -> None:
    harness = RegistryHarness(dead_limit=dead_limit)
    opened = [harness.open(f"user {number // 5}") for number in range(CHUNK + 76)]
    assert harness.registry.revoke_all("key leaked") == len(opened) == len(harness.ended)
    codes = Counter(harness.code(each.token) for each in opened)
    remembered = min(len(opened), dead_limit)
    assert codes[Code.TOKEN_REVOKED] == remembered == harness.registry.tombstones
    assert codes[Code.UNAUTHENTICATED] == len(opened) - remembered
    assert (len(harness.registry), harness.registry.kept, harness.registry.revoked) == (0, 0, len(opened))
    assert harness.strings == (0, 0, 0)
    assert used_slots(harness.registry._table.slab) == remembered
    harness.good(harness.open().token)
