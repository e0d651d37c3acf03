"""The SQLite store passes the contract of all stores."""

from __future__ import annotations

import pytest

from tests.stores.contract import DurabilityContract, RepeatedRefreshContract, StoreContract, opened, session
from tests.stores.sqlite.harness import LONG, SqliteHarness
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import SessionStore, StoreUnavailable
from zcproto.stores.sqlite.store import SqliteStore


class TestSqliteStore(StoreContract, DurabilityContract, RepeatedRefreshContract):
    """It is not shared, but other processes may have it over a link."""


class MemorySqliteHarness(SqliteHarness):
    """Stores in memory."""

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        store = SqliteStore(None, timeout=LONG, answers=answers, time=self.time, on_notice=self._notice)
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
