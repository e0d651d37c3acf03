"""Sessions that are opened, refreshed and ended while the store is hurt, at a steady rate."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from bench.outages.load import Phase, Waits, said
from bench.outages.plan import OutagePlan
from bench.told import Told, open_session, refresh
from zcproto.errors import Unavailable, ZcprotoError
from zcproto.load.caller import Caller
from zcproto.load.plan import SESSIONS_PER_USER, Credential

CALLS_PER_VICTIM: Final = 4
"""By which a user's five sessions are ended: two at once by the last."""


class Victims(NamedTuple):
    """A user whose sessions are ended one after the other, and the connection on which that is asked for."""

    caller: Caller
    sessions: Sequence[Told]


class Churn:
    """It goes on until there is nobody left to be opened, and no session to be ended.

    `phase` is the owner's to set; a call belongs to that in which it was answered.

    `opened` are the sessions whose opening was answered, `refused` the openings and refreshes, by phase, that were
    answered with UNAVAILABLE and a time to wait; `failed` all calls that had another end.
    """

    def __init__(
        self,
        plan: OutagePlan,
        *,
        caller: Caller,
        newcomers: Sequence[Credential],
        refreshed: Sequence[Told],
        victims: Sequence[Victims],
    ) -> None:
        self._plan = plan
        self._caller = caller
        self._places = iter([each for each in newcomers for _ in range(SESSIONS_PER_USER)])
        self._refreshed = itertools.cycle(refreshed)
        self._is_refreshed: set[str] = set()
        self._ends = _ends(victims)
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.phase = Phase.BEFORE
        self.opened: list[Told] = []
        self.ended: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.refreshes: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.refused: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.let_in: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.failed: Counter[str] = Counter()
        self.waits = Waits()

    async def run(self) -> None:
        """Until `stop`; then all that was begun is finished."""
        plan = self._plan
        async with asyncio.TaskGroup() as group:
            for rate, work in (
                (plan.openings, self._open),
                (plan.refreshes, self._refresh),
                (plan.revocations, self._end),
            ):
                group.create_task(self._pace(rate, work))
        if self._running:
            await asyncio.wait(self._running)

    def stop(self) -> None:
        self._stopping = True

    async def _pace(self, rate: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        begin = time.monotonic()
        for number in itertools.count():
            due = begin + number / rate
            await asyncio.sleep(due - time.monotonic())
            if self._stopping:
                return
            task = asyncio.get_running_loop().create_task(self._watched(work, due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _watched(self, work: Callable[[], Awaitable[None]], due: float) -> None:
        name = work.__name__.strip("_")
        try:
            await work()
        except ZcprotoError as error:
            may_wait = isinstance(error, Unavailable) and error.details.get("retry_after_ms", 0) > 0
            if may_wait and work != self._end:
                self.refused[self.phase] += 1
            else:
                self.failed[f"{name}: {said(error)}"] += 1
        self.waits.note(self.phase, due, name)

    async def _open(self) -> None:
        credential = next(self._places, None)
        if credential is None:
            return
        self.opened.append(await open_session(self._caller, credential))
        self.let_in[self.phase] += 1

    async def _refresh(self) -> None:
        told = next(self._refreshed)
        if told.id in self._is_refreshed:  # the one before is not answered yet: a client does one at a time
            return
        self._is_refreshed.add(told.id)
        try:
            await refresh(self._caller, told)
            self.refreshes[self.phase] += 1
        finally:
            self._is_refreshed.discard(told.id)

    async def _end(self) -> None:
        end = next(self._ends, None)
        if end is None:
            return
        ended = await end()
        self.ended[self.phase] += ended


def _ends(victims: Sequence[Victims]) -> Iterator[Callable[[], Awaitable[int]]]:
    """All ways to end a session, in turns. Each tells how many sessions have ended when it was answered."""
    for caller, sessions in victims:
        first, *some, _, last = sessions

        yield partial(_end_some, caller, "session.close", {}, first, [first])
        for told in some:
            yield partial(_end_some, caller, "session.revoke", {"id": told.id}, last, [told])
        yield partial(_end_some, caller, "session.revoke", {"all": True}, last, sessions[-2:])


async def _end_some(
    caller: Caller, method: str, params: dict[str, Any], by: Told, sessions: Sequence[Told]
) -> int:
    for told in sessions:
        told.is_unsure = True
    await caller.call(method, params, by.token)
    for told in sessions:
        told.is_unsure, told.is_ended = False, True
    return len(sessions)
