"""The load of an outage: requests of known sessions, and sessions that are opened, refreshed and ended
meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from bench.scenarios.harness import cause_of
from bench.scenarios.sessions import ClientSession, open_session, refresh
from zcproto.errors import Unavailable, ZcprotoError
from zcproto.load.caller import Caller
from zcproto.load.plan import Credential

CALLS_PER_VICTIM: Final = 4
"""Calls that end a user's five sessions: the last one ends two."""


class Phase(Enum):
    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclass(slots=True)
class Waits:
    """The longest time, in seconds, from when something was due to its answer, by phase."""

    longest: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    what: dict[Phase, str] = field(default_factory=dict)
    """What waited the longest."""

    def note(self, phase: Phase, due: float, what: str = "") -> None:
        waited = time.monotonic() - due
        if waited > self.longest[phase]:
            self.longest[phase], self.what[phase] = waited, what


def added(longest: Mapping[Phase, float]) -> float:
    """Return how much longer than before the longest wait was since the outage began."""
    return max(0.0, max(longest[Phase.DURING], longest[Phase.AFTER]) - longest[Phase.BEFORE])


class Victims(NamedTuple):
    """A user whose sessions are ended one after the other, and the connection on which that is asked for."""

    caller: Caller
    sessions: Sequence[ClientSession]


class Churn:
    """Sessions opened, refreshed and ended at steady rates, until no session is left to open or to end.

    `phase` is set by the owner; a call belongs to that in which it was answered.
    """

    def __init__(
        self,
        rates: tuple[float, float, float],
        *,
        caller: Caller,
        newcomers: Sequence[Credential],
        refreshed: Sequence[ClientSession],
        victims: Sequence[Victims],
    ) -> None:
        """`rates` are openings, refreshes and ends a second; `newcomers` the users of new sessions."""
        self._rates = rates
        self._caller = caller
        self._newcomers = iter(newcomers)
        self._refreshed = itertools.cycle(refreshed)
        self._in_refresh: set[str] = set()
        self._ends = _ends(victims)
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.phase = Phase.BEFORE
        self.opened: list[ClientSession] = []
        self.counts: Counter[tuple[str, Phase]] = Counter()
        """"opened", "refreshed", "ended" and "put off", which is UNAVAILABLE with a time to wait."""
        self.failed: Counter[str] = Counter()
        """Calls with any other result."""
        self.waits = Waits()

    def since_outage(self, what: str) -> int:
        return self.counts[what, Phase.DURING] + self.counts[what, Phase.AFTER]

    async def run(self) -> None:
        """Make calls until `stop`; then finish those that were begun."""
        async with asyncio.TaskGroup() as group:
            for rate, work in zip(self._rates, (self._open, self._refresh, self._end), strict=True):
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
            task = asyncio.create_task(self._timed(work, due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _timed(self, work: Callable[[], Awaitable[None]], due: float) -> None:
        name = work.__name__.strip("_")
        try:
            await work()
        except ZcprotoError as error:
            has_delay = isinstance(error, Unavailable) and error.details.get("retry_after_ms", 0) > 0
            if has_delay and work != self._end:
                self.counts["put off", self.phase] += 1
            else:
                self.failed[f"{name}: {cause_of(error)}"] += 1
        self.waits.note(self.phase, due, name)

    async def _open(self) -> None:
        credential = next(self._newcomers, None)
        if credential is not None:
            self.opened.append(await open_session(self._caller, credential))
            self.counts["opened", self.phase] += 1

    async def _refresh(self) -> None:
        session = next(self._refreshed)
        if session.id in self._in_refresh:  # a client makes one refresh at a time
            return
        self._in_refresh.add(session.id)
        try:
            await refresh(self._caller, session)
            self.counts["refreshed", self.phase] += 1
        finally:
            self._in_refresh.discard(session.id)

    async def _end(self) -> None:
        end = next(self._ends, None)
        if end is not None:
            ended = await end()
            self.counts["ended", self.phase] += ended


def _ends(victims: Sequence[Victims]) -> Iterator[Callable[[], Awaitable[int]]]:
    """Yield all ways to end a session, in turns. Each returns how many sessions it ended."""
    for caller, sessions in victims:
        first, *some, _, last = sessions

        yield partial(_end_some, caller, "session.close", {}, first, [first])
        for session in some:
            yield partial(_end_some, caller, "session.revoke", {"id": session.id}, last, [session])
        yield partial(_end_some, caller, "session.revoke", {"all": True}, last, sessions[-2:])


async def _end_some(
    caller: Caller, method: str, params: dict[str, Any], by: ClientSession, sessions: Sequence[ClientSession]
) -> int:
    for session in sessions:
        session.is_unsure = True
    await caller.call(method, params, by.token)
    for session in sessions:
        session.is_unsure, session.is_ended = False, True
    return len(sessions)
