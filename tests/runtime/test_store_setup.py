"""Which store a server gets, by its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.errors import ConfigError
from zcproto.runtime import store_setup
from zcproto.runtime.store_setup import store_of
from zcproto.stores.sqlite import SqliteStore
from zcproto.stores.valkey import ValkeyStore


def store(home: Path, **settings: Any) -> Any:
    overrides = {f"store.{name}": value for name, value in settings.items()}
    return store_of(load_config(None, home=home, environ={}, overrides=overrides), Home(home))


def test_by_default_sessions_are_in_a_file_of_the_home(tmp_path: Path) -> None:
    made = store(tmp_path)
    assert isinstance(made, SqliteStore)
    assert made._path == tmp_path / "sessions.db"
    assert made._timeout == 0.25


def test_in_memory_there_is_no_store(tmp_path: Path) -> None:
    assert store(tmp_path, url="memory") is None


def test_an_address_is_that_of_a_shared_store(tmp_path: Path) -> None:
    made = store(tmp_path, url="valkey://cache", timeout="100ms")
    assert isinstance(made, ValkeyStore)
    assert made.shared
    assert made._timeout == 0.1


def test_a_wrong_address_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        store(tmp_path, url="valkey://:hunter2@cache:99999")
    assert "hunter2" not in str(caught.value)


def test_a_file_for_tls_without_tls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.ca_file"):
        store(tmp_path, url="valkey://cache", ca_file=str(tmp_path / "ca.crt"))


def password_file(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "password"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [b"hunter2", b"hunter2\n", b"hunter2\r\n"])
def test_a_password_may_be_in_a_file(tmp_path: Path, data: bytes) -> None:
    path = password_file(tmp_path, data)
    assert store(tmp_path, url="valkey://cache", password_file=str(path))._password == "hunter2"


@pytest.mark.parametrize(
    ("data", "mode", "said"),
    [
        (b"", 0o600, "must hold one line"),
        (b"\n", 0o600, "must hold one line"),
        (b"x" * 4_097, 0o600, "must hold one line"),
        (b"\xff\xfe", 0o600, "must hold one line"),
        (b"two\nlines\n", 0o600, "must hold one line"),
        (b"hunter2", 0o640, "others can read .*; run: chmod 600"),
    ],
)
def test_a_file_that_holds_no_password_is_refused(tmp_path: Path, data: bytes, mode: int, said: str) -> None:
    path = password_file(tmp_path, data, mode)
    with pytest.raises(ConfigError, match=said) as caught:
        store(tmp_path, url="valkey://cache", password_file=str(path))
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        store(tmp_path, url="valkey://cache", password_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="is not a regular file"):
        store(tmp_path, url="valkey://cache", password_file=str(tmp_path))


def test_what_a_store_has_to_tell_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, object]] = []
    path = tmp_path / "sessions.db"
    store_setup._notice(lambda *event: told.append(event), "store_damaged", path=path, reason="malformed")
    assert told == [("store.damaged", {"path": str(path), "reason": "malformed"})]
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["reason"]) == ("store.damaged", "error", "malformed")
    assert line["path"] == str(tmp_path / "sessions.db")
