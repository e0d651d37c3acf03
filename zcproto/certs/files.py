"""Decides how certificates and keys are read from and written to a folder.

Rules:
- A key is read only if nobody but its owner can read or change it, and nobody but its owner can list or
  change its folder; the owner is this process's user or root. What is wrong is said with the `chmod` that
  mends it; it is not mended here, because such a key may be known to others already.
- A file is read to at most 1 MiB, and only if it is a regular file: a FIFO would wait for ever.
- A file is written beside its place under a fixed staging name (`.NAME.new`, O_EXCL, 0600), brought to the
  disk, and renamed. A pair is staged whole before its first half is renamed. So after a crash at any moment
  `recover` finds either the old pair whole, or all that it needs to finish the new one.
- Whoever writes holds the folder's lock.

Must not know: X.509, when something is to be written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from zcproto.common.clock import system_clock
from zcproto.errors import CertificateError

MAX_FILE_BYTES = 1 << 20
"""A chain of certificates takes some KiB; anything near this is another kind of file."""

LOCK_WAIT_S = 30.0
"""What another process may need to make two RSA-4096 keys on a slow machine."""

_LOCK_POLL_S = 0.05
_LOCK_NAME = ".lock"
_OTHERS_ANY = 0o077
_OTHERS_READ_WRITE = 0o066
_OTHERS_WRITE = 0o022
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # network file systems that keep names in order themselves
_SECRET_MARK = b"PRIVATE KEY-----"


class DamagedFileError(CertificateError):
    """The file holds nothing that can be read as what it should be."""


@contextlib.contextmanager
def translated(path: Path, what: str, cure: str = "") -> Iterator[None]:
    """Makes a CertificateError of what the system says about `path`; the one place where that is done."""
    try:
        yield
    except OSError as error:
        raise CertificateError(f"{path}: cannot be {what}: {error.strerror or error}{cure}") from error


def _check_path(path: Path) -> None:
    if "\0" in str(path):
        raise CertificateError(f"{str(path)!r}: is no path; configure the right one")


# --- reading ---------------------------------------------------------------------------------------------


def read_certificate_file(path: Path) -> bytes:
    """The bytes of a file that everybody may read but only its owner may change."""
    _check_path(path)
    with translated(path, "read", "; check the path, and that this user may read it"):
        data, status = _read(path)
        if _SECRET_MARK in data:  # certificate and key in one file
            _check_secret(path, status)
        _check_owner(path, status)
        _check_mode(path, status, _OTHERS_WRITE, "others can change it", "go-w")
        _check_folders(path, _OTHERS_WRITE, "others can change it", "go-w")
    return data


def read_key_file(path: Path) -> bytes:
    """The bytes of a file that is its owner's alone, in a folder that is its owner's alone."""
    _check_path(path)
    with translated(path, "read", "; check the path, and that this user may read it"):
        data, status = _read(path)
        _check_secret(path, status)
        _check_folders(path, _OTHERS_READ_WRITE, "others can list or change it", "700")
    return data


def check_folder(directory: Path) -> None:
    """Raises CertificateError unless `directory` is a folder fit to hold keys."""
    with translated(directory, "used"):
        if not directory.is_dir():
            raise CertificateError(f"{directory}: is not a folder; move it away, or configure another one")
        _check_folder(directory, _OTHERS_READ_WRITE, "others can list or change it", "700")


def trusted_owners() -> frozenset[int]:
    """Users whose files are taken: the one that runs this, and root, who could change them anyway."""
    return frozenset({0, os.geteuid()})


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    # The checks are made on what was opened, so that nobody can put another file there in between.
    # O_NONBLOCK is for a FIFO, which would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CertificateError(f"{path}: is not a regular file; configure the path of a PEM file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_BYTES:
        raise CertificateError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; it is no certificate or key")
    return data, status


def _check_secret(path: Path, status: os.stat_result) -> None:
    _check_owner(path, status)
    _check_mode(path, status, _OTHERS_ANY, "others can read or change this key", "600")


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in trusted_owners():
        raise CertificateError(
            f"{path}: belongs to another user (uid {status.st_uid});"
            f" run `chown {os.geteuid()} {shlex.quote(str(path))}`"
        )


def _check_mode(path: Path, status: os.stat_result, forbidden: int, why: str, mode: str) -> None:
    if status.st_mode & forbidden:
        raise CertificateError(
            f"{path}: {why} (mode {stat.S_IMODE(status.st_mode):04o});"
            f" run `chmod {mode} {shlex.quote(str(path))}`"
        )


def _check_folders(path: Path, forbidden: int, why: str, mode: str) -> None:
    """Checks the folder of the file, and where the path is a link also the folder of the link."""
    named = Path(os.path.abspath(path)).parent
    real = Path(os.path.realpath(path)).parent
    if not os.path.samefile(named, real):
        # A link can be pointed elsewhere by those who can change its folder. Listing it tells them nothing.
        _check_folder(named, _OTHERS_WRITE, "others can change it", "go-w")
    _check_folder(real, forbidden, why, mode)


def _check_folder(directory: Path, forbidden: int, why: str, mode: str) -> None:
    status = directory.stat()
    _check_owner(directory, status)
    _check_mode(directory, status, forbidden, why, mode)


# --- writing ---------------------------------------------------------------------------------------------


def make_folder(directory: Path) -> None:
    """Makes the folder and those above it that are missing, each 0700; checks the one that is there."""
    _check_path(directory)
    with translated(directory, "made"):
        missing = []
        folder = directory
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process is first; it is checked below
                folder.mkdir(0o700)
                folder.chmod(0o700)  # a umask may have taken the owner's bits
                sync_folder(folder.parent)
    check_folder(directory)


@contextlib.contextmanager
def locked(
    directory: Path,
    *,
    on_wait: Callable[[], None],
    wait_s: float = LOCK_WAIT_S,
    now: Callable[[], float] = system_clock.now,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Holds the folder's lock, alone among threads and processes; a crash lets go of it.

    Waits up to `wait_s` seconds, then raises CertificateError. `on_wait` is called once if it has to wait.
    """
    path = directory / _LOCK_NAME
    with translated(path, "opened"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline: float | None = None
        while not _try_lock(descriptor, path):
            if deadline is None:
                deadline = now() + wait_s
                on_wait()
            elif now() >= deadline:
                raise CertificateError(
                    f"{path}: another process has held this lock for {wait_s:g} s;"
                    " end it, or wait until it has made its certificates, and start again"
                )
            sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    with translated(path, "locked"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def install(certificate: Path, certificate_pem: bytes, key: Path, new_key_pem: bytes | None) -> None:
    """Puts a certificate in place, and its key too where that is new. Raises CertificateError.

    The caller holds the lock and has called `recover`. If staging fails, nothing has changed; if a rename
    fails, the next `recover` finishes what is left.
    """
    with translated(certificate, "written"):
        try:
            if new_key_pem is not None:
                _stage(key, new_key_pem)
            _stage(certificate, certificate_pem)
            sync_folder(certificate.parent)  # from here on the new pair is whole on the disk
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell; `recover` deletes too
                discard_staged(certificate, key)
            raise
        if new_key_pem is not None:
            _promote(key)
        _promote(certificate)


def recover(certificate: Path, key: Path, matches: Callable[[bytes, bytes], bool]) -> None:
    """Finishes or undoes what a crash left of `install`. The caller holds the lock.

    `matches` tells whether the bytes of a certificate and of a key belong together.
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


def set_aside(path: Path) -> Path:
    """Renames a file that cannot be used to NAME.aside, which it returns: it may be somebody's."""
    aside = path.with_name(path.name + ".aside")
    path.replace(aside)
    sync_folder(path.parent)
    return aside


def sync_folder(directory: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def discard_staged(certificate: Path, key: Path) -> None:
    """Deletes what is staged for a pair, if anything is."""
    for path in (certificate, key):
        _staged(path).unlink(missing_ok=True)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _read_staged(path: Path) -> bytes | None:
    staged = _staged(path)
    return read_key_file(staged) if staged.exists() else None


def _stage(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(_staged(path), flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # a umask may have taken the owner's bits
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _promote(path: Path) -> None:
    # Each rename reaches the disk before the next, so that a power cut cannot swap them.
    _staged(path).replace(path)
    sync_folder(path.parent)
