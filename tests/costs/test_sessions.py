"""What sessions cost: slices of bounded work, and memory that goes back when they are gone."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sessions.helpers import DAY, HOUR, WALL, Desk
from zcproto.errors import Code
from zcproto.sessions.slab import CHUNK
from zcproto.sessions.table import LEAST_BUCKETS

pytestmark = pytest.mark.no_cover  # the costs are those of the code, not of the measuring


@pytest.mark.parametrize("max_slots", [10, 100, 1000])
def test_a_slice_does_a_bounded_amount_of_work(max_slots: int) -> None:
    desk = Desk(refresh=False)
    for number in range(1000):
        desk.open(f"user {number}")
    worked = []
    while desk.registry.sweeps == 0:
        worked.append(desk.registry.clean(WALL + HOUR, max_slots))
    assert max(worked) <= max_slots // 5 + 1
    assert sum(worked) == 1000


@pytest.mark.parametrize("refresh", [False, True])
def test_memory_goes_back_when_the_sessions_are_gone(refresh: bool) -> None:
    desk = Desk(refresh=refresh, dead_limit=100)
    for number in range(4 * CHUNK):
        desk.open(f"user {number // 5}", client=f"client {number}", address=f"address {number}")
    table = desk.registry._table
    assert table.slab.size == 4 * CHUNK
    end = WALL + 31 * DAY
    for wall in (end, end + HOUR, end + 2 * HOUR):
        desk.clean(wall)
    assert table.slab.size <= 2 * CHUNK
    assert (table.users.slab.size, table.clients.slab.size, table.addresses.slab.size) == (
        CHUNK,
        CHUNK,
        CHUNK,
    )
    assert (table.tokens.buckets, table.ids.buckets) == (LEAST_BUCKETS, LEAST_BUCKETS)
    assert desk.strings == (0, 0, 0)


def test_memory_is_bounded_while_sessions_come_and_go() -> None:
    desk = Desk(dead_limit=500)
    for number in range(2500):
        opened = desk.open(f"user {number}", client=f"client {number}", address=f"address {number}")
        if number % 3 == 0:
            opened = desk.refresh(opened.refresh_token, client=f"other {number}", address=f"moved {number}")
        desk.registry.close(opened.session)
    table = desk.registry._table
    assert table.slab.size == CHUNK
    assert (table.users.slab.size, table.clients.slab.size, table.addresses.slab.size) == (
        CHUNK,
        CHUNK,
        CHUNK,
    )
    assert desk.strings == (0, 0, 0)
    assert table.tombstones == 500
    assert len(desk.registry._grace) == 0


@pytest.mark.parametrize("dead_limit", [0, 100, 10_000])
def test_memory_goes_back_when_all_sessions_of_all_users_are_revoked(dead_limit: int) -> None:
    desk = Desk(dead_limit=dead_limit)
    opened = [desk.open(f"user {number // 5}") for number in range(CHUNK + 76)]
    assert desk.registry.revoke_all("key leaked") == len(opened) == len(desk.ended)
    codes = Counter(desk.code(each.token) for each in opened)
    remembered = min(len(opened), dead_limit)
    assert codes[Code.TOKEN_REVOKED] == remembered == desk.registry.tombstones
    assert codes[Code.UNAUTHENTICATED] == len(opened) - remembered
    assert (len(desk.registry), desk.registry.kept, desk.registry.revoked) == (0, 0, len(opened))
    assert desk.strings == (0, 0, 0)
    assert desk.registry._table.slab.used == remembered
    desk.good(desk.open().token)
