"""Detect that files have changed.

Decides: whether a file differs from the file found before.

Rules:
- Links are followed: the target is watched, and a link to another target is a change.
- An unchanged identity (device, inode, size, times, mode, owner) means an unchanged file. `FileWatcher` also
  compares content: the same content with the same mode and owner is unchanged. It reads content when the
  identity differs, in the two looks that follow, and in every 60th: a file can change in place within one tick
  of the file system's clock, or have its times set back.
- A missing or unreadable file is a state like any other, never an exception.

Must not know: what files contain, what time it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from zcproto.common.files import NO_WAIT, OPEN

READ_EVERY: Final = 60
"""Looks from one reading of unchanged content to the next."""

READ_AFTER_CHANGE: Final = 2
"""Looks that read the content after one that found another identity."""

FileIdentity = tuple[int, ...]
"""State of a file that differs between any two versions."""

NO_FILE: Final[FileIdentity] = ()


def file_identity(path: str | os.PathLike[str]) -> FileIdentity:
    """Return the state of the file at `path`: one `stat`, no exception."""
    try:
        return identity_of(os.stat(path))
    except FileNotFoundError:
        return NO_FILE
    except OSError as error:
        return (-1, error.errno or errno.EIO)
    except ValueError:  # a NUL in the path
        return (-1, errno.EINVAL)


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return the identity of a file by its status."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # set by the kernel alone, also when a program sets the other times back
        status.st_mode,
        status.st_uid,
    )


class Fingerprint(NamedTuple):
    """One file as it was found."""

    identity: FileIdentity
    """Empty if it cannot be read."""
    access: tuple[int, int]
    """Mode and owner: either can make a file usable or unusable."""
    digest: bytes
    """SHA-256 of the content, up to the limit; empty if it cannot be read."""
    error: int
    """The errno of what went wrong, such as ENOENT, or 0."""


class FileWatcher:
    """Some files, and how they were found. Up to `max_bytes` of their content are compared."""

    def __init__(self, paths: Iterable[Path], max_bytes: int) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self._max_bytes = max_bytes
        self._found: dict[Path, Fingerprint] = {}
        self._looks = 0
        self._read_until = 1 + READ_AFTER_CHANGE

    def look(self) -> bool:
        """Return whether a file has changed since the look before; True at the first one.

        A caller that reads the files after a look misses no change: a later one is found by the next look.
        """
        self._looks += 1
        read = self._looks <= self._read_until or self._looks % READ_EVERY == 0
        before = self._found
        self._found = {path: self._look_at(path, before.get(path), read) for path in self.paths}
        if self._looks == 1:
            return True
        pairs = [(self._found[path], before[path]) for path in self.paths]
        if any(now.identity != then.identity for now, then in pairs):
            self._read_until = self._looks + READ_AFTER_CHANGE
        return any(now[1:] != then[1:] for now, then in pairs)

    def _look_at(self, path: Path, known: Fingerprint | None, read: bool) -> Fingerprint:
        try:
            if known is not None and not read and not known.error and known.identity == file_identity(path):
                return known
            return self._read(path)
        except OSError as error:
            return Fingerprint((), (0, 0), b"", error.errno or errno.EIO)
        except ValueError:  # a NUL in the path
            return Fingerprint((), (0, 0), b"", errno.EINVAL)

    def _read(self, path: Path) -> Fingerprint:
        descriptor = os.open(path, os.O_RDONLY | OPEN | NO_WAIT)
        try:
            status = os.fstat(descriptor)  # of the open file; the path may hold another one by now
            digest = hashlib.sha256()
            if stat.S_ISREG(status.st_mode):
                with open(descriptor, "rb", closefd=False) as file:
                    digest.update(file.read(self._max_bytes + 1))
        finally:
            os.close(descriptor)
        return Fingerprint(identity_of(status), (status.st_mode, status.st_uid), digest.digest(), 0)
