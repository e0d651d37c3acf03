"""Fixtures of the SQLite store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.disk import Disk
from tests.stores.sqlite.harness import SqliteHarness


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[SqliteHarness]:
    harness = SqliteHarness(tmp_path / "home" / "sessions.db")
    yield harness
    for store in harness.stores:
        await store.close()


@pytest.fixture
def disk() -> Disk:
    return Disk()
