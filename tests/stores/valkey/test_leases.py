"""Leases of several processes in one store: which sessions count as in use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.stores.contract import DAY, HOUR, IDLE, KEEP_ENDED, WALL, StoreTime, ended, opened, session
from tests.stores.valkey import helpers
from tests.stores.valkey.server_process import ServerProcess
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.sessions.token import id_text
from zcproto.stores.base import CLOCK_SKEW_MS, LEASE_MS, Created, LimitReached
from zcproto.stores.valkey.scripts import tag_of
from zcproto.stores.valkey.store import ValkeyStore

ONE = UserLimit(1, "evict_disconnected", IDLE)
ONE_OR_EXPIRED = UserLimit(1, "evict_disconnected", IDLE, counts_expired=True)
OLD, NEW = session(1), session(2)


@pytest.fixture
def time() -> StoreTime:
    return StoreTime()


@pytest.fixture
async def stores(server: ServerProcess, time: StoreTime) -> AsyncIterator[tuple[ValkeyStore, ValkeyStore]]:
    """Return the stores of two processes, with a session that the first has opened."""
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(helpers.opened(helpers.url_of(server), time=time))
            for _ in range(2)
        ]
        one, other = (store for store, _ in made)
        await opened(one, OLD)
        yield one, other


def lease_key(record: SessionRecord) -> str:
    return f"zcp:l:{{{tag_of(record.user).decode()}}}{id_text(record.id)}"


async def test_opened_session_is_in_use_without_another_operation(
    stores: tuple[ValkeyStore, ValkeyStore], time: StoreTime
) -> None:
    time.ms += LEASE_MS - 1
    assert await stores[1].create(NEW, ONE_OR_EXPIRED) == LimitReached()


async def test_given_up_lease_makes_room_at_once(stores: tuple[ValkeyStore, ValkeyStore]) -> None:
    one, other = stores
    await one.lease([(OLD.id, False)])
    assert await other.create(NEW, ONE) == Created((ended(OLD, Code.TOKEN_EXPIRED),))


async def test_expired_lease_makes_room_only_if_expired_ones_count(
    stores: tuple[ValkeyStore, ValkeyStore], time: StoreTime
) -> None:
    time.ms += LEASE_MS
    assert await stores[1].create(NEW, ONE) == LimitReached()
    assert await stores[1].create(NEW, ONE_OR_EXPIRED) == Created((ended(OLD, Code.TOKEN_EXPIRED),))


async def test_renewed_lease_keeps_a_session(
    stores: tuple[ValkeyStore, ValkeyStore], time: StoreTime
) -> None:
    time.ms += LEASE_MS - 1
    await stores[0].lease([(OLD.id, True)])
    time.ms += LEASE_MS - 1
    assert await stores[1].create(NEW, ONE_OR_EXPIRED) == LimitReached()


async def test_session_is_in_use_while_one_of_two_processes_has_a_connection(
    stores: tuple[ValkeyStore, ValkeyStore],
) -> None:
    one, other = stores
    await other.lease([(OLD.id, True)])
    await one.lease([(OLD.id, False)])
    assert await one.create(NEW, ONE) == LimitReached()
    await other.lease([(OLD.id, False)])
    assert await one.create(NEW, ONE) == Created((ended(OLD, Code.TOKEN_EXPIRED),))


async def test_process_does_not_give_up_the_lease_of_another(stores: tuple[ValkeyStore, ValkeyStore]) -> None:
    one, other = stores
    await other.lease([(OLD.id, False)])
    assert await one.create(NEW, ONE_OR_EXPIRED) == LimitReached()


async def test_leases_of_crashed_processes_are_dropped_at_the_next_renewal(
    stores: tuple[ValkeyStore, ValkeyStore], time: StoreTime, server: ServerProcess
) -> None:
    one, other = stores
    size = len(server.command("GET", lease_key(OLD)))
    for _ in range(5):
        time.ms += LEASE_MS
        await other.lease([(OLD.id, True)])
        time.ms += LEASE_MS
        await one.lease([(OLD.id, True)])
    assert len(server.command("GET", lease_key(OLD))) < 2 * size
    time.ms += LEASE_MS
    assert await other.create(NEW, ONE_OR_EXPIRED) == Created((ended(OLD, Code.TOKEN_EXPIRED),))


async def test_session_used_after_its_last_lease_is_in_use_by_an_earlier_version(
    stores: tuple[ValkeyStore, ValkeyStore],
) -> None:
    one, other = stores
    await one.lease([(OLD.id, False)])
    await other.touch([(OLD.id, WALL + CLOCK_SKEW_MS + 1)])
    assert await other.create(NEW, ONE_OR_EXPIRED) == LimitReached()
    await other.lease([(OLD.id, True)])
    assert await other.create(NEW, ONE_OR_EXPIRED) == LimitReached()


@pytest.mark.parametrize("content", [None, b"no lease", b"\x91\x01", b"\xc0"])
async def test_session_without_a_readable_lease_is_in_use(
    stores: tuple[ValkeyStore, ValkeyStore], server: ServerProcess, content: bytes | None
) -> None:
    """As after a failover, or if a server of an earlier version has opened it."""
    server.command("DEL", lease_key(OLD))
    if content is not None:
        server.command("SET", lease_key(OLD), content)
    assert await stores[1].create(NEW, ONE_OR_EXPIRED) == LimitReached()
    await stores[0].lease([(OLD.id, False)])
    assert isinstance(await stores[1].create(NEW, ONE_OR_EXPIRED), Created)


async def test_lease_ends_with_its_session(
    stores: tuple[ValkeyStore, ValkeyStore], server: ServerProcess
) -> None:
    one, _ = stores
    await opened(one, session(3, expires_at=WALL + HOUR, refresh_expires_at=WALL + HOUR))
    await one.lease([(OLD.id, True), (session(3).id, False), (session(4).id, True)])
    assert server.command("EXISTS", lease_key(session(4))) == 0
    left = server.command("PTTL", lease_key(OLD))
    assert abs(left - server.command("PTTL", lease_key(OLD).replace(":l:", ":s:"))) < 10_000
    await one.end([OLD.id], Code.TOKEN_REVOKED, WALL)
    assert server.command("EXISTS", lease_key(OLD)) == 0
    await one.expire(WALL + DAY, KEEP_ENDED, 100)
    assert server.command("KEYS", "zcp:l:*") == []


async def test_disconnected_session_among_very_many_makes_room(
    stores: tuple[ValkeyStore, ValkeyStore], time: StoreTime
) -> None:
    one, other = stores
    many = [session(number, "bob") for number in range(10, 610)]
    await opened(one, *many)
    limit = UserLimit(600, "evict_disconnected", IDLE)
    assert await other.create(session(700, "bob"), limit) == LimitReached()
    await one.lease([(many[n].id, False) for n in (500, 300)])
    assert await other.create(session(700, "bob"), limit) == Created((ended(many[300], Code.TOKEN_EXPIRED),))
    assert await other.create(session(701, "bob"), limit) == Created((ended(many[500], Code.TOKEN_EXPIRED),))
    assert await other.create(session(702, "bob"), limit) == LimitReached()
    time.ms += LEASE_MS
    lowered = UserLimit(350, "evict_disconnected", IDLE, counts_expired=True)
    await one.lease([(record.id, True) for record in many[:200]])
    created = await other.create(session(703, "bob"), lowered)
    assert isinstance(created, Created)
    assert {each.id for each in created.ended}.isdisjoint(record.id for record in many[:200])
    assert len(await other.list("bob")) == 350
