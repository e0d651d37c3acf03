"""A key of another type or content harms only what needs it, and is reported."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.stores.contract import (
    DAY,
    EVICT_ONE,
    EVICT_TWO,
    FIVE,
    KEEP_ENDED,
    LEASE,
    WALL,
    digest,
    ended,
    rotation,
    session,
)
from tests.stores.valkey.helpers import url_of
from tests.stores.valkey.server_process import ServerProcess
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.token import id_text
from zcproto.stores.base import Created, DamagedRecord, NotRotated, StoreUnavailable
from zcproto.stores.valkey.scripts import tag_of
from zcproto.stores.valkey.store import ValkeyStore

ONE, TWO, THREE = session(1), session(2), session(3, "bob")


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
    store = ValkeyStore(url_of(server), on_notice=notices)
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


async def test_damaged_index_of_a_user_is_rebuilt(
    store: ValkeyStore, server: ServerProcess, notices: Notices
) -> None:
    replace_by_list(server, user_key("alice"))
    assert await store.list("alice") == [ONE, TWO]
    assert [where for where, _ in notices] == ["_list_some"]
    assert server.command("PTTL", user_key("alice")) > 0
    replace_by_list(server, user_key("alice"))
    assert await store.create(session(4), EVICT_TWO) == Created((ended(ONE, Code.SESSION_REPLACED),))
    replace_by_list(server, user_key("alice"))
    assert await store.end([TWO.id], Code.TOKEN_REVOKED, WALL) == [ended(TWO)]
    assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == [ended(session(4))]
    assert await store.list() == [THREE]
    assert await store.create(session(5), FIVE) == Created()


async def test_index_is_rebuilt_from_many_sessions(
    store: ValkeyStore, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.store._SCANNED", 3)
    others = [session(number, f"user-{number}") for number in range(10, 200)]
    for record in others:
        await store.create(record, FIVE)
    replace_by_list(server, user_key("alice"))
    assert await store.list("alice") == [ONE, TWO]


async def test_index_that_another_process_has_rebuilt_is_kept(
    store: ValkeyStore, server: ServerProcess
) -> None:
    assert not await store.rebuild_index(tag_of("alice"))
    await store._write_index(tag_of("alice"), set())
    assert await store.list("alice") == [ONE, TWO]


async def test_damage_of_another_key_does_not_rebuild_the_index(
    store: ValkeyStore, server: ServerProcess
) -> None:
    server.command("DEL", "zcp:n")
    server.command("RPUSH", "zcp:n", "x")
    with pytest.raises(DamagedRecord):
        await store.create(session(4), FIVE)
    assert await store.list("alice") == [ONE, TWO]


@pytest.mark.parametrize("content", [None, "", "nonsense"])
async def test_damaged_mark_of_the_layout_names_itself(
    store: ValkeyStore, server: ServerProcess, notices: Notices, content: str | None
) -> None:
    key = next(iter(server.command("KEYS", "zcp:v:*"))).decode()
    server.command("DEL", key)
    server.command(*(("RPUSH", key, "x") if content is None else ("SET", key, content)))
    other = ValkeyStore(str(store._url), on_notice=notices)
    with pytest.raises(StoreUnavailable, match=f"the key {re.escape(key)} is damaged: delete it"):
        await other.open(lambda change: None)
    assert {where for where, _ in notices} == {key}
    server.command("DEL", key)
    await other.open(lambda change: None)
    await other.close()


async def test_damaged_keys_of_requests_fail_requests_of_this_user_only(
    store: ValkeyStore, server: ServerProcess
) -> None:
    server.command("SET", f"zcp:q:{{{tag_of('alice').decode()}}}", "x")
    with pytest.raises(DamagedRecord):
        await store.claim("alice", "k", digest("body"), LEASE)
    await store.claim("bob", "k", digest("body"), LEASE)


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
