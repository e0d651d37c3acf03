"""Which store an address means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zcproto.errors import ConfigError
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.choose import make_store
from zcproto.stores.sqlite import SqliteStore


def test_memory_is_no_store(tmp_path: Path) -> None:
    assert make_store("memory", tmp_path / "sessions.db", timeout=1.0) is None


def test_sqlite_is_the_file_of_the_home(tmp_path: Path) -> None:
    store = make_store("sqlite", tmp_path / "sessions.db", timeout=1.0, answers=AnswerLimits(count=7))
    assert isinstance(store, SqliteStore)
    assert not store.shared
    assert list(tmp_path.iterdir()) == [], "it is made without I/O"


@pytest.mark.parametrize(
    "url", ["redis://cache", "rediss://cache:1/2", "valkey://cache", "valkey+sentinel://a,b/main"]
)
def test_an_address_is_a_server(tmp_path: Path, url: str) -> None:
    pytest.importorskip("redis")
    store = make_store(url, tmp_path / "sessions.db", timeout=1.0, password="secret")
    assert store is not None
    assert store.shared
    assert "secret" not in repr(store)


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    with pytest.raises(ConfigError, match="store"):
        make_store("redis://", tmp_path / "sessions.db", timeout=1.0)


def test_a_package_that_is_not_there_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.startswith(("redis", "zcproto.stores.valkey"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r'pip install "zcproto\[valkey\]"'):
        make_store("redis://cache", tmp_path / "sessions.db", timeout=1.0)


def test_a_fault_of_ours_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zcproto.stores.valkey", None)
    with pytest.raises(ModuleNotFoundError):
        make_store("redis://cache", tmp_path / "sessions.db", timeout=1.0)
