"""A harness for stores in a file, and changes to the file by other programs."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.disk import WRITES, Disk
from tests.limits import TIMEOUT
from tests.stores.contract import StoreTime
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import SessionStore
from zcproto.stores.sqlite.store import SqliteStore


@contextmanager
def hanging(disk: Disk, at: tuple[str, ...] = WRITES) -> Iterator[None]:
    """Let the disk hang at statements that begin so, until the end of the block."""
    disk.hang(at)
    try:
        yield
    finally:
        disk.go_on.set()


class SqliteHarness:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.time = StoreTime()
        self.stores: list[SqliteStore] = []
        self.notices: list[tuple[str, dict[str, Any]]] = []

    def new(self, **options: Any) -> SqliteStore:
        """Return a store that is not open."""
        defaults = {"timeout": TIMEOUT, "on_notice": self._notice, "time": self.time}
        store = SqliteStore(self.path, **(defaults | options))
        self.stores.append(store)
        return store

    async def opened(self, **options: Any) -> SqliteStore:
        store = self.new(**options)
        await store.open(lambda change: pytest.fail("no other process changes this store"))
        return store

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        return await self.opened(answers=answers)

    async def reopen(self, store: SessionStore) -> SessionStore:
        await store.close()
        return await self.opened()

    def _notice(self, name: str, **values: Any) -> None:
        self.notices.append((name, values))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def beside(path: Path, suffix: str) -> Path:
    """Return a file beside the database file."""
    return path.with_name(path.name + suffix)


def change_file(path: Path, *statements: str) -> None:
    """Change a closed database file like another program."""
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()
