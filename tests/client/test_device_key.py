"""The file of a device key: creation, permissions, and content that is not a key."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from zcproto.client.client import connect
from zcproto.client.credentials import Device
from zcproto.errors import CertificateError, ConfigError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
DEVICE = Device(KEY)


def test_device_key_is_created_once_and_loaded(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = Device.create(tmp_path / "laptop.key")
    finally:
        os.umask(old)
    loaded = Device.load(str(tmp_path / "laptop.key"))
    assert loaded.public_key == made.public_key
    assert len(made.public_key) == 32
    Ed25519PublicKey.from_public_bytes(made.public_key).verify(loaded.sign(b"this"), b"this")
    assert stat.S_IMODE((tmp_path / "laptop.key").stat().st_mode) == 0o600
    assert (tmp_path / "laptop.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert Device.create(tmp_path / "other.key").public_key != made.public_key


def test_device_key_is_not_in_repr_and_not_pickled(tmp_path: Path) -> None:
    assert repr(DEVICE) == f"Device(public_key={DEVICE.public_key.hex()!r})"
    assert KEY.private_bytes_raw().hex() not in repr(DEVICE)
    with pytest.raises(TypeError):
        pickle.dumps(DEVICE)
    assert not hasattr(DEVICE, "__dict__")


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_existing_path_is_not_overwritten_by_create(tmp_path: Path, what: str) -> None:
    path = tmp_path / "laptop.key"
    if what == "file":
        path.write_text("old")
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    with pytest.raises(CertificateError, match="exists already; load it, or name another file"):
        Device.create(path)
    assert what != "file" or path.read_text() == "old"
    assert not (tmp_path / "elsewhere").exists()


def test_unwritable_path_raises_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CertificateError, match="cannot be written: No such file or directory; check the path"
    ):
        Device.create(tmp_path / "no" / "laptop.key")
    with pytest.raises(CertificateError, match="cannot be written: ValueError"):
        Device.create("a\0b")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match="cannot be written: No space left on device"):
        Device.create(tmp_path / "laptop.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660, 0o777])
def test_device_key_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "laptop.key"
    Device.create(path)
    path.chmod(mode)
    with pytest.raises(CertificateError) as caught:
        Device.load(path)
    assert f"mode {mode:04o}" in str(caught.value)
    assert f"chmod 600 {path}" in str(caught.value)


def test_device_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device.create(tmp_path / "laptop.key")
    status = os.stat(tmp_path / "laptop.key")
    other = os.stat_result((*status[:4], status.st_uid + 12345, *status[5:]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: other)
    with pytest.raises(CertificateError, match="belongs to another user"):
        Device.load(tmp_path / "laptop.key")


def pem(key: Any, encryption: Any = None) -> bytes:
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "does not contain a private key in PEM; create one with Device.create"),
        (b"nonsense", "does not contain a private key in PEM"),
        (pem(KEY)[:-60], "does not contain a private key in PEM"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "is not an Ed25519 key"),
        (
            pem(KEY, BestAvailableEncryption(b"hunter2")),
            "is encrypted; use a device key without a passphrase",
        ),
        (b"x" * 200_000, "is larger than 65536 bytes"),
    ],
)
def test_invalid_device_key_raises_without_its_content(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "laptop.key"
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(CertificateError, match=expected) as caught:
        Device.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_missing_file_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="cannot be read: No such file or directory"):
        Device.load(tmp_path / "laptop.key")
    with pytest.raises(CertificateError, match="is not a regular file"):
        Device.load(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(CertificateError, match="is not a regular file"):
        Device.load(tmp_path / "fifo")
    with pytest.raises(CertificateError, match="cannot be read: ValueError"):
        Device.load("a\0b")


def test_device_option_accepts_device_or_file(tmp_path: Path) -> None:
    device = Device.create(tmp_path / "laptop.key")
    for given in (device, tmp_path / "laptop.key", str(tmp_path / "laptop.key")):
        connect("localhost", device=given, device_name="laptop")
    with pytest.raises(CertificateError):
        connect("localhost", device=tmp_path / "other.key", device_name="laptop")
    with pytest.raises(ConfigError, match="device_name is missing"):
        connect("localhost", device=device)
