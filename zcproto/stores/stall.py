"""Notice that this process did not run for a while: it was stopped, its machine slept, or its loop was blocked.

Decides: for how long the registry is trusted. What happens after a stall is up to the caller.

Rules:
- Trust is extended several times within its limit. It ends by the wall clock, which requests are checked against
  before the event loop has run a timer, and which advances while a machine sleeps.
- After a stall nothing is trusted until `resume`, because revocations by other processes were not received
  (DISTRUST in spec/store.pml).
- A step of the wall clock looks like a stall. That costs one question to the store.

It must not know: the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.sessions import SessionRegistry

_EXTENSIONS: Final = 4
"""Extensions within one limit."""


class StallWatch:
    """Extends the trust in a registry by `limit` seconds, until the process stalls for longer.

    `on_stall` is called with the seconds of the stall, and how many of them the monotonic clock did not count.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        wheel: DeadlineWheel,
        clock: Clock,
        limit: float,
        on_stall: Callable[[float, float], None],
    ) -> None:
        self._registry = registry
        self._wheel = wheel
        self._clock = clock
        self._limit = limit
        self._on_stall = on_stall
        self._wall = 0
        self._now = 0.0
        self.deadline_tick = 0

    def resume(self) -> None:
        """Trust the registry from now on."""
        before = self._wall
        self._wall, self._now = self._clock.wall(), self._clock.now()
        if self._wall < before:  # what connections reuse until the old time must be checked again
            self._registry.generation += 1
        self._registry.trusted_until = self._wall + round(self._limit * MS_PER_SECOND)
        self._wheel.set(self, self._now + self._limit / _EXTENSIONS)

    def stop(self) -> None:
        self._wheel.discard(self)

    def handle_deadline(self, now: float) -> None:
        counted = self._clock.now() - self._now
        stalled = max(counted, (self._clock.wall() - self._wall) / MS_PER_SECOND)
        if stalled < self._limit:
            self.resume()
        else:
            self._registry.distrust()
            self._on_stall(stalled, stalled - counted)
