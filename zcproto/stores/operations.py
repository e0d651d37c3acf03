"""Runs operations on a session store.

Decides: that each operation ends within the store's timeout, however busy the event loop is; that during an outage
operations fail at once; and that an operation goes on when its caller has gone. Whether the store may be called is
decided by StoreHealth.

It must not know: what an operation is for, what is done about an outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

from zcproto.errors import CallError, ResourceExhausted, Unavailable
from zcproto.observe.histogram import WAITED_S, Histogram
from zcproto.observe.log import get_logger
from zcproto.sessions.health import StoreHealth
from zcproto.stores.base import DamagedRecord, KeysMoving, SessionStore, StoreUnavailable

CANCEL_LIMIT_S: Final = 2.0
"""How long cancelled tasks may take to end."""

DAMAGED_RETRY_MS: Final = 10_000
"""For callers that met a damaged record, which an operator has to remove."""

UPKEEP: Final = "zcproto-store-upkeep"
"""The name of the tasks that never end."""

_TASK: Final = "zcproto-store"

_TURNS: Final = 4
"""The parts of a LoopTimeout."""

T = TypeVar("T")

Call = Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]
"""`CircuitBreaker.call`, or `CircuitBreaker.attempt` for probes."""

log = get_logger("zcproto.store")


class LoopTimeout:
    """A timeout for `async with` that counts only time in which the event loop ran.

    A loop that was blocked reads what has arrived meanwhile before an operation counts as late: the timeout is
    divided, and a late timer counts for one part.
    """

    __slots__ = ("_due", "_left", "_part", "_scope", "_timer")

    def __init__(self, seconds: float) -> None:
        self._part = seconds / _TURNS
        self._left = _TURNS

    async def __aenter__(self) -> None:
        self._scope = asyncio.timeout(None)
        await self._scope.__aenter__()
        loop = asyncio.get_running_loop()
        self._due = loop.time() + self._part
        self._timer = loop.call_at(self._due, self._tick)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._scope.__aexit__(kind, error, traceback)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._left -= 1
        if self._left:
            now = loop.time()
            self._due += self._part
            if self._due <= now:  # the loop was blocked
                self._due = now + self._part
            self._timer = loop.call_at(self._due, self._tick)
        else:
            self._scope.reschedule(loop.time())


@dataclass(eq=False)
class CircuitBreaker:
    """Runs operations of `store` while its health allows them: `await breaker.call(breaker.store.find(digest))`.

    `timeout` is in seconds; `now` returns monotonic seconds. `reason` is the store's last failure. `in_flight`
    counts the operations that run now, `durations` how long the finished ones took.
    """

    store: SessionStore
    health: StoreHealth
    timeout: float
    now: Callable[[], float]
    reason: str = field(default="", init=False)
    in_flight: int = field(default=0, init=False)
    durations: Histogram = field(default_factory=partial(Histogram, WAITED_S), init=False)

    def check(self) -> None:
        """Raise Unavailable if the store is not called now."""
        if not self.health.is_healthy:
            raise self.unavailable()

    def unavailable(self, error: BaseException | None = None) -> Unavailable:
        """Return the error for callers who need the store, or met this error."""
        if isinstance(error, DamagedRecord):
            return Unavailable(
                "a record in the session store is damaged; the operator has an alert",
                {"retry_after_ms": DAMAGED_RETRY_MS},
            )
        return Unavailable(
            "the session store does not answer: try again",
            {"retry_after_ms": self.health.retry_after_ms(self.now())},
        )

    async def call(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation and return its result.

        Raises StoreUnavailable, or ResourceExhausted if too many wait, which is not counted as a failure.
        """
        if not self.health.is_healthy:
            operation.close()
            raise StoreUnavailable("it is out; calls are suspended until a probe succeeds")
        began = self.now()
        self.in_flight += 1
        try:
            return await self.attempt(operation)
        except (DamagedRecord, KeysMoving):
            raise  # the store works
        except StoreUnavailable as error:
            self.failed(error.reason, self.now() - began)
            raise
        finally:
            self.in_flight -= 1
            self.durations.add(self.now() - began)

    def failed(self, reason: str, waited_s: float) -> None:
        """Count a failed operation, of this process or of another one that has the store through it."""
        self.reason = reason
        self.health.failed(self.now(), waited_s)

    async def attempt(self, operation: Awaitable[T], within: float | None = None) -> T:
        """Run an operation whatever the health, for probes. The outcome is not counted."""
        if within is None and self.store.keeps_time:
            return await operation
        limit = self.timeout if within is None else within
        try:
            async with LoopTimeout(limit):
                return await operation
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {limit * 1000:.0f} ms") from None


class BackgroundTasks:
    """The tasks of one store. Once `is_stopping` is set, timers and changes must not start any."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[Any]] = set()
        self.is_stopping = False

    def spawn(self, work: Coroutine[Any, Any, T], name: str = _TASK) -> asyncio.Task[T]:
        """Start a task that goes on if its caller is cancelled."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something to its end, even if the caller is cancelled. Return and raise as `result` does."""
        return await self.result(self.spawn(work))

    async def result(self, task: asyncio.Task[T]) -> T:
        """Return the result of a task, which goes on if the caller is cancelled.

        Raises Unavailable if `stop` cancelled the task: its caller was not cancelled, and may try another server.
        """
        await asyncio.wait([task])
        if task.cancelled():
            raise Unavailable("the server stopped before the session store answered; try again")
        return task.result()

    def run_in_background(self, work: Coroutine[Any, Any, object]) -> None:
        """Start a task whose outcome is logged, not awaited."""

        async def logged() -> None:
            try:
                await work
            except (StoreUnavailable, CallError):
                pass  # counted and logged where they were raised
            except Exception as error:
                log.error("store.task_failed", exc_info=error)

        self.spawn(logged())

    def repeat(self, interval: float, work: Callable[[], Awaitable[object]]) -> None:
        """Do something every `interval` seconds until `stop`."""

        async def forever() -> None:
            while True:
                await asyncio.sleep(interval)
                try:
                    await work()
                except (StoreUnavailable, ResourceExhausted):
                    continue  # the next round comes after the outage, or when fewer wait
                except Exception as error:
                    log.error("store.upkeep_failed", what=work.__name__, exc_info=error)

        self.spawn(forever(), UPKEEP)

    async def stop(self, within: float) -> None:
        """Wait `within` seconds for the tasks in progress, then cancel the rest."""
        in_progress = {task for task in self.running if task.get_name() != UPKEEP}
        if in_progress:
            await asyncio.wait(in_progress, timeout=within)
        rest = list(self.running)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=CANCEL_LIMIT_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not warn if the caller has gone
