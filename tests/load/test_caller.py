"""The connection of tools that measure, where it differs from the load generator's."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.server.helpers import TIMEOUT
from zcproto.common.deadlines import DeadlineWheel
from zcproto.load.caller import Caller, Place

from .conftest import Serve


async def test_cancelled_leave_closes_connection(serve: Serve) -> None:
    server = serve()
    place = Place("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")
    caller = await place.caller()
    resume = threading.Event()
    server.loop.call_soon_threadsafe(resume.wait, TIMEOUT)  # the server does not close its end
    leaving = asyncio.create_task(caller.leave())
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.sleep(0)
    assert caller._gone.is_set()
    resume.set()
    place.close()


async def test_a_greeting_that_nobody_waits_for_any_more_is_no_fault() -> None:
    wheel = DeadlineWheel(asyncio.get_running_loop())
    caller = Caller(wheel)
    caller._ready.cancel()  # as when its task is cancelled while it dials
    caller.welcomed()
    assert caller._ready.cancelled()
    wheel.close()
