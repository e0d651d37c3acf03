"""A key of another type or content harms only what needs it, and is reported."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.stores.contract import (
    DAY,
    EVICT_ONE,
    FIVE,
    KEEP_ENDED,
    LEASE,
    WALL,
    digest,
    ended,
    rotation,
    session,
)
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, running, wait_for
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.token import id_text
from zcproto.stores.base import Created, DamagedRecord, NotRotated, StoreUnavailable
from zcproto.stores.valkey.scripts import tag_of
from zcproto.stores.valkey.store import ValkeyStore

KINDS = [*PROGRAMS, f"{PROGRAMS[0]}, in a cluster"]

ONE, TWO, THREE = session(1), session(2), session(3, "bob")


@pytest.fixture(params=KINDS, scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    program, _, cluster = request.param.partition(", ")
    options = ("--cluster-enabled", "yes") if cluster else ()
    with running(program, tmp_path_factory.mktemp("server"), *options) as process:
        if cluster:
            process.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
            wait_for(lambda: b"cluster_state:ok" in process.command("CLUSTER", "INFO"))
        yield process


class Notices(list[tuple[str, str]]):
    """The notices of a store: (where, reason)."""

    def __call__(self, name: str, where: str, reason: str) -> None:
        assert name == "store_record_damaged"
        self.append((where, reason))


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
async def store(server: ServerProcess, notices: Notices) -> AsyncIterator[ValkeyStore]:
    """Return a store with two sessions of alice and one of bob."""
    server.command("FLUSHALL")
    scheme = "redis+cluster" if "--cluster-enabled" in server.options else "redis"
    store = ValkeyStore(f"{scheme}://{server.address}", timeout=5.0, on_notice=notices)
    await store.open(lambda change: None)
    for record in (ONE, TWO, THREE):
        assert await store.create(record, FIVE) == Created()
    yield store
    await store.close()


def key_of(record: SessionRecord) -> str:
    return f"zcp:s:{{{tag_of(record.user).decode()}}}{id_text(record.id)}"


def user_key(user: str) -> str:
    return f"zcp:u:{{{tag_of(user).decode()}}}"


def replace_by_list(server: ServerProcess, key: str | bytes) -> None:
    assert server.command("DEL", key) == 1
    server.command("RPUSH", key, "x")


CONTENTS: list[Any] = [None, b"", b"\xc1", b"\x01", b"\x90", b"\x93\x00\x01\x02"]


@pytest.fixture(params=CONTENTS, ids=repr)
def damaged(request: pytest.FixtureRequest, server: ServerProcess, store: ValkeyStore) -> SessionRecord:
    """Return a session whose key is a list, or has this content."""
    if request.param is None:
        replace_by_list(server, key_of(ONE))
    else:
        server.command("SET", key_of(ONE), request.param)
    return ONE


async def test_damaged_session_counts_as_missing(
    store: ValkeyStore, damaged: SessionRecord, notices: Notices
) -> None:
    assert await store.find(damaged.token_digest) is None
    assert await store.get(damaged.id) is None
    assert await store.rotate(rotation(damaged)) == NotRotated(Code.UNAUTHENTICATED)
    assert await store.list("alice") == [TWO]
    assert await store.list() == [TWO, THREE]
    assert [where for where, _ in notices] == 5 * [key_of(damaged)]


async def test_damaged_session_does_not_keep_others_from_being_used_or_ended(
    store: ValkeyStore, damaged: SessionRecord
) -> None:
    await store.touch([(damaged.id, WALL + 1), (TWO.id, WALL + 1), (THREE.id, WALL + 1)])
    used = [record._replace(last_used_at=WALL + 1) for record in (TWO, THREE)]
    assert await store.list() == used
    assert await store.end([damaged.id, TWO.id], Code.TOKEN_REVOKED, WALL) == [ended(TWO)]
    found = await store.get(damaged.id)
    assert found is not None
    assert not isinstance(found, SessionRecord)
    assert await store.list() == used[1:]


async def test_all_sessions_of_a_user_end_with_a_damaged_one(
    store: ValkeyStore, damaged: SessionRecord
) -> None:
    assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == [ended(TWO)]
    assert not isinstance(await store.get(damaged.id), SessionRecord)
    assert await store.list() == [THREE]
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 1


async def test_damaged_session_makes_room(store: ValkeyStore, damaged: SessionRecord) -> None:
    assert await store.create(session(4), EVICT_ONE) == Created((ended(TWO, Code.SESSION_REPLACED),))
    assert await store.list("alice") == [session(4)]


async def test_damaged_session_is_removed_when_it_expires(
    store: ValkeyStore, server: ServerProcess, damaged: SessionRecord
) -> None:
    while await store.expire(WALL + 40 * DAY, KEEP_ENDED, 1_000):
        pass
    assert server.command("KEYS", "zcp:s:*") == []


async def test_damaged_index_of_a_user_fails_operations_of_this_user_only(
    store: ValkeyStore, server: ServerProcess, notices: Notices
) -> None:
    replace_by_list(server, user_key("alice"))
    for operation in (
        store.create(session(4), FIVE),
        store.list("alice"),
        store.end_user("alice", Code.TOKEN_REVOKED, WALL),
    ):
        with pytest.raises(DamagedRecord) as refused:
            await operation
        assert "WRONGTYPE" in refused.value.reason
    assert [where for where, _ in notices] == ["create", "_list_user", "end_user"]
    assert await store.find(ONE.token_digest) == ONE
    assert await store.end([ONE.id], Code.TOKEN_REVOKED, WALL) == [ended(ONE)]
    assert await store.create(session(5, "bob"), FIVE) == Created()
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 3


async def test_damaged_keys_of_requests_fail_requests_of_this_user_only(
    store: ValkeyStore, server: ServerProcess
) -> None:
    server.command("SET", f"zcp:q:{{{tag_of('alice').decode()}}}", "x")
    with pytest.raises(DamagedRecord):
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
    await store.claim("bob", "k", digest("body"), WALL, LEASE)


async def test_server_that_refuses_writes_is_not_damage(
    store: ValkeyStore, server: ServerProcess, notices: Notices
) -> None:
    server.command("CONFIG", "SET", "min-replicas-to-write", 1)
    try:
        with pytest.raises(StoreUnavailable) as refused:
            await store.create(session(4), FIVE)
    finally:
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)
    assert not isinstance(refused.value, DamagedRecord)
    assert notices == []
