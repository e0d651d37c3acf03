"""UNIX sockets for one user."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from zcproto.common.files import UnusableFileError
from zcproto.common.unix_socket import PeerProcess, listen_unix, peer_process


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
