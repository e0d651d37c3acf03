"""Keys made once, and a folder of own certificates made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.certs.support import ensure
from zcproto.certs import authority, keys

__all__ = ["ec_key", "made", "other_rsa_key", "quick_authority", "quick_keys", "rsa_key"]


@pytest.fixture(autouse=True)
def quick_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    """An authority of 2048 bits, as an RSA-4096 key takes a second to make."""
    monkeypatch.setattr(authority, "KEY_TYPE", "rsa-2048")


@pytest.fixture(scope="session")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="session")
def other_rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="session")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="session")
def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("once") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        ensure(directory)
    return directory


@pytest.fixture
def made(_made_once: Path, tmp_path: Path) -> Path:
    """A folder in which `ensure` has made its certificates at NOW."""
    directory = tmp_path / "made"
    shutil.copytree(_made_once, directory)
    return directory


@pytest.fixture
def quick_keys(monkeypatch: pytest.MonkeyPatch, rsa_key: Any) -> None:
    """Replace generated RSA keys by an existing one."""
    real = keys.generate
    monkeypatch.setattr(keys, "generate", lambda kind: rsa_key if keys.family(kind) == "rsa" else real(kind))
