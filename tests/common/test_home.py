from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.capabilities import obeying_file_modes
from zcproto.common.home import Home, resolve_home
from zcproto.errors import ConfigError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_option_overrides_variable_overrides_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert resolve_home(Path("/a"), {"ZCPROTO_HOME": "/b"}).path == Path("/a")
    assert resolve_home("/a", {}).path == Path("/a")
    assert resolve_home(None, {"ZCPROTO_HOME": "/b"}).path == Path("/b")
    assert resolve_home(None, {"ZCPROTO_HOME": ""}).path == Path("/home/alice/.zeroclaw")
    assert resolve_home(None, {}).path == Path("/home/alice/.zeroclaw")


def test_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert resolve_home("~/zc", {}).path == Path("/home/alice/zc")


def test_relative_path_starts_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_home("zc", {}).path == tmp_path / "zc"


@pytest.mark.parametrize("option", ["~unknown-user/x", "/a\nb", "/a\x00b", "/" + "a" * 4096])
def test_invalid_path_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="--home") as caught:
        resolve_home(option, {})
    assert str(caught.value).isprintable()


def test_each_file_has_its_place() -> None:
    home = Home(Path("/h"))
    assert home.config == Path("/h/config.toml")
    assert home.certs == Path("/h/certs")
    assert home.users == Path("/h/users.toml")
    assert home.devices == Path("/h/devices.toml")
    assert home.pairing == Path("/h/pairing.toml")
    assert home.sessions == Path("/h/sessions.db")
    assert home.revocations == Path("/h/revocations.pending")
    assert home.control == Path("/h/control.sock")
    assert os.fspath(home) == "/h"
    assert repr(home) == "Home('/h')"


def test_folder_is_created_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b")
    home.ensure()
    assert mode(home.path) == 0o700
    home.ensure()
    assert mode(home.path) == 0o700


def test_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Home(tmp_path / "h").ensure()
    finally:
        os.umask(old)
    assert mode(tmp_path / "h") == 0o700


@pytest.mark.parametrize("others", [0o020, 0o002])
def test_folder_writable_by_others_is_refused_with_the_fix(tmp_path: Path, others: int) -> None:
    path = tmp_path / "h"
    path.mkdir()
    path.chmod(0o700 | others)
    with pytest.raises(ConfigError) as caught:
        Home(path).ensure()
    found = f"others can change this folder (mode {0o700 | others:04o})"
    assert caught.value.faults == [f"{path}: {found}; run: chmod go-w {path}"]


def test_folder_readable_by_others_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "h"
    path.mkdir(mode=0o755)
    Home(path).ensure()


def test_folder_of_a_foreign_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    if uid == 0:  # root's own folders are as safe as the system, so the folder gets another owner
        uid = 54_321
        os.chown(tmp_path, uid, -1)
    with pytest.raises(ConfigError, match=rf"belongs to another user \(uid {uid}\); run as that user"):
        Home(tmp_path).ensure()


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "h").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        Home(tmp_path / "h").ensure()


def test_failure_to_create_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used as the home folder: Not a directory"):
        Home(tmp_path / "file" / "h").ensure()


def test_home_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: is not a folder; name the home folder with --home"):
        Home(tmp_path / "file").require()


def test_home_folder_of_another_user_is_reported_with_the_cure(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "home").mkdir(parents=True)
    locked.chmod(0)
    expected = "Permission denied; run this as the user of the server"
    with obeying_file_modes(), pytest.raises(ConfigError, match=expected):
        Home(locked / "home").require()
    locked.chmod(0o700)
