"""Test the key log of a client: its mode, owner and format."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.support import TlsPair
from zcproto.errors import ConfigError
from zcproto.tls.context import client_context, log_keys, server_context

SECRETS = {
    "SERVER_HANDSHAKE_TRAFFIC_SECRET",
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
    "EXPORTER_SECRET",
    "SERVER_TRAFFIC_SECRET_0",
    "CLIENT_TRAFFIC_SECRET_0",
}


def secrets_in(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines() if not line.startswith("#")]


def agree(server_pairs: ServerPairs, context: ssl.SSLContext) -> None:
    TlsPair(FakeTimers(), server_context(server_pairs, ["zcp/1"]), context).agree()


def test_key_log_holds_secrets_of_each_connection(
    server_pairs: ServerPairs, ca_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    context = client_context(ca_file=ca_file, key_log=path)
    agree(server_pairs, context)
    assert set(secrets_in(path)) == SECRETS
    agree(server_pairs, context)
    assert len(secrets_in(path)) == 2 * len(SECRETS)


def test_key_log_has_mode_0600_for_any_umask(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    before = os.umask(0)
    try:
        log_keys(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o600


def test_key_log_is_appended_to(server_pairs: ServerPairs, ca_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("# of before\n")
    agree(server_pairs, client_context(ca_file=ca_file, key_log=path))
    assert path.read_text().startswith("# of before\n")
    assert set(secrets_in(path)) == SECRETS


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_key_log_accessible_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others can read or change .*0{mode:o}\); run: chmod 600 .*keys"):
        client_context(verify=False, key_log=path)
    assert path.read_text() == ""


def test_key_log_link_is_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "keys"
    path.symlink_to(target)
    with pytest.raises(ConfigError, match="is a link"):
        client_context(verify=False, key_log=path)
    assert not target.exists()


def test_key_log_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="cannot be written: No such device"):
        client_context(verify=False, key_log=path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ConfigError, match="is not a regular file"):
            client_context(verify=False, key_log=path)
    finally:
        os.close(reader)


def test_key_log_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr("zcproto.common.files.trusted_owners", lambda: frozenset({user + 1}))
    with pytest.raises(ConfigError, match=f"belongs to another user \\(uid {user}\\)"):
        client_context(verify=False, key_log=tmp_path / "keys")


@pytest.mark.parametrize("name", ["no-folder/keys", ".", "nul\0byte"])
def test_unwritable_key_log_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the key log cannot be written: .*; check the path"):
        client_context(verify=False, key_log=tmp_path / name)
