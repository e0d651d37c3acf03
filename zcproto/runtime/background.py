"""Background work that ends with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from zcproto.server.state import log


class Background:
    """A task group that may be entered and left by different tasks.

    A failure is logged and ends that piece of work alone: the server goes on without it.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._entered = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._runner = asyncio.get_running_loop().create_task(self._run(), name="zcproto-background")
        await self._entered.wait()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel what runs and wait until it has ended."""
        assert self._runner is not None
        self._runner.cancel()
        await asyncio.wait([self._runner])

    async def _run(self) -> None:
        async with self._group:
            self._entered.set()
            await asyncio.get_running_loop().create_future()  # until it is cancelled

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until it returns or the server ends."""
        self._group.create_task(_guard(work))


async def _guard(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        log.error("server.fault", what=getattr(work, "__qualname__", None), exc_info=error)
