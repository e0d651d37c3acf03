from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zcproto.common import watcher
from zcproto.common.watcher import READ_EVERY, FileWatcher, file_identity

MAX_FILE_BYTES = 1 << 20


def put(path: Path, data: bytes = b"one", times: tuple[int, int] | None = None) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    if times is not None:
        os.utime(path, ns=times)
    return path


def settled(*paths: Path) -> FileWatcher:
    """Return a watcher that no longer reads unchanged content, of files that were written long ago.

    Some kernels give a file that is changed within one tick the same time again.
    """
    for path in paths:
        if os.path.isfile(path):  # Path.is_file raises an error for a name that is too long
            os.utime(path, ns=(0, 0))
    watched = FileWatcher(paths, MAX_FILE_BYTES)
    assert watched.look()
    for _ in range(3):
        assert not watched.look()
    return watched


def test_first_look_reports_a_change_and_later_ones_do_not(tmp_path: Path) -> None:
    for paths in ((), (put(tmp_path / "a"),), (tmp_path / "missing",)):
        watched = FileWatcher(paths, MAX_FILE_BYTES)
        assert [watched.look() for _ in range(2 * READ_EVERY)] == [True] + [False] * (2 * READ_EVERY - 1)


def test_every_change_is_reported_once(tmp_path: Path) -> None:
    path, other = put(tmp_path / "a"), put(tmp_path / "b")
    watched = settled(path, other, path)
    assert watched.paths == (path, other)

    put(path, b"two")  # in place, of the same size
    assert watched.look()
    assert not watched.look()

    put(tmp_path / "new", b"three")
    (tmp_path / "new").replace(path)
    assert watched.look()
    assert not watched.look()

    other.unlink()
    assert watched.look()
    assert not watched.look()

    put(other)
    assert watched.look()
    assert not watched.look()


def test_rewritten_identical_content_is_not_a_change(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    os.utime(path, ns=(1, 1))
    assert not watched.look()
    put(tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert not watched.look()


def test_mode_change_is_reported(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    path.chmod(0o640)
    assert watched.look()
    assert not watched.look()
    path.chmod(0o600)
    assert watched.look()


def test_owner_change_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    monkeypatch.setattr(watcher, "os", FakeOs(st_uid=12345))
    assert watched.look()
    assert not watched.look()


class FakeOs:
    """The os module with some status fields replaced."""

    def __init__(self, **fields: int) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def stat(self, path: Path) -> Any:
        return self._changed(os.stat(path))

    def fstat(self, descriptor: int) -> Any:
        return self._changed(os.fstat(descriptor))

    def _changed(self, status: os.stat_result) -> Any:
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**{**fields, **self._fields})


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """Like certbot: live/a.pem points to archive/a1.pem, then to archive/a2.pem."""
    archive, live = tmp_path / "archive", tmp_path / "live"
    archive.mkdir()
    live.mkdir()
    first, second = put(archive / "a1.pem"), put(archive / "a2.pem", b"two")
    link = live / "a.pem"
    link.symlink_to(Path("..") / "archive" / "a1.pem")
    watched = settled(link)
    link.unlink()
    assert watched.look()
    link.symlink_to(Path("..") / "archive" / "a2.pem")
    assert watched.look()
    assert not watched.look()
    put(first, b"not watched")
    assert not watched.look()
    put(second, b"three")
    assert watched.look()


def test_swapped_folder_is_reported(tmp_path: Path) -> None:
    """Like Kubernetes: ..data is a link to another folder after each update."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "tls.crt", name.encode())
    data = tmp_path / "..data"
    data.symlink_to("one")
    watched = settled(data / "tls.crt")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(data)
    assert watched.look()
    assert not watched.look()


@pytest.fixture
def frozen_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that never updates times."""
    monkeypatch.setattr(watcher, "os", FakeOs(st_mtime_ns=0, st_ctime_ns=0))


@pytest.mark.usefixtures("frozen_times")
def test_change_without_new_times_is_found_by_periodic_reading(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    put(path, b"two")
    looks = [watched.look() for _ in range(READ_EVERY)]
    assert looks.count(True) == 1
    assert looks.index(True) == READ_EVERY - 1 - 4  # at the 60th look; four were made before


@pytest.mark.usefixtures("frozen_times")
def test_second_change_within_one_clock_tick_is_found_at_next_look(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    put(path, b"longer")
    assert watched.look()
    put(path, b"LONGER")
    assert watched.look()
    watched = FileWatcher([path], MAX_FILE_BYTES)
    assert watched.look()
    put(path, b"longer")
    assert watched.look()


def test_unchanged_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = settled(put(tmp_path / "a"), put(tmp_path / "b"))
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    for _ in range(READ_EVERY - 5):
        assert not watched.look()
    assert opened == []
    assert not watched.look()
    assert opened == [tmp_path / "a", tmp_path / "b"]


def test_unreadable_file_is_reported_and_so_is_its_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a")
    watched = settled(path)
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> int:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "open", fail)
        path.touch()
        assert watched.look()
        assert not watched.look()
    assert watched.look()
    assert not watched.look()


def test_fifo_device_and_huge_file_do_not_block(tmp_path: Path) -> None:
    fifo, loop, large = tmp_path / "fifo", tmp_path / "loop", put(tmp_path / "large")
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    os.truncate(large, 1 << 40)  # a hole: it takes no room, and would take for ever to read
    watched = settled(
        fifo, loop, large, tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b", Path("/dev/zero")
    )
    fifo.unlink()
    assert watched.look()
    os.truncate(large, MAX_FILE_BYTES)
    assert watched.look()


def test_identity_of_a_file_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert file_identity(path) == file_identity(str(path)) == ()
    put(path)
    first = file_identity(path)
    assert first == file_identity(str(path))
    path.chmod(0o640)
    assert file_identity(path) != first


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_identity_of_an_invalid_path_is_not_that_of_a_missing_file(path: str) -> None:
    assert file_identity(path) == file_identity(path) != ()
