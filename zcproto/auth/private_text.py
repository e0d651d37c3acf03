"""A text file in the home folder that is its owner's alone, read and written by several processes.

What this file decides: when such a file is taken, and how it is replaced.

Rules:
- The file is refused if anyone but its owner can read or change it, and if it is larger than it can be.
- Writers hold a lock; the new text is written beside the file, brought to the disk and renamed, so that readers
  and a crash find either the old file or the new one.
- Whatever the system says becomes a ConfigError that names the file.

It must not know: what the text means.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tomli

from zcproto.common.clock import system_clock
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

LOCK_WAIT_S: Final = 10.0
"""What another process needs to add a million users."""

_LOCK_POLL_S: Final = 0.05
_OTHERS: Final = 0o077
_SHOWN: Final = 120
_NO_FOLDER_SYNC: Final = (
    errno.EINVAL,
    errno.ENOTSUP,
)  # network file systems that keep names in order themselves

Stamp = tuple[int, ...]
"""What tells one state of a file from another."""

NO_FILE: Final[Stamp] = ()
NOT_READ: Final[Stamp] = (-1,)


class PrivateText:
    """One such file. Making this touches nothing. `what` is what it should be, such as "file of users"."""

    __slots__ = ("_lock_wait_s", "_max_bytes", "_path", "_what", "path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        what: str,
        *,
        max_bytes: int,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.path = Path(path)
        self._path = str(self.path)  # a login looks at a file: as text it is not turned into text again
        self._what = what
        self._max_bytes = max_bytes
        self._lock_wait_s = lock_wait_s

    def look(self) -> Stamp:
        """The state that the file is in. Takes one stat, and never raises."""
        try:
            return _stamp_of(os.stat(self._path))
        except FileNotFoundError:
            return NO_FILE
        except OSError as error:
            return (-2, error.errno or 0)

    def read(self) -> tuple[Stamp, str]:
        """The state that the file is in, and its text; NO_FILE and no text if it is not there."""
        with self._translated("read"):
            try:
                # O_NONBLOCK is for a FIFO, which would wait for a writer.
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return NO_FILE, ""
            try:
                status = os.fstat(descriptor)
                self._check(status)
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read(self._max_bytes)
            finally:
                os.close(descriptor)
        try:
            return _stamp_of(status), data.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"is not UTF-8 at byte {error.start}") from None

    def _check(self, status: os.stat_result) -> None:
        """Refuse what is no file of this user alone. Checked on what was opened."""
        if not stat.S_ISREG(status.st_mode):
            raise self.fault("is not a regular file")
        if status.st_size > self._max_bytes:
            raise self.fault(f"is larger than {self._max_bytes} bytes; it is no {self._what}")
        if status.st_uid not in trusted_owners():
            raise self.fault(
                f"belongs to another user (uid {status.st_uid});"
                f" run: chown {os.geteuid()} {shlex.quote(str(self.path))}"
            )
        if status.st_mode & _OTHERS:
            raise self.fault(
                f"others can read or change it (mode {stat.S_IMODE(status.st_mode):04o});"
                f" run: chmod 600 {shlex.quote(str(self.path))}"
            )

    def document(self, text: str) -> dict[str, Any]:
        """The text as TOML."""
        try:
            return tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise self.fault(escape_text(str(error), _SHOWN)) from None
        except RecursionError:
            raise self.fault(f"is nested too deep; it is no {self._what}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of all who write. The folder is made if it is not there."""
        with self._translated("written"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.name}.lock")
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            deadline = system_clock.now() + self._lock_wait_s
            try:
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if system_clock.now() >= deadline:
                            raise self.fault("another process is writing to it; try again") from None
                    time.sleep(_LOCK_POLL_S)
                yield
            finally:
                os.close(descriptor)

    def replace(self, text: str) -> None:
        """Put a new file in the place of the old one, in one step. Hold the lock."""
        data = text.encode()
        if len(data) > self._max_bytes:
            raise self.fault(f"would be larger than {self._max_bytes} bytes")
        staged = self.path.with_name(f".{self.path.name}.new")
        staged.unlink(missing_ok=True)  # what a crash left; the lock is held
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with open(os.open(staged, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

    def fault(self, *faults: str) -> ConfigError:
        """What is wrong with the file, each with its path."""
        path = escape_text(str(self.path))
        return ConfigError([f"{path}: {fault}" for fault in faults])

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Make a ConfigError of what the system says; the one place where that is done."""
        try:
            yield
        except OSError as error:
            raise self.fault(f"cannot be {what}: {error.strerror or error}") from error


def trusted_owners() -> frozenset[int]:
    """Users whose files are taken: the one that runs this, and root, who could change them anyway."""
    return frozenset({0, os.geteuid()})


def _stamp_of(status: os.stat_result) -> Stamp:
    # st_ctime_ns tells of a change of mode too: the cure for a file that others could read.
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _sync_folder(folder: Path) -> None:
    """Bring the folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
