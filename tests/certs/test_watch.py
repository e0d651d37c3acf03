from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zcproto.certs import watch
from zcproto.certs.files import MAX_FILE_BYTES
from zcproto.certs.watch import READ_EVERY, Watch


def put(path: Path, data: bytes = b"one", times: tuple[int, int] | None = None) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    if times is not None:
        os.utime(path, ns=times)
    return path


def seen(*paths: Path) -> Watch:
    """A watch that has looked long enough to read no more than it must."""
    looking = Watch(paths)
    assert looking.look()
    for _ in range(3):
        assert not looking.look()
    return looking


def test_the_first_look_is_a_change_and_the_next_are_none(tmp_path: Path) -> None:
    for paths in ((), (put(tmp_path / "a"),), (tmp_path / "missing",)):
        looking = Watch(paths)
        assert [looking.look() for _ in range(2 * READ_EVERY)] == [True] + [False] * (2 * READ_EVERY - 1)


def test_each_way_to_change_a_file_is_seen_once(tmp_path: Path) -> None:
    path, other = put(tmp_path / "a"), put(tmp_path / "b")
    looking = seen(path, other, path)
    assert looking.paths == (path, other)

    put(path, b"two")  # in place, of the same size
    assert looking.look()
    assert not looking.look()

    put(tmp_path / "new", b"three")
    (tmp_path / "new").replace(path)
    assert looking.look()
    assert not looking.look()

    other.unlink()
    assert looking.look()
    assert not looking.look()

    put(other)
    assert looking.look()
    assert not looking.look()


def test_a_file_that_is_written_again_as_it_was_is_no_change(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    os.utime(path, ns=(1, 1))
    assert not looking.look()
    put(tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert not looking.look()


def test_a_mode_is_a_change(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    path.chmod(0o640)
    assert looking.look()
    assert not looking.look()
    path.chmod(0o600)
    assert looking.look()


def test_an_owner_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    monkeypatch.setattr(watch, "os", _Os(st_uid=12345))
    assert looking.look()
    assert not looking.look()


class _Os:
    """The os module, but for some fields of what it says of files."""

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


def test_links_are_followed(tmp_path: Path) -> None:
    """As certbot does it: live/a.pem leads to archive/a1.pem, then to archive/a2.pem."""
    archive, live = tmp_path / "archive", tmp_path / "live"
    archive.mkdir()
    live.mkdir()
    first, second = put(archive / "a1.pem"), put(archive / "a2.pem", b"two")
    link = live / "a.pem"
    link.symlink_to(Path("..") / "archive" / "a1.pem")
    looking = seen(link)
    link.unlink()
    assert looking.look()
    link.symlink_to(Path("..") / "archive" / "a2.pem")
    assert looking.look()
    assert not looking.look()
    put(first, b"nobody looks here")
    assert not looking.look()
    put(second, b"three")
    assert looking.look()


def test_a_folder_that_is_swapped_as_a_whole_is_seen(tmp_path: Path) -> None:
    """As Kubernetes does it: ..data leads to a folder with a name of its own."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "tls.crt", name.encode())
    data = tmp_path / "..data"
    data.symlink_to("one")
    looking = seen(data / "tls.crt")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(data)
    assert looking.look()
    assert not looking.look()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose times tell nothing."""
    monkeypatch.setattr(watch, "os", _Os(st_mtime_ns=0, st_ctime_ns=0))


@pytest.mark.usefixtures("blind")
def test_a_change_that_leaves_no_trace_is_found_by_reading_again(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    put(path, b"two")
    looks = [looking.look() for _ in range(READ_EVERY)]
    assert looks.count(True) == 1
    assert looks.index(True) == READ_EVERY - 1 - 4  # at the 60th look; four were made before


@pytest.mark.usefixtures("blind")
def test_a_second_change_within_one_tick_of_the_clock_is_found_soon(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    put(path, b"longer")
    assert looking.look()
    put(path, b"LONGER")
    assert looking.look()
    looking = Watch([path])
    assert looking.look()
    put(path, b"longer")
    assert looking.look()


def test_nothing_is_read_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = seen(put(tmp_path / "a"), put(tmp_path / "b"))
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    for _ in range(READ_EVERY - 5):
        assert not looking.look()
    assert opened == []
    assert not looking.look()
    assert opened == [tmp_path / "a", tmp_path / "b"]


def test_what_cannot_be_read_is_a_state_and_its_end_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a")
    looking = seen(path)
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> int:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "open", fail)
        path.touch()
        assert looking.look()
        assert not looking.look()
    assert looking.look()
    assert not looking.look()


def test_other_things_than_files_do_not_hold_it_up(tmp_path: Path) -> None:
    fifo, loop, large = tmp_path / "fifo", tmp_path / "loop", put(tmp_path / "large")
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    os.truncate(large, 1 << 40)  # a hole: it takes no room, and would take for ever to read
    looking = seen(fifo, loop, large, tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b", Path("/dev/zero"))
    fifo.unlink()
    assert looking.look()
    os.truncate(large, MAX_FILE_BYTES)
    assert looking.look()
