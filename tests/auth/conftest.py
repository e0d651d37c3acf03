from __future__ import annotations

from pathlib import Path

import pytest

from tests.auth.helpers import FakeLog
from zcproto.auth import UserFile

__all__ = ["path", "users"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> FakeLog:
    """The log of directories."""
    log = FakeLog()
    monkeypatch.setattr("zcproto.auth.directory.log", log)
    return log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the file of users."""
    return tmp_path / "home" / "users.toml"


@pytest.fixture
def users(path: Path) -> UserFile:
    """A file of users that does not exist yet."""
    return UserFile(path)
