"""A device: a key pair of Ed25519 in a file, by which sessions are opened without any shared secret.

What this file decides: how the key's file is made, and when one is taken.

Rules:
- The file is PKCS#8 in PEM without a passphrase, new, and its owner's alone. One that others can read is refused.
- The key signs and never leaves this object: it is in no repr and in no message.

It must not know: connections, sessions.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from zcproto.common.text import escape_text
from zcproto.errors import CertificateError

MAX_KEY_FILE: Final = 1 << 16
_OTHERS: Final = 0o077


class Device:
    """A device's key. Make one with `create`, once, and take it with `load` from then on.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", code, device, "laptop", ca_file="ca.crt")

    `public_key` are the 32 bytes that servers know it by.
    """

    __slots__ = ("_key", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: Final = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Device(public_key={self.public_key.hex()!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Device:
        """A new device, with its key in a new file of mode 0600. Raises CertificateError if that cannot be made."""
        path = Path(path)
        key = Ed25519PrivateKey.generate()
        try:
            _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except FileExistsError:
            raise _unusable(path, "is there already; load it, or name another file") from None
        except (OSError, ValueError) as error:
            raise _unusable(path, f"cannot be written: {_reason(error)}; check the path") from error
        return cls(key)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Device:
        """The device whose key is in a file. Raises CertificateError if that cannot be used, and says why."""
        path = Path(path)
        try:
            data = _read(path)
        except (OSError, ValueError) as error:
            raise _unusable(path, f"cannot be read: {_reason(error)}; check the path") from error
        try:
            key = load_pem_private_key(data, None)
        except TypeError:
            raise _unusable(path, "is encrypted; a device's key has no passphrase") from None
        except (ValueError, UnsupportedAlgorithm):
            raise _unusable(path, "is no private key in PEM; make one by Device.create") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _unusable(path, "is a key of another kind than Ed25519; make one by Device.create")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of a signature (RFC 8032)."""
        return self._key.sign(message)


def _write(path: Path, data: bytes) -> None:
    """A new file for its owner alone, on the disk with its name, or none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    """What is in a file that is this user's alone. It is looked at after it was opened."""
    # O_NONBLOCK is for a FIFO, which would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_KEY_FILE)
    finally:
        os.close(descriptor)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(path, "is not a regular file; name the file of the key")
    if status.st_uid not in (0, os.geteuid()):
        raise _unusable(
            path,
            f"belongs to another user (uid {status.st_uid});"
            f" run `chown {os.geteuid()} {shlex.quote(str(path))}`",
        )
    if status.st_mode & _OTHERS:
        raise _unusable(
            path,
            f"others can read or change this key (mode {stat.S_IMODE(status.st_mode):04o});"
            f" run `chmod 600 {shlex.quote(str(path))}`, or make a new key if somebody has read it",
        )


def _unusable(path: Path, what: str) -> CertificateError:
    return CertificateError(f"{escape_text(str(path))}: {what}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
