"""The store in a file: the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from zcproto.stores.answers import AnswerLimits
from zcproto.stores.sqlite import SqliteStore
from zcproto.stores.store import SessionStore

from .contract import StoreContract


class SqliteHarness:
    durable = True
    bounded = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stores: list[SqliteStore] = []
        self.notices: list[object] = []

    async def make_store(self, answers: AnswerLimits | None = None) -> SessionStore:
        store = SqliteStore(self.path, answers=answers, timeout=10.0, on_notice=self._notice)
        self.stores.append(store)
        await store.open(lambda change: pytest.fail("nobody else changes this"))
        return store

    async def reopen(self, store: SessionStore) -> SessionStore:
        await store.close()
        return await self.make_store()

    def _notice(self, name: str, **values: object) -> None:
        self.notices.append((name, values))


@pytest.fixture
async def harness(tmp_path: Path):
    harness = SqliteHarness(tmp_path / "home" / "sessions.db")
    yield harness
    for store in harness.stores:
        await store.close()
    assert harness.notices == []


class TestSqliteStore(StoreContract):
    """Every test of the contract."""
