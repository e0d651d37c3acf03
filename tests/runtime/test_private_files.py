"""Tests of file modes: a secret readable by others prevents the start, and the message names the chmod."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from tests.server.helpers import configuration
from zcproto.auth import UserFile
from zcproto.errors import CertificateError, ConfigError
from zcproto.runtime.server import Server


def foreign(home: Path) -> dict[str, Any]:
    """Configure external certificates with an encrypted key."""
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(home / "foreign.pem")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (home / "foreign.key").write_bytes(key.private_bytes(*form, secret))
    (home / "passphrase").write_text("secret\n")
    return {
        "certificates__mode": "files",
        "certificates__certificate": [str(home / "foreign.pem")],
        "certificates__key": [str(home / "foreign.key")],
        "certificates__key_passphrase_file": str(home / "passphrase"),
    }


def sqlite(home: Path) -> dict[str, Any]:
    return {"store__url": "sqlite"}


def valkey(home: Path) -> dict[str, Any]:
    pytest.importorskip("redis")
    (home / "valkey").write_text("password\n")
    return {"store__url": "valkey://127.0.0.1:1", "store__password_file": str(home / "valkey")}


def webhook(home: Path) -> dict[str, Any]:
    (home / "webhook").write_text("w" * 40)
    return {
        "alerts__webhook": "https://127.0.0.1:1/",
        "alerts__webhook_secret_file": str(home / "webhook"),
    }


def nothing(home: Path) -> dict[str, Any]:
    return {}


@pytest.fixture
def home(home: Path) -> Path:
    UserFile(home / "users.toml").add("ada")
    for name in ("devices.toml", "sessions.db"):
        (home / name).touch()
    for path in home.iterdir():
        if path.is_file():
            path.chmod(0o600)
    return home


FILES = {
    "users.toml": nothing,
    "devices.toml": nothing,
    "sessions.db": sqlite,
    "certs/server-ecdsa.key": nothing,
    "certs/ca.key": nothing,
    "foreign.key": foreign,
    "passphrase": foreign,
    "valkey": valkey,
    "webhook": webhook,
}


@pytest.mark.requirement("first_run")
@pytest.mark.parametrize("mode", [0o644, 0o620])
@pytest.mark.parametrize("name", FILES)
def test_file_readable_by_others_prevents_start(home: Path, name: str, mode: int) -> None:
    settings = FILES[name](home)
    for path in (*home.iterdir(), *(home / "certs").iterdir()):
        if path.is_file():
            path.chmod(0o600)
    (home / name).chmod(mode)
    server = Server(None, configuration(home, **settings), home=home)
    with pytest.raises((ConfigError, CertificateError)) as refused:
        asyncio.run(server.start())
    assert Path(name).name in str(refused.value)
    assert "chmod" in str(refused.value)
    assert server.addresses == []
