"""Sessions in a file beside the server: the store of one process.

Each operation goes to one thread, which does many in one transaction and answers when they are on the disk.
What they do is in rows.py, how it is written in session_file.py, how the thread is asked in worker.py.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from zcproto.common.clock import system_clock
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import AnswerLimits, check_size
from zcproto.stores.base import (
    Change,
    Claim,
    Created,
    LimitReached,
    NotRotated,
    Rotated,
    StoreUnavailable,
)
from zcproto.stores.sqlite import rows
from zcproto.stores.sqlite.database import Connect, Notice, Position, SessionFile, StorageError
from zcproto.stores.worker import Job, Worker

TIMEOUT_S: Final = 0.25
OPEN_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 5.0
EXPIRE_S: Final = 0.05
"""A slice of what is past its time takes so long at most where nobody waits, and then comes to the disk."""
QUEUE: Final = 8_192
"""Operations that may wait at once."""

_TOUCHED: Final = 500


class SqliteStore:
    """A store in the file `path`, which no other process may use meanwhile.

    `on_notice` is called with `store_damaged` (path, aside, reason) when a damaged file was set aside and an
    empty one was begun, with `store_missing` (path) when the file was taken away while it was in use, and with
    `store_close_failed` (reason).
    """

    def __init__(
        self,
        path: Path,
        *,
        timeout: float = TIMEOUT_S,
        answers: AnswerLimits | None = None,
        on_notice: Notice = lambda name, **values: None,
        connect: Connect = sqlite3.connect,
        queue: int = QUEUE,
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._answers = answers or AnswerLimits()
        self._on_notice = on_notice
        self._connect = connect
        self._queue = queue
        self._worker: Worker | None = None

    @property
    def shared(self) -> bool:
        return False

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """As `SessionStore.open`. May be called again after it failed. Nobody else changes anything here."""
        assert self._worker is None, "it is open"
        loop = asyncio.get_running_loop()

        def notice(name: str, **values: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(partial(self._on_notice, name, **values))

        file = self._file = SessionFile(
            self._path, answers=self._answers, on_notice=notice, connect=self._connect
        )
        self._worker = Worker(partial(_perform, file), partial(_rest, file), file.close, limit=self._queue)
        try:
            await self._ask(file.open, within=OPEN_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if not await worker.stop(CLOSE_TIMEOUT_S):
            self._on_notice("store_close_failed", reason="the disk does not answer")

    async def ping(self) -> None:
        await self._do(self._file.ping)

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        position: Position | None = Position()
        while position is not None:
            records, position = await self._do(partial(self._file.load, position), within=OPEN_TIMEOUT_S)
            if records:
                yield records

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        created: Created | LimitReached = await self._ask(rows.Create(record, limit))
        return created

    async def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        rotated: Rotated | NotRotated = await self._ask(rows.Rotate(rotation))
        return rotated

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        found: SessionRecord | EndedRecord | None = await self._ask(rows.Find(token_digest))
        return found

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        found: SessionRecord | EndedRecord | None = await self._ask(rows.Get(id))
        return found

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """As `SessionStore.touch`, in parts, so that others have their turn."""
        for start in range(0, len(uses), _TOUCHED):
            await self._do(partial(self._file.touch, uses[start : start + _TOUCHED]))

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        ended: list[EndedRecord] = await self._ask(rows.End(ids, code, wall, user))
        return ended

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        ended: list[EndedRecord] = await self._ask(rows.EndUser(user, code, wall))
        return ended

    async def end_all(self, code: Code, wall: int) -> int:
        count: int = await self._do(partial(self._file.end_all, code, wall), lasting=True)
        return count

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        asked = self._do(self._file.list_all) if user is None else self._ask(rows.ListUser(user))
        found: list[SessionRecord] = await asked
        return found

    async def count(self) -> int:
        count: int = await self._do(self._file.count)
        return count

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """As `SessionStore.expire`. Rather than to keep others waiting it removes fewer."""
        removed: int = await self._do(partial(self._expire, wall, keep_ended_ms, limit))
        return removed

    def _expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """A slice, in the thread."""
        worker = self._worker
        until = system_clock.now() + EXPIRE_S

        def enough() -> bool:
            return worker is None or worker.is_waited_for or system_clock.now() >= until

        return self._file.expire(wall, keep_ended_ms, limit, enough)

    async def claim(self, user: str, key: str, request_digest: bytes, wall: int, lease_ms: int) -> Claim:
        claim: Claim = await self._ask(rows.ClaimRequest(user, key, request_digest, wall, lease_ms))
        return claim

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        check_size(answer, self._answers)
        await self._ask(rows.KeepAnswer(user, key, answer, wall, keep_ms))

    async def release_claim(self, user: str, key: str) -> None:
        await self._ask(rows.ReleaseClaim(user, key))

    async def _do(self, action: Callable[[], Any], **options: Any) -> Any:
        return await self._ask(partial(self._file.attempt, action), **options)

    async def _ask(self, work: Any, *, within: float | None = None, lasting: bool = False) -> Any:
        """Have one of the operations of rows.py, or a function, done in the thread."""
        if self._worker is None:
            raise StoreUnavailable("it is not open")
        lasting = lasting or getattr(work, "lasting", False)
        return await self._worker.ask(work, within or self._timeout, lasting=lasting)


def _perform(file: SessionFile, jobs: Sequence[Job]) -> None:
    """Do jobs in their order, those together that work on the same rows."""
    for alone, group in groupby(jobs, lambda job: callable(job.work)):
        if alone:
            for job in group:
                _one(job)
        else:
            _together(file, list(group))


def _one(job: Job) -> None:
    try:
        job.result = job.work()
    except StorageError as error:
        job.error = StoreUnavailable(str(error))
    except BaseException as error:
        job.error = error


def _together(file: SessionFile, jobs: Sequence[Job]) -> None:
    try:
        outcomes = file.attempt(lambda: file.perform([job.work for job in jobs]))
    except StorageError as error:
        for job in jobs:
            job.error = StoreUnavailable(str(error))
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].error = error
        else:  # one of them is a mistake; the others shall not suffer from it
            for job in jobs:
                _together(file, [job])
    else:
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.result, job.error = outcome


def _rest(file: SessionFile) -> bool:
    """Do a part of what can wait; False if there is none, or if it fails: then it waits for the next job."""
    if not file.sweeping:
        return False
    try:
        file.attempt(file.sweep)
    except StorageError:
        return False
    return True
