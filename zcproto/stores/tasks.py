"""Tasks that outlive the callers who started them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from zcproto.errors import CallError
from zcproto.observe.log import get_logger
from zcproto.stores.base import StoreUnavailable

CANCEL_LIMIT_S: Final = 2.0
"""How long cancelled tasks may take to end."""

_TASK: Final = "zcproto-store"
UPKEEP: Final = "zcproto-store-upkeep"

T = TypeVar("T")

log = get_logger("zcproto.store")


class BackgroundTasks:
    """The tasks of one store."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], name: str = _TASK) -> asyncio.Task[T]:
        """Start a task that goes on if its caller is cancelled."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something to its end, even if the caller is cancelled, and return its result."""
        task = self.spawn(work)
        await asyncio.wait([task])
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
                except StoreUnavailable:
                    continue  # the breaker has counted it; the next round comes after the outage
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
