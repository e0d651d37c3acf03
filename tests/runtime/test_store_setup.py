"""Which store a configuration selects."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.errors import ConfigError
from zcproto.runtime import store_setup
from zcproto.runtime.store_setup import build_store
from zcproto.stores.base import Change, ChangeKind
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.valkey import store as store_module
from zcproto.stores.valkey.store import ValkeyStore
from zcproto.workers.fleet import build_hub
from zcproto.workers.hub import StoreHub


def store(home: Path, **settings: Any) -> Any:
    overrides = {f"store.{name}": value for name, value in settings.items()}
    return build_store(load_config(None, home=home, environ={}, overrides=overrides), Home(home))


class FakeStore:
    """Record the arguments of a store."""

    def __init__(self, place: object, **arguments: Any) -> None:
        self.place = place
        self.arguments = arguments


@pytest.fixture
def fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_setup, "SqliteStore", FakeStore)
    monkeypatch.setattr(store_module, "ValkeyStore", FakeStore)


def test_default_is_sqlite_in_the_home_folder(tmp_path: Path) -> None:
    made = store(tmp_path)
    assert isinstance(made, SqliteStore)
    assert not made.shared
    assert made.path == tmp_path / "sessions.db"
    assert made.timeout == 0.25
    assert list(tmp_path.iterdir()) == [], "building a store does no I/O"


def test_memory_has_no_store(tmp_path: Path) -> None:
    assert store(tmp_path, url="memory") is None


@pytest.mark.parametrize(
    "url", ["redis://cache", "rediss://cache:1/2", "valkey://cache", "valkey+sentinel://a,b/main"]
)
def test_server_url_selects_a_shared_store(tmp_path: Path, url: str) -> None:
    made = store(tmp_path, url=url)
    assert isinstance(made, ValkeyStore)
    assert made.shared


@pytest.mark.usefixtures("fake_stores")
def test_settings_are_passed_to_the_store_of_a_server_url(tmp_path: Path) -> None:
    made = store(tmp_path, url="redis://cache", timeout="100ms")
    assert (made.place, made.arguments["timeout"]) == ("redis://cache", 0.1)
    assert made.arguments["password"] is None


def test_invalid_url_is_reported_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        store(tmp_path, url="valkey://:hunter2@cache:99999")
    assert "hunter2" not in str(caught.value)


def test_ca_file_without_tls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.ca_file"):
        store(tmp_path, url="valkey://cache", ca_file=str(tmp_path / "ca.crt"))


def test_missing_redis_package_is_reported_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [
        module for module in sys.modules if module.startswith(("redis", "zcproto.stores.valkey."))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r'in a clone of zcproto: pip install "\.\[valkey\]"'):
        store(tmp_path, url="redis://cache")


def test_missing_module_of_zcproto_is_not_reported_as_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zcproto.stores.valkey.store", None)
    with pytest.raises(ModuleNotFoundError):
        store(tmp_path, url="redis://cache")


def password_file(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "password"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [b"hunter2", b"hunter2\n", b"hunter2\r\n"])
def test_password_is_read_from_a_file_and_never_shown(
    tmp_path: Path, data: bytes, request: pytest.FixtureRequest
) -> None:
    path = password_file(tmp_path, data)
    assert "hunter2" not in repr(store(tmp_path, url="valkey://cache", password_file=str(path)))
    request.getfixturevalue("fake_stores")
    made = store(tmp_path, url="valkey://cache", password_file=str(path))
    assert made.arguments["password"] == "hunter2"


@pytest.mark.parametrize(
    ("data", "mode", "message"),
    [
        (b"", 0o600, "must hold one line"),
        (b"\n", 0o600, "must hold one line"),
        (b"x" * 4_097, 0o600, "must hold one line"),
        (b"\xff\xfe", 0o600, "must hold one line"),
        (b"two\nlines\n", 0o600, "must hold one line"),
        (b"hunter2", 0o640, "others can read .*; run: chmod 600"),
    ],
)
def test_invalid_password_file_is_refused(tmp_path: Path, data: bytes, mode: int, message: str) -> None:
    path = password_file(tmp_path, data, mode)
    with pytest.raises(ConfigError, match=message) as caught:
        store(tmp_path, url="valkey://cache", password_file=str(path))
    assert "hunter2" not in str(caught.value)


def test_missing_password_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        store(tmp_path, url="valkey://cache", password_file=str(tmp_path / "none"))


def test_password_file_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a regular file"):
        store(tmp_path, url="valkey://cache", password_file=str(tmp_path))


@pytest.mark.usefixtures("fake_stores")
def test_notices_of_a_store_are_logged_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported: list[tuple[str, object]] = []
    path = str(tmp_path / "sessions.db")
    config = load_config(None, home=tmp_path, environ={})
    made: Any = build_store(config, Home(tmp_path), lambda *event: reported.append(event))
    made.arguments["on_notice"]("store_damaged", path=path, reason="malformed")
    assert reported == [("store.damaged", {"path": path, "reason": "malformed"})]
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["reason"]) == ("store.damaged", "error", "malformed")
    assert line["path"] == path


# --- for several processes -------------------------------------------------------------------------


async def hub_of(home: Path, url: str, reported: list[Any]) -> StoreHub | None:
    config = load_config(None, home=home, environ={}, overrides={"store.url": url})
    return build_hub(config, Home(home), lambda *event: reported.append(event))


async def test_file_and_memory_are_shared_by_a_hub_and_valkey_is_shared_anyway(tmp_path: Path) -> None:
    assert await hub_of(tmp_path, "redis://localhost", []) is None
    lasting, ending = await hub_of(tmp_path, "sqlite", []), await hub_of(tmp_path, "memory", [])
    assert lasting is not None
    assert ending is not None
    assert lasting.epoch == b""
    assert ending.epoch != b""
    for hub in (lasting, ending):
        member = hub.member()
        await member.open(lambda change: None)
        assert await member.count() == 0
        await hub.close()


async def test_damaged_file_is_reported_and_has_other_processes_write_back_what_they_know(
    tmp_path: Path,
) -> None:
    reported: list[Any] = []
    path = tmp_path / "sessions.db"
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    hub = await hub_of(tmp_path, "sqlite", reported)
    assert hub is not None
    await hub.open()
    await asyncio.sleep(0)
    assert [event for event, _ in reported] == ["store.damaged"]
    assert hub.epoch != b""
    heard: list[Change] = []
    await hub.member().open(heard.append)
    path.unlink()
    await hub.store.ping()
    await asyncio.sleep(0)
    assert heard == [Change(ChangeKind.EMPTIED)]
    await hub.close()
