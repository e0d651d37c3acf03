"""UNIX sockets for one user."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zcproto.common.files import UnusableFileError
from zcproto.common.unix_socket import PeerProcess, SocketFile, listen_unix, peer_process


def test_socket_has_mode_0600_and_replaces_one_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    listen_unix(path, 1).close()
    with listen_unix(path, 1) as listening, socket.socket(socket.AF_UNIX) as peer:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not listening.getblocking()
        peer.connect(str(path))
        accepted, _ = listening.accept()
        with accepted:
            assert peer_process(accepted) == PeerProcess(os.getpid(), os.geteuid())
    assert [each.name for each in tmp_path.iterdir()] == ["x.sock"]


def test_other_file_at_the_path_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    path.write_text("mine")
    with pytest.raises(UnusableFileError, match="not a socket; move it away"):
        listen_unix(path, 1)
    assert path.read_text() == "mine"


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listen_unix(tmp_path / "missing" / "x.sock", 1)


def test_peer_is_unknown_where_the_system_does_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_PEERCRED")
    with socket.socket(socket.AF_UNIX) as peer:
        assert peer_process(peer) is None


def test_removed_or_replaced_socket_is_missing_and_made_again(tmp_path: Path) -> None:
    file = SocketFile(tmp_path / "x.sock")
    assert not file.is_missing  # of no process
    first = file.open(1)
    assert first is not None
    assert not file.is_missing
    file.path.unlink()
    assert file.is_missing
    with first, file.renew(1):
        assert not file.is_missing
        listen_unix(file.path, 1).close()
        assert file.is_missing
        with file.renew(1), socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(file.path))
            assert SocketFile(file.path).open(1) is None  # the lock is held all the time
        file.close()
    assert not file.path.exists()
    assert not file.is_missing


def test_socket_in_a_folder_that_cannot_be_read_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SocketFile(tmp_path / "x.sock")
    with file.open(1) as listening:  # type: ignore[union-attr]

        def lstat(path: Path) -> os.stat_result:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "lstat", lstat)
        assert not file.is_missing
        assert listening.fileno() >= 0
    monkeypatch.undo()
    file.close()


def test_peer_is_reported_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """By LOCAL_PEERCRED, a `struct xucred`, and LOCAL_PEERPID (sys/un.h)."""

    def getsockopt(level: int, name: int, size: int = 0) -> Any:
        assert level == 0
        return struct.pack("=IIh2x16I", 0, 501, 1, 20, *[0] * 15) if (name, size) == (1, 76) else 4711

    monkeypatch.setattr(sys, "platform", "darwin")
    assert peer_process(cast(socket.socket, SimpleNamespace(getsockopt=getsockopt))) == PeerProcess(4711, 501)
