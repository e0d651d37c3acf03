"""The store in memory passes the contract and never suspends."""

from __future__ import annotations

import pytest

from tests.helpers import drive
from tests.sessions.helpers import CountedEntropy
from tests.stores.contract import (
    FIVE,
    IDLE,
    KEEP,
    KEEP_ENDED,
    LEASE,
    WALL,
    RepeatedRefreshContract,
    StoreContract,
    StoreTime,
    digest,
    loaded,
    rotation,
    session,
)
from tests.stores.memory_store import MemoryStore
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import Created, SessionStore


def registry(max_sessions: int = 10_000) -> SessionRegistry:
    settings = SessionSettings(idle_timeout_ms=IDLE, dead_keep_ms=KEEP_ENDED, max_sessions=max_sessions)
    return SessionRegistry(settings, CountedEntropy())


class MemoryHarness:
    def __init__(self) -> None:
        self.time = StoreTime()

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        store = MemoryStore(registry(), answers, self.time)
        await store.open(lambda change: None)
        return store

    async def reopen(self, store: SessionStore) -> SessionStore:
        raise NotImplementedError


@pytest.fixture
def harness() -> MemoryHarness:
    return MemoryHarness()


class TestMemoryStore(StoreContract, RepeatedRefreshContract):
    """It stands for a shared store in other tests, and its sessions end with it."""


def test_no_operation_suspends() -> None:
    store = MemoryStore(registry())
    record = session()
    wanted = rotation(record)
    assert drive(store.open(lambda change: None)) is None
    assert drive(store.create(record, FIVE)) == Created()
    assert drive(store.find(record.token_digest)) == drive(store.get(record.id)) == record
    assert drive(store.list()) == drive(store.list("alice")) == [record]
    drive(store.touch([(record.id, WALL + 1)]))
    drive(store.rotate(wanted))
    drive(store.claim("alice", "k", digest("body"), LEASE))
    drive(store.keep_answer("alice", "k", b"answer", KEEP))
    drive(store.release_claim("alice", "k"))
    drive(store.expire(WALL, KEEP_ENDED, 10))
    assert drive(store.end([record.id], Code.TOKEN_REVOKED, WALL)) != []
    assert drive(store.end_user("alice", Code.TOKEN_REVOKED, WALL)) == []
    assert drive(store.end_all(Code.TOKEN_REVOKED, WALL)) == drive(store.count()) == 0
    assert drive(store.ping()) is drive(store.close()) is None


async def test_registry_is_the_only_copy() -> None:
    shared = registry()
    store = MemoryStore(shared)
    reported: list[Code] = []
    shared.observers.append(lambda session_id, code, reason: reported.append(code))
    opened = shared.open("alice", client="zc/1", address="", wall=WALL)
    (record,) = await store.list()
    assert record.user == "alice"
    assert not store.shared
    assert await loaded(store) == []
    await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
    assert shared.check(opened.token, WALL) is Code.TOKEN_REVOKED
    assert reported == [Code.TOKEN_REVOKED]


async def test_full_registry_raises_resource_exhausted() -> None:
    store = MemoryStore(registry(max_sessions=1))
    await store.create(session(1, "alice"), FIVE)
    with pytest.raises(ResourceExhausted) as refused:
        await store.create(session(2, "bob"), FIVE)
    assert refused.value.details is not None
    assert "retry_after_ms" in refused.value.details
    assert await store.count() == 1
