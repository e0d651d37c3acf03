"""The end of a server's connections.

What this file decides: the order of the end, and how long each step may take.

    stop accepting -> GOAWAY -> wait for running methods -> cancel -> close -> wait for the peers

Rules:
- A method may finish within the limit; a caller whose method is cut off gets CANCELLED.
- A peer that does not close after close_notify is reset after the linger time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.connection.events import GoAwayReason
from zcproto.server.state import log
from zcproto.tls.server import TlsServerTransport
from zcproto.tls.transport import LINGER_TIME

CANCELLED_TIME: Final = 2.0
"""Seconds that cancelled methods have to clean up."""


async def drain_connections(parts: Parts, limit: float) -> int:
    """Stop accepting and end every connection; return how many were cut off after `limit` seconds."""
    state, http = parts.state, parts.http
    state.draining = True
    if http is not None:
        http.drain()
    parts.listener.close()
    state.log_soon.write()
    log.info("server.draining", connections=len(state.connections))
    async for connection in state.each_connection():
        connection.go_away(GoAwayReason.DRAINING)
    await _within(limit, _wait_idle(parts))
    if http is not None:
        http.close()
    cut_off = len(state.connections)
    for connection in list(state.connections):
        connection.cancel_all()
        connection.close("drain_timeout")
    # close_notify has been sent: wait for the peers, or for the linger time that resets the rest.
    await _within(LINGER_TIME + 0.5, parts.listener.wait_empty())
    stuck = await state.tasks.close(CANCELLED_TIME)
    if stuck:
        log.error("server.methods_stuck", count=stuck)
    return cut_off


async def close_state(parts: Parts) -> None:
    """Abort unfinished handshakes and release what connections share."""
    state = parts.state
    state.log_soon.write()
    for waiting in state.wheel.close():
        assert isinstance(waiting, TlsServerTransport), "all conversations have ended"
        waiting.abort()
    await _within(LINGER_TIME, parts.listener.wait_empty())
    state.close()


async def _wait_idle(parts: Parts) -> None:
    await parts.state.wait_drained()
    if parts.http is not None:
        await parts.http.endpoint.wait_at_rest()


async def _within(seconds: float, condition: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await condition
