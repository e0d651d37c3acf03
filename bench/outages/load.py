"""Requests of sessions that are known, at a steady rate: what became of each, and how long it waited."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final

from zcproto.errors import CallError, ZcprotoError
from zcproto.load.caller import Caller
from zcproto.load.pacer import Pacer
from zcproto.load.schedule import arrivals, rounds

LAST_ANSWERS_S: Final = 5.0
"""Seconds after the last request for answers that have not come."""

FOR_EVER_S: Final = 3_600.0


class Phase(Enum):
    BEFORE = "before"
    MEANWHILE = "meanwhile"
    AFTER = "after"


def said(error: ZcprotoError) -> str:
    """A name for why something failed."""
    return error.code.name if isinstance(error, CallError) else type(error).__name__


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

    @property
    def added(self) -> float:
        """How much longer than before somebody waited since the outage began; 0 if nobody did."""
        worst = max(self.longest[Phase.MEANWHILE], self.longest[Phase.AFTER])
        return max(0.0, worst - self.longest[Phase.BEFORE])


class Load:
    """An open loop: a request is sent when it is due, whether others were answered or not.

    `phase` is the owner's to set; a request belongs to that in which it was answered.
    """

    def __init__(self, callers: Sequence[Caller], rate: float, source: random.Random) -> None:
        self._callers = rounds(callers, source)
        self._rate = rate
        self._source = source
        self._pacer = Pacer(asyncio.get_running_loop())
        self._in_flight = 0
        self.phase = Phase.BEFORE
        self.sent = 0
        self.answered = 0
        self.failed: Counter[str] = Counter()
        self.waits = Waits()
        self.lateness = Waits()
        """How late this process itself sent what was due: what the machine does to everybody."""

    @property
    def lost(self) -> int:
        """Requests without any answer."""
        return self._in_flight

    async def run(self) -> None:
        """Until `stop`, and a little longer for the last answers."""
        try:
            await self._pacer.run(arrivals(self._rate, FOR_EVER_S, self._source), self._ask)
        finally:
            self._pacer.close()
        end = time.monotonic() + LAST_ANSWERS_S
        while self._in_flight and time.monotonic() < end:  # noqa: ASYNC110 - it is seen in ten milliseconds
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._pacer.stop()

    def _ask(self, due: float) -> None:
        self.sent += 1
        number = self.sent
        self.lateness.note(self.phase, due)
        try:
            next(self._callers).ask("echo", {"n": number}, partial(self._done, due, number))
        except ZcprotoError as error:
            self.failed[said(error)] += 1
        else:
            self._in_flight += 1

    def _done(self, due: float, number: int, value: Any, error: ZcprotoError | None) -> None:
        self._in_flight -= 1
        self.waits.note(self.phase, due)
        if error is not None:
            self.failed[said(error)] += 1
        elif value == {"n": number}:
            self.answered += 1
        else:
            self.failed["another answer"] += 1
