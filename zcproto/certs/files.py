"""Decides how certificates and keys are read from and written to a folder.

Rules:
- A key is read only if no other user can read or change it, and no other user can list or change its folder. The
  message names the `chmod` that fixes it. It is not fixed automatically, because others may already have such a
  key.
- A certificate is read only if no other user can change it or its folder.
- A pair is staged completely before its first half is renamed. So after a crash at any moment, `recover` finds
  either the complete old pair, or everything it needs to finish the new one.
- Writers hold the folder's lock.

Must not know: X.509, when something is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from zcproto.common import files as common
from zcproto.common.clock import system_clock
from zcproto.common.files import OTHERS_ANY, OTHERS_READ_WRITE, OTHERS_WRITE, file_errors, sync_folder
from zcproto.errors import CertificateError

MAX_FILE_BYTES = 1 << 20
"""A chain of certificates has some KiB; anything near this is another kind of file."""

LOCK_WAIT_S = 30.0
"""What another process may need to generate two RSA-4096 keys on a slow machine."""

_LOCK_NAME = ".lock"
_SECRET_MARK = b"PRIVATE KEY-----"


class DamagedFileError(CertificateError):
    """The file contains nothing that can be parsed as what it should be."""


# --- reading -----------------------------------------------------------------------------------------------


def read_certificate_file(path: Path) -> bytes:
    """Return the bytes of a file that others may read but not change."""
    with _reading(path):
        data, status = common.read_file(path, MAX_FILE_BYTES, forbidden=None)
        # A file with certificate and key is as secret as a key.
        common.check_access(path, status, OTHERS_ANY if _SECRET_MARK in data else OTHERS_WRITE)
        common.check_folders(path)
    return data


def read_key_file(path: Path) -> bytes:
    """Return the bytes of a file that only its owner can access, in a folder that others cannot list."""
    with _reading(path):
        data, _ = common.read_file(path, MAX_FILE_BYTES)
        common.check_folders(path, OTHERS_READ_WRITE)
    return data


def check_folder(directory: Path) -> None:
    """Raise CertificateError unless `directory` is a folder that can hold keys."""
    with file_errors(directory, "used", CertificateError):
        common.check_folder(directory, OTHERS_READ_WRITE)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    _check_path(path)
    with file_errors(path, "read", CertificateError, fix="check the path, and that this user may read it"):
        yield


def _check_path(path: Path) -> None:
    if "\0" in str(path):
        raise CertificateError(f"{str(path)!r}: is not a valid path; configure the right one")


def check_writable(path: Path, *, needs_space: bool = True) -> None:
    """Raise CertificateError if this user cannot write a file, or in a folder."""
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    with file_errors(path, "written", CertificateError):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        if needs_space and not os.statvfs(folder).f_bavail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


# --- writing -----------------------------------------------------------------------------------------------


def make_folder(directory: Path) -> None:
    """Create the folder and its missing parents with mode 0700. Check an existing folder."""
    _check_path(directory)
    with file_errors(directory, "created", CertificateError):
        missing = []
        folder = directory
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster; it is checked below
                folder.mkdir(0o700)
                folder.chmod(0o700)  # a umask may have removed the owner's bits
                sync_folder(folder.parent)
    check_folder(directory)


@contextlib.contextmanager
def locked(
    directory: Path,
    progress: Callable[[str], None],
    *,
    now: Callable[[], float] = system_clock.now,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold the folder's lock, exclusive among threads and processes. Turn any OSError into a CertificateError.

    Raises CertificateError after LOCK_WAIT_S. A wait is reported to `progress`.
    """

    def on_wait() -> None:
        progress(f"Waiting for another process that is changing the certificates in {directory}.")

    with (
        file_errors(directory, "used", CertificateError),
        common.locked(directory / _LOCK_NAME, LOCK_WAIT_S, on_wait=on_wait, now=now, sleep=sleep),
    ):
        yield


def install(certificate: Path, certificate_pem: bytes, key: Path, new_key_pem: bytes | None) -> None:
    """Install a certificate, together with its key if that is new. Raises CertificateError.

    The caller holds the lock and has called `recover`. If staging fails, nothing has changed. If a rename fails,
    the next `recover` finishes the rest.
    """
    with file_errors(certificate, "written", CertificateError):
        try:
            if new_key_pem is not None:
                _stage(key, new_key_pem)
            _stage(certificate, certificate_pem)
            sync_folder(certificate.parent)  # from here on the new pair is complete on the disk
        except OSError:
            with contextlib.suppress(OSError):  # raise the first error; `recover` deletes too
                discard_staged(certificate, key)
            raise
        if new_key_pem is not None:
            _promote(key)
        _promote(certificate)


def recover(certificate: Path, key: Path, matches: Callable[[bytes, bytes], bool]) -> None:
    """Finish or undo an `install` that was interrupted. The caller holds the lock.

    `matches` returns True if the bytes of a certificate and of a key belong together.
    """
    staged_certificate = _read_staged(certificate)
    staged_key = _read_staged(key)
    if staged_certificate is not None:
        if staged_key is not None and matches(staged_certificate, staged_key):
            _promote(key)
            _promote(certificate)
        elif key.exists() and matches(staged_certificate, read_key_file(key)):
            _promote(certificate)
    discard_staged(certificate, key)


def replace(path: Path, data: bytes) -> None:
    """Replace a single file atomically. Raises CertificateError."""
    with file_errors(path, "written", CertificateError):
        discard_staged(path)
        _stage(path, data)
        _promote(path)


def set_aside(path: Path) -> Path:
    """Rename an unusable file, which may be needed elsewhere, to NAME.aside. Return the new path."""
    aside = path.with_name(path.name + ".aside")
    path.replace(aside)
    sync_folder(path.parent)
    return aside


def discard_staged(*paths: Path) -> None:
    """Delete what is staged for these files."""
    for path in paths:
        common.staging_path(path).unlink(missing_ok=True)


def _read_staged(path: Path) -> bytes | None:
    staged = common.staging_path(path)
    return read_key_file(staged) if staged.exists() else None


def _stage(path: Path, data: bytes) -> None:
    with common.new_file(common.staging_path(path)) as file:
        file.write(data)


def _promote(path: Path) -> None:
    # Each rename reaches the disk before the next, so that a power failure cannot swap them.
    common.install_file(common.staging_path(path), path)
