"""Keeps revocations that could not be written to the store in a file until they can be.

Decides: what survives a crash, and how many revocations may wait.

Rules:
- When `add` has returned, the revocation is on disk (PENDING in spec/store.pml). If it raises, the revocation is
  still kept in memory.
- The oldest stay: when there is no room, a new one is refused.
- One line each, with a checksum. A crash may truncate the last line, whose `add` has not returned. Any other line
  that is not as it was written is damage: the file is copied, and the lines that can be read are used.
- A file belongs to one process, which holds a lock beside it. Other processes of the same home use files with a
  number. Files left by processes that have ended are taken over by the next one that starts, or that is asked to.
- The file is 0600. It is written in a thread, in groups.

It must not know: the store, who waits for a revocation.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from zcproto.common.files import read_file, replace_file, sync, try_lock
from zcproto.errors import Code, ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.job_thread import Job, JobThread

LIMIT: Final = 100_000
"""Revocations that may wait, about 300 bytes each in memory and 100 on disk."""

OPEN_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 2.0

MAX_FILE_BYTES: Final = 256 << 20
MAX_PROCESSES: Final = 1_024
"""Processes that share a home: 256 workers before and after an upgrade, and other servers."""

WASTE: Final = 1_024
"""Obsolete lines after which the file is rewritten."""

_QUEUE: Final = 65_536
_VERSION: Final = 1


RevocationKey = tuple[bytes, str | None, str | None]


@dataclass(frozen=True, slots=True)
class Revocation:
    """The end of one session (`id`), of all sessions of `user`, or of all sessions.

    For a user or for all, it ends the sessions opened by `wall`. With an id, `user` is the session's user if known.
    `is_unverified`: the process did not know the session, which is ended only if it is that user's.
    `bound_to` limits those of a user to a key. It is not written to the file.
    """

    wall: int
    id: bytes = b""
    user: str | None = None
    code: Code = Code.TOKEN_REVOKED
    bound_to: str | None = None
    is_unverified: bool = False

    @property
    def key(self) -> RevocationKey:
        """What it ends: a later revocation with the same key replaces it."""
        return self.id, None if self.id and not self.is_unverified else self.user, self.bound_to


class PendingRevocations:
    """The pending revocations, oldest first, in the file `path`. The constructor does no I/O.

    `damaged` are the copies of damaged files found by `open`.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._file = _File(path)
        self._entries: dict[RevocationKey, Revocation] = {}
        self._unverified: Counter[str | None] = Counter()
        self._thread: JobThread | None = None
        self.damaged: list[Path] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Revocation]:
        return list(self._entries.values())

    def get(self, session_id: bytes, user: str | None) -> Revocation | None:
        """Return the pending revocation of one session by a user; None: by anyone whose session it is."""
        waiting = self._entries.get((session_id, None, None))
        if waiting is not None and user in (None, waiting.user):
            return waiting
        return None if user is None else self._entries.get((session_id, user, None))

    def unverified(self, user: str) -> int:
        """Return the number of pending revocations by a user of sessions that this process did not know."""
        return self._unverified[user]

    def _put(self, entry: Revocation) -> None:
        if entry.is_unverified and entry.key not in self._entries:
            self._unverified[entry.user] += 1
        self._entries[entry.key] = entry

    def _drop(self, entry: Revocation) -> None:
        del self._entries[entry.key]
        if entry.is_unverified:
            self._unverified[entry.user] -= 1
            if not self._unverified[entry.user]:
                del self._unverified[entry.user]

    async def open(self) -> None:
        """Read the file. Raises StoreUnavailable, or ConfigError for a fault that retrying cannot fix."""
        file = self._file = _File(self._path)
        self._thread = JobThread(file.perform, lambda: False, file.close, limit=_QUEUE)
        try:
            entries: Iterable[Revocation] = await self._thread.submit(file.open, OPEN_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise
        self._entries.clear()
        self._unverified.clear()
        for entry in entries:
            self._put(entry)
        self.damaged = file.damaged

    async def close(self) -> None:
        """Write what was submitted and close the file. Never raises."""
        worker, self._thread = self._thread, None
        if worker is not None:
            await worker.stop(CLOSE_TIMEOUT_S)

    async def take_left(self, within: float) -> None:
        """Take over the files of processes that have ended since `open`. Raises StoreUnavailable."""
        for entry in await self._submit(self._file.take_left, within):
            if entry.key not in self._entries:
                self._put(entry)

    async def add(self, revocation: Revocation, within: float) -> None:
        """Store a revocation. It is in `entries` immediately, before anything is awaited.

        Raises StoreUnavailable if it is not on disk within so many seconds, or if there is no room.
        """
        if revocation.key not in self._entries and len(self._entries) >= self._limit:
            raise StoreUnavailable(f"{self._limit} revocations are waiting for the store")
        self._put(revocation)
        await self._submit(partial(self._file.add, revocation), within)

    async def remove(self, revocations: Sequence[Revocation], within: float) -> None:
        """Remove revocations that the store has now, unless they were replaced meanwhile.

        Raises StoreUnavailable if the file was not changed in time: then they may be replayed again, harmlessly.
        """
        for revocation in revocations:
            if self._entries.get(revocation.key) is revocation:
                self._drop(revocation)
        await self._submit(partial(self._file.remove, list(revocations)), within)

    async def _submit(self, work: Callable[[], Any], within: float) -> Any:
        if self._thread is None:
            raise StoreUnavailable("the file of pending revocations is closed")
        return await self._thread.submit(work, within, lasting=True)


class _File:
    """The file. Only the thread uses it."""

    def __init__(self, path: Path) -> None:
        self._first = path
        self._path = path
        self._locks: list[int] = []
        self._descriptor = -1
        self._entries: dict[RevocationKey, Revocation] = {}
        self._added: list[Revocation] = []
        self._lines = 0
        self._size = 0  # bytes of complete lines
        self._is_current = False  # whether lines can be appended
        self._is_dirty = False
        self.damaged: list[Path] = []

    # --- jobs --------------------------------------------------------------------------------------

    def open(self) -> list[Revocation]:
        """Lock a file, and read it and the files left by processes that have ended."""
        try:
            taken = self._take_files()
            for path in taken:
                self._entries.update((entry.key, entry) for entry in self._read(path))
            if len(taken) > 1:
                self._rewrite()
                for path in taken[1:]:
                    path.unlink(missing_ok=True)  # another process may have had it just before
                    os.close(self._locks.pop(1))
        except OSError as error:
            raise ConfigError(
                [f"{self._path}: pending revocations cannot be stored: {error.strerror or error}"]
            ) from error
        return list(self._entries.values())

    def take_left(self) -> list[Revocation]:
        """Add the revocations in files without a process to this file, and return them."""
        found: dict[RevocationKey, Revocation] = {}
        locks: list[int] = []
        try:
            left = []
            for path in self._existing():
                if (lock := try_lock(path.with_name(path.name + ".lock"))) is not None:
                    locks.append(lock)
                    left.append(path)
                    found.update((entry.key, entry) for entry in self._read(path))
            if found:
                own = self._entries
                self._entries = own | {key: entry for key, entry in found.items() if key not in own}
                try:
                    self._rewrite()
                except BaseException:
                    self._entries = own
                    raise
            for path in left:
                path.unlink(missing_ok=True)
        finally:
            for lock in locks:
                os.close(lock)
        return list(found.values())

    def add(self, revocation: Revocation) -> None:
        self._entries[revocation.key] = revocation
        self._added.append(revocation)
        self._is_dirty = True

    def remove(self, revocations: Iterable[Revocation]) -> None:
        for revocation in revocations:
            if self._entries.get(revocation.key) == revocation:
                del self._entries[revocation.key]
                self._is_current, self._is_dirty = False, True

    def perform(self, jobs: Sequence[Job]) -> None:
        """Run jobs and write their changes to disk once."""
        error: BaseException | None = None
        try:
            for job in jobs:
                job.result = job.work()
            if self._is_dirty:
                self._save()
                self._is_dirty = False
        except OSError as failed:
            self._is_current = False
            error = StoreUnavailable(f"{self._path}: cannot be written: {failed.strerror or failed}")
        except Exception as failed:  # raised to the callers
            error = failed
        for job in jobs:
            job.error = error

    def close(self) -> None:
        for descriptor in (self._descriptor, *self._locks):
            if descriptor >= 0:
                os.close(descriptor)

    # --- reading -----------------------------------------------------------------------------------

    def _take_files(self) -> list[Path]:
        """Lock and return the file of this process, which may be missing, and the files without a process."""
        taken: list[Path] = []
        for number in range(1, MAX_PROCESSES + 1):
            path = self._first
            if number > 1:
                path = path.with_name(f"{path.stem}-{number}{path.suffix}")
            if taken and not path.exists():
                continue
            lock = try_lock(path.with_name(path.name + ".lock"))
            if lock is not None:
                self._locks.append(lock)
                taken.append(path)
        if not taken:
            raise ConfigError(
                [f"{self._first}: {MAX_PROCESSES} processes use this home; stop one, or use another home"]
            )
        self._path = taken[0]
        return taken

    def _existing(self) -> list[Path]:
        """Return the files of all processes of this home."""
        name = re.compile(f"{re.escape(self._first.stem)}(-[0-9]+)?{re.escape(self._first.suffix)}")
        return [path for path in sorted(self._first.parent.iterdir()) if name.fullmatch(path.name)]

    def _read(self, path: Path) -> list[Revocation]:
        try:
            data, _ = read_file(path, MAX_FILE_BYTES, forbidden=None, follow_links=False)
            path.chmod(0o600)
        except FileNotFoundError:
            return []
        *lines, _ = data.split(b"\n")  # the rest is truncated, or empty
        entries = [_read_line(line) for line in lines]
        if None in entries:
            self.damaged.append(_copy_aside(path))
        return [entry for entry in entries if entry is not None]

    # --- writing -----------------------------------------------------------------------------------

    def _save(self) -> None:
        added, self._added = self._added, []
        if not self._is_current or self._lines + len(added) > 2 * len(self._entries) + WASTE:
            self._rewrite()
            return
        data = b"".join(map(_line, added))
        _write_all(self._descriptor, data, self._size)
        sync(self._descriptor)
        self._size += len(data)
        self._lines += len(added)

    def _rewrite(self) -> None:
        """Replace the file by one with the current entries."""
        data = b"".join(map(_line, self._entries.values()))
        replace_file(self._path, data)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._size = len(data)
        self._lines = len(self._entries)
        self._is_current = True


def _line(revocation: Revocation) -> bytes:
    fields = [_VERSION, revocation.wall, int(revocation.code), revocation.id.hex(), revocation.user]
    if revocation.is_unverified:
        fields.append(True)
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read_line(line: bytes) -> Revocation | None:
    """Parse a line. Return None if it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        version, wall, code, session_id, user, *more = json.loads(text)
        revocation = Revocation(wall, bytes.fromhex(session_id), user, Code(code), is_unverified=bool(more))
    except (ValueError, TypeError):
        return None
    is_valid = version == _VERSION and type(wall) is int and isinstance(user, str | None)
    return revocation if is_valid and _line(revocation)[:-1] == line else None


def _copy_aside(path: Path) -> Path:
    """Link a file to an unused name, so that its content survives a rewrite. Return the name."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.damaged-{number}")
        with suppress(FileExistsError):
            os.link(path, aside)
            return aside
        number += 1


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written
