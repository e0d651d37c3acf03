"""Sessions in a SQLite file beside the server, or in memory: the store of one process.

All operations run in one thread, which groups them into transactions and answers when they are on disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final, TypeVar

from zcproto.common.clock import MonotonicClock, system_clock
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import (
    Change,
    Claim,
    Created,
    LimitReached,
    Notice,
    NotRotated,
    Repeated,
    StoreUnavailable,
)
from zcproto.stores.job_thread import Job, JobThread
from zcproto.stores.sqlite.database import MAX_TOUCHED, MemoryDatabase, Position, SessionDatabase
from zcproto.stores.sqlite.file import Connect
from zcproto.stores.sqlite.rows import Operation

TIMEOUT_S: Final = 0.25
OPEN_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 5.0
EXPIRE_S: Final = 0.05
"""The longest slice of `expire` while no other operation waits."""

QUEUE: Final = 8_192
"""Operations of sessions that may wait for the thread, and as many for answers behind them."""

T = TypeVar("T")


@dataclass(eq=False)
class SqliteStore:
    """A store in the file `path`, which no other process may use at the same time; in memory if it is None.

    `on_notice` is called with `store_damaged` (path, aside, reason) when a damaged file was renamed and replaced by
    an empty one, with `store_missing` (path) when the file was removed while in use, and with `store_close_failed`
    (reason). `time` counts how long answers are kept.
    """

    path: Path | None
    _: KW_ONLY
    timeout: float = TIMEOUT_S
    answers: AnswerLimits = DEFAULT_LIMITS
    time: Callable[[], int] = field(default_factory=lambda: MonotonicClock(system_clock).wall)
    on_notice: Notice = lambda name, **values: None
    connect: Connect = sqlite3.connect
    queue: int = QUEUE
    shared = False
    keeps_time = keeps_changes = True
    _thread: JobThread | None = field(default=None, init=False)

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Open the store as in `SessionStore.open`. May be called again after it failed."""
        assert self._thread is None, "the store is open"
        loop = asyncio.get_running_loop()

        def notify(name: str, **values: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(partial(self.on_notice, name, **values))

        database = self._database = (
            MemoryDatabase(answers=self.answers, time=self.time, on_notice=notify, connect=self.connect)
            if self.path is None
            else SessionDatabase(
                self.path, answers=self.answers, time=self.time, on_notice=notify, connect=self.connect
            )
        )
        self._thread = JobThread(
            partial(_perform, database), database.sweep, database.close, limit=self.queue
        )
        try:
            await self._thread.submit(database.open, OPEN_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        worker, self._thread = self._thread, None
        if worker is None:
            return
        if not await worker.stop(CLOSE_TIMEOUT_S):
            self.on_notice("store_close_failed", reason="the disk does not answer")

    async def ping(self) -> None:
        await self._do(self._database.ping)

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        position: Position | None = Position()
        while position is not None:
            loading = partial(self._database.load, position)
            records, position = await self._do(loading, within=OPEN_TIMEOUT_S, lasting=True, behind=True)
            if records:
                yield records

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        return await self._do(
            Operation(lambda rows: rows.create(record, limit), ids=[record.id], users=[record.user])
        )

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        return await self._do(Operation(lambda rows: rows.rotate(rotation), ids=[rotation.id]))

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return await self._do(Operation(lambda rows: rows.find(token_digest), tokens=[token_digest]))

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return await self._do(Operation(lambda rows: rows.get(id), ids=[id]))

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """Record the last use of sessions, in batches, so that other operations get their turn."""
        for start in range(0, len(uses), MAX_TOUCHED):
            await self._do(partial(self._database.touch, uses[start : start + MAX_TOUCHED]))

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        """Do nothing: one process has all connections."""

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        ending = Operation(lambda rows: rows.end(ids, code, wall, user), ids=ids)
        ended = await self._do(ending, lasting=True, ahead=True)
        if len(ended) == len(ids):
            return ended
        return ended + await self._do(ending, lasting=True)  # it may have overtaken the creation of one

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        ending = Operation(lambda rows: rows.end_user(user, code, wall), users=[user])
        return await self._do(ending, lasting=True)

    async def end_all(self, code: Code, wall: int) -> int:
        return await self._do(partial(self._database.end_all, code, wall), lasting=True)

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        if user is None:
            return await self._do(self._database.list_all)
        return await self._do(Operation(lambda rows: rows.list_user(user), users=[user]))

    async def examine(self, wall: int) -> Sequence[str]:
        return ()

    async def count(self) -> int:
        return await self._do(self._database.count)

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove expired entries. May remove fewer than `limit` so that other operations do not wait."""
        return await self._do(partial(self._expire, wall, keep_ended_ms, limit))

    def _expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove a slice; runs in the thread."""
        worker = self._thread
        until = system_clock.now() + EXPIRE_S

        def is_enough() -> bool:
            return worker is None or worker.is_waited_for or system_clock.now() >= until

        return self._database.expire(wall, keep_ended_ms, limit, is_enough)

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        claiming = Operation(lambda rows: rows.answers.claim(user, key, request_digest, lease_ms))
        return await self._do(claiming, behind=True)

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        keeping = Operation(lambda rows: rows.answers.keep(user, key, answer, keep_ms))
        await self._do(keeping, lasting=True, behind=True)

    async def release_claim(self, user: str, key: str) -> None:
        releasing = Operation(lambda rows: rows.answers.release(user, key))
        await self._do(releasing, lasting=True, behind=True)

    async def _do(
        self,
        work: Operation[T] | Callable[[], T],
        *,
        within: float | None = None,
        lasting: bool = False,
        behind: bool = False,
        ahead: bool = False,
    ) -> T:
        """Run an operation or a function in the thread, and return its result."""
        if self._thread is None:
            raise StoreUnavailable("it is not open")
        job = work if isinstance(work, Operation) else partial(self._database.attempt, work)
        result: T = await self._thread.submit(
            job, within or self.timeout, lasting=lasting, behind=behind, ahead=ahead
        )
        return result


def _perform(database: SessionDatabase, jobs: Sequence[Job]) -> None:
    """Run jobs in order; consecutive Operations share one transaction."""
    for is_function, group in groupby(jobs, lambda job: callable(job.work)):
        if is_function:
            for job in group:
                _call(job)
        else:
            _perform_together(database, list(group))


def _call(job: Job) -> None:
    try:
        job.result = job.work()
    except BaseException as error:
        job.error = error


def _perform_together(database: SessionDatabase, jobs: Sequence[Job]) -> None:
    try:
        outcomes = database.attempt(lambda: database.perform([job.work for job in jobs]))
    except BaseException as error:
        if len(jobs) == 1 or isinstance(error, StoreUnavailable):
            for job in jobs:
                job.error = error
        else:  # a mistake in one of them must not affect the others
            for job in jobs:
                _perform_together(database, [job])
    else:
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.result, job.error = outcome
