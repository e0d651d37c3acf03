"""Runs the lifespans of an application and of those that it includes.

    start -> each lifespan up to its `yield` -> the server runs -> stop -> each to its end, in reverse order

Rules:
- All of them run in one task, so that they may hold a TaskGroup or a timeout.
- The start and the end are bounded; a task that takes longer is cancelled.
- A lifespan that ends while the server runs, such as by a failed task of its TaskGroup, ends the server: what it
  yielded is closed.

It must not know: how a server starts and drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final

from zcproto.app.app import App
from zcproto.errors import LifespanError
from zcproto.server.state import log

CANCELLED_TIME: Final = 2.0
"""Seconds that a cancelled lifespan has to clean up."""

_FAILED: Final = {"start": "did not start", "run": "ended early", "end": "did not end"}


class Lifespans:
    """The lifespans of one server, in the order in which they are entered. `values` receives what they yield.

    `failure` is the first error. `is_stuck` is whether they do not end although they were cancelled.
    """

    def __init__(
        self,
        lifespans: Mapping[App[Any], Callable[[App[Any]], AbstractAsyncContextManager[Any]]],
        values: dict[App[Any], Any],
    ) -> None:
        self._lifespans = lifespans
        self._values = values
        self._phase = "start"
        self._started_or_ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.failure: LifespanError | None = None

    @property
    def is_stuck(self) -> bool:
        return self._task is not None and not self._task.done()

    async def start(self, limit: float, on_early_end: Callable[[], None]) -> None:
        """Enter all lifespans within `limit` seconds. `on_early_end` is called if one ends before `stop`.

        Raises LifespanError if one fails or takes longer; then those that were entered have been left.
        """
        if not self._lifespans:
            return
        self._task = asyncio.get_running_loop().create_task(self._run(on_early_end), name="zcproto-lifespan")
        try:
            async with asyncio.timeout(limit):
                await self._started_or_ended.wait()
        except TimeoutError:
            await self._time_out(limit)
        except asyncio.CancelledError:
            await self._cancel()
            raise
        if self.failure is not None:
            raise self.failure

    async def stop(self, limit: float) -> None:
        """Leave all lifespans within `limit` seconds. Idempotent."""
        self._stopping.set()
        if self._task is not None and not self._task.done() and self.failure is None:
            self._phase = "end"
            await asyncio.wait([self._task], timeout=limit)
            if not self._task.done():
                await self._time_out(limit)

    async def _run(self, on_early_end: Callable[[], None]) -> None:
        try:
            async with AsyncExitStack() as stack:
                for app, lifespan in self._lifespans.items():
                    self._values[app] = await stack.enter_async_context(lifespan(app))
                self._phase = "run"
                self._started_or_ended.set()
                await self._stopping.wait()
            if not self._stopping.is_set():
                raise RuntimeError("the lifespan has suppressed its cancellation")
        except (Exception, asyncio.CancelledError) as error:
            if self.failure is None:
                self.failure = LifespanError(
                    f"the lifespan of the application {_FAILED[self._phase]}: it raised {type(error).__name__};"
                    " the log has the traceback under lifespan.failed"
                )
                self.failure.__cause__ = error
                log.error("lifespan.failed", what=self._phase, exc_info=error)
            if self._phase == "run":
                on_early_end()
        finally:
            self._started_or_ended.set()

    async def _time_out(self, limit: float) -> None:
        self.failure = LifespanError(
            f"the lifespan of the application {_FAILED[self._phase]} within {limit:g} s;"
            " make it faster, or raise server.lifespan_timeout"
        )
        log.error("lifespan.stuck", what=self._phase, seconds=limit)
        await self._cancel()

    async def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task], timeout=CANCELLED_TIME)
