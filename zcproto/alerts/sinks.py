"""How messages get to those who take them: a bounded queue for each, with tries again.

    put -> queue -> sink.deliver -> done, or after a delay once more, or lost

Rules:
- Whatever a sink does, nobody else waits for it. Messages go out in their order, one at a time.
- A message is tried again after a random part of a delay that doubles, for as long as `MAX_AGE_S`, or as often as
  the failure says.
- The queue has a bound. Where there is no room, the oldest goes: what is now counts more than what was.
- What is lost is counted and logged.

It must not know: what a message says, how a sink works.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

from zcproto.common.clock import Clock
from zcproto.observe.log import get_logger

QUEUED: Final = 256
"""Messages that wait for one sink, under 8 KiB each."""

MAX_AGE_S: Final = 3_600.0
"""After an hour a message is no news."""

FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 120.0
DOWN_AFTER: Final = 3
"""Failures in a row after which a sink counts as down: one may be chance."""

log = get_logger("zcproto.alerts")


class Undelivered(Exception):
    """A message did not arrive. The text says why, and holds no secret.

    `tries` is how often it is worth while to try in all; None: as long as the message is not too old.
    """

    def __init__(self, reason: str, *, tries: int | None = None) -> None:
        super().__init__(reason)
        self.tries = tries


class Sink(Protocol):
    """Takes messages."""

    @property
    def name(self) -> str:
        """One word, for logs and metrics."""
        ...

    @property
    def where(self) -> str:
        """Where the messages go, for people; nothing secret."""
        ...

    async def deliver(self, body: bytes) -> str:
        """Hand over one message; what the receiver said, for `zcproto alert test`. Raises Undelivered.

        It ends within a time of its own, and can be cancelled.
        """
        ...


class _Waiting(NamedTuple):
    body: bytes
    since: float
    what: str


class SinkQueue:
    """A sink with what waits for it. `random` gives numbers from 0 up to 1.

    `on_down` is called with a reason when deliveries fail again and again, `on_up` when one arrives after that. The
    counts are for operators; `lost` are those that never arrived.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        clock: Clock,
        random: Callable[[], float],
        on_down: Callable[[str, str], None],
        on_up: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.sink = sink
        self._clock = clock
        self._random = random
        self._on_down = on_down
        self._on_up = on_up
        self._sleep = sleep
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._in_a_row = 0
        self._running: asyncio.Task[None] | None = None
        self.delivered = 0
        self.failures = 0
        self.lost = 0

    @property
    def name(self) -> str:
        return self.sink.name

    @property
    def is_down(self) -> bool:
        """Whether the last deliveries failed."""
        return self._in_a_row >= DOWN_AFTER

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._queue)

    def put(self, body: bytes, what: str) -> None:
        """Have a message delivered. `what` names it in the log if it is lost."""
        if len(self._queue) >= QUEUED:
            self._lose(self._queue.popleft(), "too many wait")
        self._queue.append(_Waiting(body, self._clock.now(), what))
        self._filled.set()

    def start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(
            self._run(), name=f"zcproto-alerts-{self.name}"
        )

    async def stop(self, limit_s: float) -> None:
        """Deliver what waits, as far as that can be done in one try each and within the limit; then end."""
        self._stopping.set()
        self._filled.set()
        running, self._running = self._running, None
        if running is not None:
            await asyncio.wait([running], timeout=limit_s)
            running.cancel()
            await asyncio.wait([running])
        while self._queue:
            self._lose(self._queue.popleft(), "the server ends")

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._stopping.is_set():
                    return
                self._filled.clear()
                await self._filled.wait()
                continue
            waiting = self._queue.popleft()
            try:
                await self._deliver(waiting)
            except asyncio.CancelledError:
                self._lose(waiting, "the server ends")
                raise

    async def _deliver(self, waiting: _Waiting) -> None:
        tries = 0
        delay_s = FIRST_DELAY_S
        while True:
            tries += 1
            limit = None
            try:
                await self.sink.deliver(waiting.body)
            except Undelivered as error:
                reason, limit = str(error), error.tries
            except Exception as error:  # a fault of ours must not end the queue
                log.error("alert.sink_failed", sink=self.name, exc_info=error)
                reason, limit = type(error).__name__, 1
            else:
                self._arrived()
                return
            self._failed(reason)
            if self._stopping.is_set():
                self._lose(waiting, reason)
                return
            too_old = self._clock.now() - waiting.since >= MAX_AGE_S
            if too_old or (limit is not None and tries >= limit):
                self._lose(waiting, reason)
                return
            await self._pause(delay_s * (1 + self._random()) / 2)
            delay_s = min(delay_s * 2, MAX_DELAY_S)

    async def _pause(self, seconds: float) -> None:
        """Wait; not if the end has come."""
        loop = asyncio.get_running_loop()
        waits = [loop.create_task(self._stopping.wait()), asyncio.ensure_future(self._sleep(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    def _arrived(self) -> None:
        was_down, self._in_a_row = self.is_down, 0
        self.delivered += 1
        if was_down:
            self._on_up(self.name)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self._in_a_row += 1
        if self.is_down:
            self._on_down(self.name, reason)

    def _lose(self, waiting: _Waiting, reason: str) -> None:
        self.lost += 1
        log.error("alert.lost", sink=self.name, reason=reason, what=waiting.what, lost=self.lost)
