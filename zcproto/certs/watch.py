"""Decides whether files are other ones than when they were last looked at.

Rules:
- What a path leads to is watched: links are followed, and one that is pointed elsewhere is a change.
- A look asks the file system first: device, inode, size, times, mode and owner. Only if one of these is
  another, the content is read; the same content under the same mode and owner is no change.
- The content is read at the looks right after a difference too, and at every 60th: a file can be changed in
  place within one tick of the file system's clock, or its times can be set back.
- A file that is not there or cannot be read is a state like any other, never an exception.

Must not know: what is in the files, what time it is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zcproto.certs.files import MAX_FILE_BYTES

READ_EVERY = 60
"""Looks from one reading of the content to the next; a minute at the default interval."""

READ_AFTER_CHANGE = 2
"""Looks that read the content after one that found a difference."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One file as it was found."""

    status: tuple[int, ...]
    """What the file system says of it; empty if it says nothing."""
    access: tuple[int, int]
    """Mode and owner: a file can become usable, or unusable, by these alone."""
    digest: bytes
    """SHA-256 of the content, as far as it is read; empty if it cannot be."""
    error: int
    """The errno of what went wrong, such as ENOENT; 0 if nothing did."""

    def is_same(self, other: Fingerprint) -> bool:
        """Whether there is no difference that matters to who reads the file."""
        return (self.access, self.digest, self.error) == (other.access, other.digest, other.error)


class Watch:
    """Some files, looked at again and again."""

    __slots__ = ("_found", "_looks", "_read_until", "paths")

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self._found: dict[Path, Fingerprint] = {}
        self._looks = 0
        self._read_until = 1 + READ_AFTER_CHANGE

    def look(self) -> bool:
        """Whether a file is another one than at the look before; True at the first one.

        Whoever reads the files after this misses no change: one that comes meanwhile is seen at the next look.
        """
        self._looks += 1
        read = self._looks <= self._read_until or self._looks % READ_EVERY == 0
        before = self._found
        self._found = {path: _look_at(path, before.get(path), read) for path in self.paths}
        if self._looks == 1:
            return True
        pairs = [(self._found[path], before[path]) for path in self.paths]
        if any(now.status != then.status for now, then in pairs):
            self._read_until = self._looks + READ_AFTER_CHANGE
        return not all(now.is_same(then) for now, then in pairs)


def _look_at(path: Path, known: Fingerprint | None, read: bool) -> Fingerprint:
    try:
        status = os.stat(path)
        if known is not None and not read and not known.error and known.status == _identity(status):
            return known
        return _read(path)
    except OSError as error:
        return Fingerprint((), (0, 0), b"", error.errno or errno.EIO)
    except ValueError:  # a NUL in the path
        return Fingerprint((), (0, 0), b"", errno.EINVAL)


def _read(path: Path) -> Fingerprint:
    # O_NONBLOCK is for a FIFO, which would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)  # of what was opened; another file may be there by now
        digest = hashlib.sha256()
        if stat.S_ISREG(status.st_mode):
            with open(descriptor, "rb", closefd=False) as file:
                digest.update(file.read(MAX_FILE_BYTES + 1))
    finally:
        os.close(descriptor)
    return Fingerprint(_identity(status), (status.st_mode, status.st_uid), digest.digest(), 0)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # The change time is the kernel's: a program that sets the other times back sets this one forward.
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_mode,
        status.st_uid,
    )
