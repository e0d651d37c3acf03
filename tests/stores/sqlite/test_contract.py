"""The SQLite store passes the contract of all stores."""

from __future__ import annotations

import asyncio

import pytest

from tests.limits import TIMEOUT
from tests.stores.contract import (
    FIVE,
    WALL,
    DurabilityContract,
    RepeatedRefreshContract,
    StoreContract,
    opened,
    session,
)
from tests.stores.sqlite.harness import SqliteHarness
from zcproto.errors import Code
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import SessionStore, StoreUnavailable
from zcproto.stores.sqlite.store import SqliteStore


class TestSqliteStore(StoreContract, DurabilityContract, RepeatedRefreshContract):
    """It is not shared, but other processes may have it over a link."""

    async def test_end_overtakes_waiting_logins(self, store: SessionStore) -> None:
        record = session(0)
        await opened(store, record)
        finished: list[str] = []
        tasks = [
            asyncio.create_task(store.create(session(number, f"user-{number}"), FIVE), name="login")
            for number in range(1, 600)
        ]
        tasks.append(asyncio.create_task(store.end([record.id], Code.TOKEN_REVOKED, WALL), name="end"))
        for task in tasks:
            task.add_done_callback(lambda done: finished.append(done.get_name()))
        await asyncio.gather(*tasks)
        assert finished[0] == "end"

    async def test_end_of_a_session_whose_creation_waits_ends_it(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(600)]
        creating = [asyncio.create_task(store.create(record, FIVE)) for record in records]
        ids = [records[0].id, records[-1].id]
        ended = await store.end(ids, Code.TOKEN_REVOKED, WALL)
        assert sorted(each.id for each in ended) == sorted(ids)
        await asyncio.gather(*creating)
        assert await store.count() == 598


class MemorySqliteHarness(SqliteHarness):
    """Stores in memory."""

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        store = SqliteStore(None, timeout=TIMEOUT, answers=answers, time=self.time, on_notice=self._notice)
        self.stores.append(store)
        await store.open(lambda change: pytest.fail("no other process changes this store"))
        return store


class TestSqliteStoreInMemory(StoreContract, RepeatedRefreshContract):
    """It ends with its process."""

    @pytest.fixture
    def harness(self, harness: SqliteHarness) -> MemorySqliteHarness:
        return MemorySqliteHarness(harness.path)

    async def test_failure_keeps_the_sessions(self, store: SqliteStore) -> None:
        await opened(store, session())
        database = store._database
        with pytest.raises(StoreUnavailable, match="out of memory"):
            await store._do(lambda: _raise(MemoryError("out of memory")))
        assert database._db is not None
        assert await store.list() == [session()]


def _raise(error: Exception) -> None:
    raise error
