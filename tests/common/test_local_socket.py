from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zcproto.common import local_socket
from zcproto.common.local_socket import MAX_ADDRESS, address_of


def test_short_path_is_unchanged() -> None:
    with address_of(Path("/run/x.sock")) as address:
        assert address == "/run/x.sock"


def test_long_path_can_be_bound_and_connected_to(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30) / "x.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        with address_of(path) as address:
            assert len(address) <= MAX_ADDRESS
            server.bind(address)
            server.listen()
            client.connect(address)
        assert path.is_socket()


def test_long_path_is_unchanged_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_socket, "_DESCRIPTORS", tmp_path / "missing")
    path = tmp_path / ("long" * 30)
    with address_of(path) as address:
        assert address == str(path)


def test_long_path_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), address_of(tmp_path / ("long" * 30) / "x.sock"):
        pass
