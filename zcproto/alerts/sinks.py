"""Deliver messages to sinks, with a bounded queue and retries for each.

    put -> queue -> sink.deliver -> delivered, retried after a delay, or lost

Rules:
- A slow sink delays nothing else. Messages are delivered in order, one at a time.
- A message is retried with exponential backoff and jitter up to `MAX_AGE_S`, or as often as the failure allows.
- A full queue drops its oldest message: current alerts matter more.
- Lost messages are counted and logged.

It must not know: the content of a message, how a sink works.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

from zcproto.common.backoff import HALF, backoff_s
from zcproto.common.clock import Clock
from zcproto.observe.log import get_logger

QUEUED: Final = 256
"""Maximum messages queued for one sink, under 8 KiB each."""

MAX_AGE_S: Final = 3_600.0
"""Age after which a message is dropped."""

FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 120.0
DOWN_AFTER: Final = 3
"""Consecutive failures after which a sink counts as down."""

log = get_logger("zcproto.alerts")


class Undelivered(Exception):
    """A message was not delivered. The text is the reason, without secrets.

    `tries` is the total number of attempts worth making; None: until the message is too old.
    """

    def __init__(self, reason: str, *, tries: int | None = None) -> None:
        super().__init__(reason)
        self.tries = tries


class Sink(Protocol):
    """A receiver of messages."""

    @property
    def name(self) -> str:
        """Return one word for logs and metrics."""

    @property
    def where(self) -> str:
        """Return the destination for people, without secrets."""

    async def deliver(self, body: bytes) -> str:
        """Deliver one message. Return the receiver's answer for `zcproto alert test`. Raises Undelivered.

        It has its own timeout and can be cancelled.
        """


class _Waiting(NamedTuple):
    body: bytes
    since: float
    what: str


class SinkQueue:
    """A sink with its queue. `random` returns numbers in [0, 1).

    `on_down` is called with the reason when deliveries fail repeatedly, `on_up` when one succeeds after that.
    `delivered`, `failures` and `lost` are counters.
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
        """Return True if the last deliveries failed."""
        return self._in_a_row >= DOWN_AFTER

    def __len__(self) -> int:
        """Return the number of queued messages."""
        return len(self._queue)

    def put(self, body: bytes, what: str) -> None:
        """Queue a message. `what` names it in the log if it is lost."""
        if len(self._queue) >= QUEUED:
            self._lose(self._queue.popleft(), "the queue is full")
        self._queue.append(_Waiting(body, self._clock.now(), what))
        self._filled.set()

    def start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(
            self._run(), name=f"zcproto-alerts-{self.name}"
        )

    async def stop(self, limit_s: float) -> None:
        """Deliver queued messages with one attempt each within the limit, then stop."""
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
        while True:
            tries += 1
            limit = None
            try:
                await self.sink.deliver(waiting.body)
            except Undelivered as error:
                reason, limit = str(error), error.tries
            except Exception as error:  # an internal error must not stop the queue
                log.error("alert.sink_failed", sink=self.name, exc_info=error)
                reason, limit = type(error).__name__, 1
            else:
                self._arrived()
                return
            self._failed(reason)
            too_old = self._clock.now() - waiting.since >= MAX_AGE_S
            if self._stopping.is_set() or too_old or (limit is not None and tries >= limit):
                self._lose(waiting, reason)
                return
            await self._pause(backoff_s(tries, FIRST_DELAY_S, MAX_DELAY_S, HALF, self._random()))

    async def _pause(self, seconds: float) -> None:
        """Wait for the delay or until `stop`."""
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
