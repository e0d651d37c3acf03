"""Write lines to a file or standard error, which may be full, slow or closed.

Rules:
- A write never blocks. Bytes that a pipe, terminal or full disk does not accept are kept, up to MAX_WAITING, and
  written with the next line or `flush`; more are lost. A server that stops when its log is not read would be an
  easy target.
- Every method that can lose lines returns their number. Only a stream in place of standard error may raise.
- A regular file is written at once: that is a copy into the page cache.
- A partially written line is always terminated, even if the rest was lost. A disk that is full in the middle of a
  line gets none of it: other processes, which write to the same file, may be the next to find space.

Must not know: the content of lines.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO, TypeAlias

from zcproto.common.files import NO_WAIT, OPEN
from zcproto.errors import ConfigError

LOG_KEY: Final = "log.file"

MAX_WAITING: Final = 1_048_576
"""Maximum bytes waiting for a reader or for space on the disk."""

_PART: Final = 4_096  # a writable pipe accepts this much atomically (pipe(7), PIPE_BUF)
FINISH_TRIES: Final = 20
FINISH_TRY_MS: Final = 50

# NO_WAIT for named pipes: opening one without a reader fails, and a full one makes lines wait.
_APPEND: Final = os.O_WRONLY | os.O_APPEND | OPEN | NO_WAIT | getattr(os, "O_NOCTTY", 0)
_CLOSED: Final = -1
_WAIT: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EDQUOT})


class Descriptor:
    """Write to a file descriptor of any kind without blocking. Thread-safe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._within_line = False
        self._poll: select.poll | None = None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    @property
    def waiting(self) -> int:
        """Return the bytes not written yet."""
        return len(self._waiting)

    def write(self, lines: str) -> int:
        data = lines.encode("ascii", "backslashreplace")
        lost = 0
        with self._lock:
            if self._descriptor == _CLOSED:
                return data.count(b"\n")
            if len(self._waiting) + len(data) > MAX_WAITING:
                lost = self._write_waiting()
                if len(self._waiting) + len(data) > MAX_WAITING:
                    return lost + data.count(b"\n")
            if self._within_line and not self._waiting:  # the rest of that line was lost
                self._waiting += b"\n"
            self._waiting += data
            return lost + self._write_waiting()

    def flush(self) -> int:
        """Write waiting bytes as far as possible without blocking."""
        with self._lock:
            return self._write_waiting()

    def finish(self) -> int:
        """Flush, and wait for a reader, up to a second."""
        lost = self.flush()
        for _ in range(FINISH_TRIES):
            if not self._waiting or self._poll is None:
                break
            self._poll.poll(FINISH_TRY_MS)
            lost += self.flush()
        return lost

    def close(self, *, keep: bool = False) -> int:
        """Stop using the descriptor, and close it unless `keep`.

        A concurrent writer never writes to a file that reuses the descriptor.
        """
        with self._lock:
            descriptor, self._descriptor = self._descriptor, _CLOSED
            lost = self._waiting.count(b"\n")
            self._waiting.clear()
            if not keep and descriptor != _CLOSED:
                os.close(descriptor)
        return lost

    def _write_waiting(self) -> int:
        waiting = self._waiting
        while waiting:
            if self._poll is not None and not self._poll.poll(0):
                break
            try:
                written = os.write(self._descriptor, waiting if self._poll is None else _part(waiting))
            except OSError as error:
                if error.errno in _WAIT:
                    break
                lost = waiting.count(b"\n") - waiting.startswith(b"\n")
                waiting.clear()
                return lost
            if not written:
                break
            begun = written - 1 - waiting.rfind(b"\n", 0, written)
            is_removed = begun > 0 and self._poll is None and self._removed(begun)
            self._within_line = begun > 0 and not is_removed
            del waiting[: written - begun if is_removed else written]
            if is_removed:
                break
        return 0

    def _removed(self, size: int) -> bool:
        """Remove the last bytes written to a regular file, unless another process has written since."""
        try:
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if end != os.fstat(self._descriptor).st_size:
                return False
            os.ftruncate(self._descriptor, end - size)
        except OSError:
            return False
        return True


def _part(waiting: bytearray) -> bytearray:
    """Return what a pipe takes at once: whole lines if one fits, so that those of other processes stay apart."""
    return waiting[: waiting.rfind(b"\n", 0, _PART) + 1 or _PART]


class StandardError:
    """The current standard error, looked up for each line: a program or test may replace it."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self._descriptor: Descriptor | None = None
        self._is_terminal = self._is_journal = False

    def write(self, lines: str) -> int:
        stream = self._now()
        if self._descriptor is not None and not stream.closed:
            return self._descriptor.write(lines)
        stream.write(lines)  # an in-memory stream cannot block
        stream.flush()
        return 0

    def _now(self) -> TextIO:
        stream = sys.stderr
        if stream is not self._stream:
            self._stream, self._descriptor = stream, _descriptor_of(stream)
            self._is_terminal, self._is_journal = stream.isatty(), is_journal(stream)
        return stream

    def flush(self) -> int:
        stream = self._stream
        if self._descriptor is None or stream is None or stream is not sys.stderr or stream.closed:
            return 0
        return self._descriptor.flush()

    def finish(self) -> int:
        lost = self.flush()
        if self.waiting and self._descriptor is not None:
            lost += self._descriptor.finish()
        return lost

    @property
    def waiting(self) -> int:
        return 0 if self._descriptor is None else self._descriptor.waiting

    def is_terminal(self) -> bool:
        self._now()
        return self._is_terminal

    def is_journal(self) -> bool:
        """Whether systemd passes the lines to its journal (systemd.exec(5), JOURNAL_STREAM)."""
        self._now()
        return self._is_journal

    def close(self) -> int:
        # Standard error stays open.
        return 0 if self._descriptor is None else self._descriptor.close(keep=True)


def _descriptor_of(stream: TextIO) -> Descriptor | None:
    try:
        return Descriptor(stream.fileno())
    except (OSError, ValueError, AttributeError):  # an in-memory stream, or no stream
        return None


def is_journal(stream: TextIO) -> bool:
    """Return whether systemd passes what a stream gets to its journal."""
    wanted = os.environ.get("JOURNAL_STREAM")
    if not wanted:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return wanted == f"{found.st_dev}:{found.st_ino}"


class LogFile(Descriptor):
    """A file opened for appending, created with mode 0600. Raises ConfigError, which names `key`, if it cannot be
    opened.
    """

    def __init__(self, path: Path, key: str = LOG_KEY) -> None:
        self.path = path
        self.key = key
        with _opening(path, key):
            super().__init__(os.open(path, _APPEND | os.O_CREAT, 0o600))

    def is_terminal(self) -> bool:
        return False

    def is_journal(self) -> bool:
        return False


def check_log_file(path: Path, key: str) -> None:
    """Raise what `LogFile` would raise, without creating the file."""
    with _opening(path, key):
        try:
            os.close(os.open(path, _APPEND))
        except FileNotFoundError:
            folder = os.path.dirname(os.path.realpath(path))
            os.stat(folder)
            if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


@contextmanager
def _opening(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cure = "create its folder, and let the user of the server write to it"
        raise ConfigError([f'{key} = "{path}": cannot be opened: {error.strerror}; {cure}']) from error


Output: TypeAlias = StandardError | LogFile
"""A destination of lines, one or several per call."""
