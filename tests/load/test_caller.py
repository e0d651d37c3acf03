"""The connection of tools that measure, where it differs from the load generator's."""

from __future__ import annotations

import asyncio

from zcproto.common.deadlines import DeadlineWheel
from zcproto.load.caller import Caller


async def test_a_greeting_that_nobody_waits_for_any_more_is_no_fault() -> None:
    wheel = DeadlineWheel(asyncio.get_running_loop())
    caller = Caller(wheel)
    caller._ready.cancel()  # as when its task is cancelled while it dials
    caller.welcomed()
    assert caller._ready.cancelled()
    wheel.close()
