from __future__ import annotations

import os
from pathlib import Path

import pytest

from zcproto.cli.output import private_file
from zcproto.errors import ZcprotoError


@pytest.mark.parametrize("replace", [False, True])
def test_private_file_ignores_the_umask(tmp_path: Path, replace: bool) -> None:
    old = os.umask(0)
    try:
        with private_file(tmp_path / "f", replace=replace) as file:
            file.write("ü\n")
    finally:
        os.umask(old)
    assert (tmp_path / "f").read_bytes() == b"\xc3\xbc\n"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(ZcprotoError, match="--force"), private_file(tmp_path / "f", replace=False):
        raise AssertionError
    assert (tmp_path / "f").read_text() == "old"


def test_replaced_file_has_mode_0600(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "f").chmod(0o666)
    with private_file(tmp_path / "f", replace=True) as file:
        file.write("new")
        assert (tmp_path / "f").read_text() == "old"
    assert (tmp_path / "f").read_text() == "new"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("replace", [False, True])
def test_symlink_is_never_followed(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "f").symlink_to(tmp_path / "target")
    try:
        with private_file(tmp_path / "f", replace=replace) as file:
            file.write("new")
    except ZcprotoError:
        assert not replace
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_failed_write_changes_nothing(tmp_path: Path, replace: bool) -> None:
    if replace:
        (tmp_path / "f").write_text("old")
    with pytest.raises(UnicodeEncodeError), private_file(tmp_path / "f", replace=replace) as file:
        file.writelines(["half", "\ud800"])
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if replace else [])
