"""Run `zcproto cert` in a home folder with managed certificates."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.conftest import ServerPairs
from zcproto.certs import authority
from zcproto.cli import main
from zcproto.common.clock import system_clock

Capture = pytest.CaptureFixture[str]

DAY = timedelta(days=1)
CONFIG = '[certificates]\nkey_types = ["ecdsa-p256"]\nnames = ["zcp.example.com"]\n'


@pytest.fixture(autouse=True)
def quick_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "KEY_TYPE", "rsa-2048")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once") / "home"
    folder.mkdir(mode=0o700)
    (folder / "config.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        assert main(["cert", "renew", "--home", str(folder)]) == 0
    return folder


@pytest.fixture
def made(made_once: Path, home: Path) -> Path:
    """Make a home folder with managed certificates, and return the folder of certificates."""
    shutil.copytree(made_once, home)
    return home / "certs"


def run(*words: str | Path) -> int:
    return main(["cert", *map(str, words)])


def data_of(capsys: Capture, *words: str | Path, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(*words) == code
    return json.loads(capsys.readouterr().out)


def at(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    monkeypatch.setattr(system_clock, "wall", lambda: int(moment.timestamp() * 1000))


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def pin_by_hand(certificate: x509.Certificate) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    spki = certificate.public_key().public_bytes(serialization.Encoding.DER, form)
    return "sha256/" + base64.b64encode(hashlib.sha256(spki).digest()).decode()


def configure(home: Path, text: str) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "config.toml").write_text(text)


def use_files(home: Path, pairs: ServerPairs) -> tuple[Path, Path]:
    """Configure external certificates."""
    folder = home / "files"
    folder.mkdir(mode=0o700, parents=True)
    home.chmod(0o700)
    certificate, key = folder / "site.crt", folder / "site.key"
    shutil.copy(pairs.ecdsa.certificate, certificate)
    shutil.copy(pairs.ecdsa.key, key)
    certificate.chmod(0o644)
    key.chmod(0o600)
    configure(home, f'[certificates]\nmode = "files"\ncertificate = ["{certificate}"]\nkey = ["{key}"]\n')
    return certificate, key
