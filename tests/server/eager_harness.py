"""Runs coroutines through EagerTasks on both event loops."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from tests.limits import TIMEOUT
from zcproto.server.eager import EagerTasks, EagerWorker

T = TypeVar("T")

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="untouched")


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def tasks(loop: asyncio.AbstractEventLoop) -> Iterator[EagerTasks]:
    tasks = EagerTasks(loop)
    yield tasks
    assert loop.run_until_complete(tasks.close(1.0)) == 0


class Outcome:
    """Records the call of a Worker's `done`."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.calls = 0

    def __call__(self, result: Any, error: BaseException | None) -> None:
        self.result, self.error = result, error
        self.calls += 1


class TaskHarness:
    """Runs steps as the loop does, outside any task."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tasks: EagerTasks) -> None:
        self.loop = loop
        self.tasks = tasks

    def in_loop(self, step: Callable[[], T]) -> T:
        """Call a function from a plain callback of the loop."""
        future: asyncio.Future[T] = self.loop.create_future()

        def callback() -> None:
            try:
                future.set_result(step())
            except BaseException as error:
                future.set_exception(error)

        self.loop.call_soon(callback)
        return self.loop.run_until_complete(future)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> EagerWorker | None:
        return self.in_loop(lambda: self.tasks.start(coroutine))

    def value(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a coroutine that must end in its first step."""
        assert self.start(coroutine) is None
        return self.tasks.result

    def waiting(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[EagerWorker, Outcome]:
        """Start a coroutine that must wait."""
        outcome = Outcome()

        def step() -> EagerWorker:
            worker = self.tasks.start(coroutine)
            worker.done = outcome
            return worker

        return self.in_loop(step), outcome

    def turns(self, count: int = 3) -> None:
        for _ in range(count):
            self.in_loop(lambda: None)

    def finish(self, outcome: Outcome) -> Outcome:
        """Run the loop until a worker is done."""

        async def wait() -> None:
            async with asyncio.timeout(TIMEOUT):
                while not outcome.calls:  # noqa: ASYNC110 - the EagerWorker knows no events
                    await asyncio.sleep(0)

        self.loop.run_until_complete(wait())
        self.turns()
        assert outcome.calls == 1
        return outcome

    def outcome(self, coroutine: Coroutine[Any, Any, Any]) -> Outcome:
        return self.finish(self.waiting(coroutine)[1])


@pytest.fixture
def harness(loop: asyncio.AbstractEventLoop, tasks: EagerTasks) -> TaskHarness:
    return TaskHarness(loop, tasks)


@pytest.fixture(params=["a new task", "a task that waits for work"])
def warm(request: pytest.FixtureRequest, harness: TaskHarness) -> None:
    """Cover the first coroutine, whose task has not run yet, and later ones."""
    if request.param == "a task that waits for work":
        harness.value(ready())
        harness.turns()


async def ready(value: Any = None) -> Any:
    return value


async def forever() -> None:
    await asyncio.Event().wait()
