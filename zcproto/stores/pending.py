"""Revocations that could not be written to the store: in a file of this machine, until they can.

What this file decides: what of them survives a crash, and how many there may be.

Rules:
- When `add` has returned, the revocation is on the disk. Who cannot be promised that is told so; what was asked
  for is kept in memory all the same.
- The oldest stay: where there is no room, a new one is refused.
- One line each, with a checksum. The last one may be torn by a crash: nobody was told that it is there. Any
  other line that does not read as it was written is damage: a copy of the file is kept, and what can be read
  of it is used.
- A file belongs to one process, which holds a lock beside it. Further processes of the same home have files
  with a number. What a process left behind that is gone is taken over by the next that begins.
- The file is 0600. It is written in a thread, in groups.

It must not know: the store, who is waiting for one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from zcproto.errors import Code, ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.worker import Job, Worker

LIMIT: Final = 100_000
"""Revocations at once, about 300 bytes each in memory and 100 on the disk."""

OPEN_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 2.0

MAX_FILE_BYTES: Final = 256 << 20
MAX_PROCESSES: Final = 64
"""Processes of one home."""

WASTE: Final = 1_024
"""Lines that stand for nothing any more, before the file is written anew."""

_QUEUE: Final = 65_536
_VERSION: Final = 1
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.ENOTSUP)  # file systems that keep names in order themselves


@dataclass(frozen=True, slots=True)
class Revocation:
    """Sessions that have ended: one (`id`), or else all of `user`, or with neither all there are.

    Those of a user, or all, are the ones opened by `wall`. With an id, `user` is whose session it was, if known.
    """

    wall: int
    id: bytes = b""
    user: str | None = None
    code: Code = Code.TOKEN_REVOKED

    @property
    def key(self) -> tuple[bytes, str | None]:
        """What it speaks of: a later one with the same key takes its place."""
        return self.id, None if self.id else self.user


class PendingRevocations:
    """The revocations that wait, the oldest first. `path` names the file; made without I/O.

    `damaged` are copies of files that were found damaged by `open`.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._file = _File(path)
        self._entries: dict[tuple[bytes, str | None], Revocation] = {}
        self._worker: Worker | None = None
        self.damaged: list[Path] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Revocation]:
        return list(self._entries.values())

    def get(self, session_id: bytes) -> Revocation | None:
        """What waits for one session by its id."""
        return self._entries.get((session_id, None))

    async def open(self) -> None:
        """Read what was left behind. Raises ConfigError for what waiting cannot mend, and StoreUnavailable."""
        file = self._file = _File(self._path)
        self._worker = Worker(file.perform, lambda: False, file.close, limit=_QUEUE)
        try:
            entries: Iterable[Revocation] = await self._worker.ask(file.open, OPEN_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise
        self._entries = {entry.key: entry for entry in entries}
        self.damaged = file.damaged

    async def close(self) -> None:
        """Write what was asked for, and let go of the file. Never raises."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop(CLOSE_TIMEOUT_S)

    async def add(self, revocation: Revocation, within: float) -> None:
        """Keep a revocation. It is among `entries` at once, before anything is waited for.

        Raises StoreUnavailable if it is not on the disk within so many seconds, or if there is no room.
        """
        if revocation.key not in self._entries and len(self._entries) >= self._limit:
            raise StoreUnavailable(f"{self._limit} revocations wait for the store already")
        self._entries[revocation.key] = revocation
        await self._ask(partial(self._file.add, revocation), within)

    async def remove(self, revocations: Sequence[Revocation], within: float) -> None:
        """Forget what the store has now. What was asked for anew meanwhile stays.

        Raises StoreUnavailable if the file was not changed in time: then it may be read again, which does no harm.
        """
        for revocation in revocations:
            if self._entries.get(revocation.key) is revocation:
                del self._entries[revocation.key]
        await self._ask(partial(self._file.remove, list(revocations)), within)

    async def _ask(self, work: Callable[[], object], within: float) -> None:
        if self._worker is None:
            raise StoreUnavailable("the file of revocations is closed")
        await self._worker.ask(work, within, lasting=True)


class _File:
    """The file, for the thread alone."""

    def __init__(self, path: Path) -> None:
        self._first = path
        self._path = path
        self._locks: list[int] = []
        self._descriptor = -1
        self._entries: dict[tuple[bytes, str | None], Revocation] = {}
        self._added: list[Revocation] = []
        self._lines = 0
        self._size = 0  # bytes of whole lines
        self._is_good = False  # else it has to be written anew
        self._is_behind = False
        self.damaged: list[Path] = []

    # What is asked for

    def open(self) -> list[Revocation]:
        """Take a file, and what is left of processes that are gone."""
        try:
            taken = self._take_files()
            for path in taken:
                self._entries.update((entry.key, entry) for entry in self._read(path))
            if len(taken) > 1:
                self._write_anew()
                for path in taken[1:]:
                    path.unlink()
                    os.close(self._locks.pop(1))
        except OSError as error:
            raise ConfigError(
                [f"{self._path}: revocations cannot be kept there: {error.strerror or error}"]
            ) from error
        return list(self._entries.values())

    def add(self, revocation: Revocation) -> None:
        self._entries[revocation.key] = revocation
        self._added.append(revocation)
        self._is_behind = True

    def remove(self, revocations: Iterable[Revocation]) -> None:
        for revocation in revocations:
            if self._entries.get(revocation.key) == revocation:
                del self._entries[revocation.key]
                self._is_good, self._is_behind = False, True

    def perform(self, jobs: Sequence[Job]) -> None:
        """Do what is asked for together, and bring it to the disk once."""
        error: BaseException | None = None
        try:
            for job in jobs:
                job.result = job.work()
            if self._is_behind:
                self._save()
                self._is_behind = False
        except OSError as failed:
            self._is_good = False
            error = StoreUnavailable(f"{self._path}: cannot be written: {failed.strerror or failed}")
        except Exception as failed:  # whoever asked is told
            error = failed
        for job in jobs:
            job.error = error

    def close(self) -> None:
        for descriptor in (self._descriptor, *self._locks):
            if descriptor >= 0:
                os.close(descriptor)

    # Reading

    def _take_files(self) -> list[Path]:
        """This process's file, which need not be there, and those that nobody holds."""
        taken: list[Path] = []
        for number in range(1, MAX_PROCESSES + 1):
            path = self._first
            if number > 1:
                path = path.with_name(f"{path.stem}-{number}{path.suffix}")
            if taken and not path.exists():
                continue
            lock = _try_lock(path.with_name(path.name + ".lock"))
            if lock >= 0:
                self._locks.append(lock)
                taken.append(path)
        if not taken:
            raise ConfigError([f"{self._first}: {MAX_PROCESSES} processes of this home run already"])
        self._path = taken[0]
        return taken

    def _read(self, path: Path) -> list[Revocation]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return []
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError([f"{path}: is not a regular file; move it away"])
            os.fchmod(descriptor, 0o600)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: is larger than {MAX_FILE_BYTES} bytes; move it away"])
        *lines, _ = data.split(b"\n")  # what follows the last end of a line is torn, or nothing
        entries = [_read_line(line) for line in lines]
        if None in entries:
            self.damaged.append(_copy_aside(path))
        return [entry for entry in entries if entry is not None]

    # Writing

    def _save(self) -> None:
        added, self._added = self._added, []
        if not self._is_good or self._lines + len(added) > 2 * len(self._entries) + WASTE:
            self._write_anew()
            return
        data = b"".join(map(_line, added))
        _write_all(self._descriptor, data, self._size)
        os.fsync(self._descriptor)
        self._size += len(data)
        self._lines += len(added)

    def _write_anew(self) -> None:
        """Replace the file by one with what waits now."""
        staged = self._path.with_name(f".{self._path.name}.new")
        staged.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(staged, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # a umask may have taken the owner's bits
            data = b"".join(map(_line, self._entries.values()))
            _write_all(descriptor, data, 0)
            os.fsync(descriptor)
            staged.replace(self._path)
            _sync_folder(self._path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = len(data)
        self._lines = len(self._entries)
        self._is_good = True


def _line(revocation: Revocation) -> bytes:
    fields = [_VERSION, revocation.wall, int(revocation.code), revocation.id.hex(), revocation.user]
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read_line(line: bytes) -> Revocation | None:
    """What a line says; None if it was not written so."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        version, wall, code, session_id, user = json.loads(text)
        revocation = Revocation(wall, bytes.fromhex(session_id), user, Code(code))
    except (ValueError, TypeError):
        return None
    is_ours = version == _VERSION and type(wall) is int and isinstance(user, str | None)
    return revocation if is_ours and _line(revocation)[:-1] == line else None


def _copy_aside(path: Path) -> Path:
    """Another name for a file, so that it stays when it is written anew; those of before stay, too."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.damaged-{number}")
        with suppress(FileExistsError):
            os.link(path, aside)
            return aside
        number += 1


def _try_lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed; -1 if another process does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    return descriptor


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
