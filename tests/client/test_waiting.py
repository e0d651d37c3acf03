"""WaitingQueue: order of callers, and turns of callers that are cancelled."""

from __future__ import annotations

import asyncio

from tests.client.helpers import scripted, turns
from zcproto.client.protocol import WaitingQueue


class Callers:
    """A queue, the callers that were woken, and those that passed their turn on."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.woken: list[str] = []
        self.passed_on: list[str] = []

    async def enter(self, name: str, *, was_woken: bool = False) -> asyncio.Task[None]:
        async def wait() -> None:
            await self.queue.wait(was_woken=was_woken, pass_on=lambda: self.passed_on.append(name))
            self.woken.append(name)

        task = asyncio.create_task(wait())
        await turns()
        return task


@scripted
async def test_callers_are_woken_in_order_of_arrival() -> None:
    callers = Callers()
    for name in "abc":
        await callers.enter(name)
    assert callers.queue.wake(2) == 0
    await turns()
    assert callers.woken == ["a", "b"]
    assert callers.queue.wake(3) == 2
    await turns()
    assert callers.woken == ["a", "b", "c"]
    assert not callers.queue


@scripted
async def test_caller_that_was_woken_in_vain_keeps_its_place() -> None:
    callers = Callers()
    await callers.enter("second")
    await callers.enter("first", was_woken=True)
    callers.queue.wake_all()
    await turns()
    assert callers.woken == ["first", "second"]


@scripted
async def test_cancelled_caller_takes_no_turn() -> None:
    callers = Callers()
    gone = await callers.enter("gone")
    await callers.enter("next")
    gone.cancel()
    await turns()
    assert callers.queue.wake(1) == 0
    await turns()
    assert (callers.woken, callers.passed_on) == (["next"], [])


@scripted
async def test_caller_that_is_cancelled_after_it_was_woken_passes_its_turn_on() -> None:
    callers = Callers()
    gone = await callers.enter("gone")
    callers.queue.wake(1)
    gone.cancel()
    await turns()
    assert (callers.woken, callers.passed_on) == ([], ["gone"])
