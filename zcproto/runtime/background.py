"""The background work of a server, which ends with it, and what new certificates cause while it runs.

Rules for certificates:
- New ones apply to future connections; existing ones are kept, unless the client's certificate was revoked.
- Keys to come are announced to every connection by the event `pins.next`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.bus.topics import SharedTopics
from zcproto.certs.checker import ServingCertificates
from zcproto.certs.client_user import CertificateId, certificate_id
from zcproto.certs.manager import unix_ms
from zcproto.certs.rollover import NextPins
from zcproto.common.deadlines import sleep_together
from zcproto.common.process import heap_trim
from zcproto.observe.log import flush_log, report_suppressed
from zcproto.runtime.alert_sources import on_topics_checked
from zcproto.server.state import log
from zcproto.stores.sync import CLEANUP_S
from zcproto.wire.message import encode_body

CLEANUP_SLOTS: Final = 2_000
"""Sessions checked in one slice of the cleanup, about a millisecond of the loop."""

FLUSH_INTERVAL: Final = 1.0
"""Seconds until log lines that could not be written are tried again, if no other line comes."""

FLUSHES_PER_SUMMARY: Final = 60

TRIM_INTERVAL: Final = 1.0
TRIM_FROM: Final = 256
"""Connections from which on memory is returned after half of them have ended: about ten MiB."""

TRIM_AFTER: Final = 3
"""Intervals in which none comes back until memory is returned. Clients that lost their network come back within
seconds, and connections in new memory cost 5% more CPU."""

TRIM_FROM_BYTES: Final = 16 << 20
"""Bytes of large bodies from which on memory is returned, once none is moved for TRIM_INTERVAL."""

TOPICS_INTERVAL: Final = 10.0
"""An alert begins after two checks: a new coordinator, or primary, is found sooner."""

LONGEST_BURST: Final = 60
"""Intervals after which memory is returned although large bodies are still moved."""

Spawn = Callable[[Coroutine[Any, Any, None]], object]


@asynccontextmanager
async def background() -> AsyncIterator[Spawn]:
    """Yield a function that runs work until it returns or the server ends.

    A failure is logged and ends that piece of work only; the server continues without it. Unlike a bare TaskGroup
    it may be entered and left by different tasks.
    """
    group, entered = asyncio.TaskGroup(), asyncio.Event()

    async def run() -> None:
        async with group:
            entered.set()
            await asyncio.get_running_loop().create_future()  # until it is cancelled

    runner = asyncio.get_running_loop().create_task(run(), name="zcproto-background")
    await entered.wait()
    try:
        yield lambda work: group.create_task(_log_failure(work))
    finally:
        runner.cancel()
        await asyncio.wait([runner])


async def _log_failure(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        log.error("server.fault", what=getattr(work, "__qualname__", None), exc_info=error)


def background_work(parts: Parts) -> Iterator[Coroutine[Any, Any, None]]:
    """Yield what runs until the server ends."""
    yield parts.traffic.run()
    yield flush_log_regularly()
    trim = heap_trim()
    if trim is not None:
        counters = parts.state.counters
        yield return_memory(lambda: parts.listener.connections, lambda: counters.large_bytes, trim)
    if parts.store is None:
        yield clean_sessions(parts)
    yield parts.alerts.run()
    if parts.state.topics is not None:
        yield watch_topics(parts.state.topics, partial(on_topics_checked, parts.alerts))
    yield parts.certificates.run()
    if parts.tokens is not None:
        yield parts.tokens.run()
    for directory in (parts.devices, parts.users):
        if directory is not None:
            yield directory.watch()


async def watch_topics(
    topics: SharedTopics,
    checked: Callable[[bool], None],
    sleep: Callable[[float], Awaitable[None]] = sleep_together,
) -> None:
    """Report whether this process has been cut off from the others for TOPICS_INTERVAL, until cancelled."""
    was_away = False
    while True:
        await sleep(TOPICS_INTERVAL)
        checked(was_away and topics.is_away)
        was_away = topics.is_away


async def clean_sessions(parts: Parts) -> None:
    """Remove expired sessions in small slices, once in `CLEANUP_S`, until cancelled."""
    registry = parts.state.registry
    while True:
        await asyncio.sleep(CLEANUP_S)
        sweeps = registry.sweeps
        while registry.sweeps == sweeps:
            registry.clean(parts.clock.wall(), CLEANUP_SLOTS)
            await asyncio.sleep(0)


async def flush_log_regularly() -> None:
    """Retry log lines that could not be written, and log suppressed lines every minute, until cancelled."""
    while True:
        for _ in range(FLUSHES_PER_SUMMARY):
            await sleep_together(FLUSH_INTERVAL)
            flush_log()
        report_suppressed()


async def return_memory(
    connections: Callable[[], int],
    large_bytes: Callable[[], int],
    trim: Callable[[], object],
    sleep: Callable[[float], Awaitable[None]] = sleep_together,
) -> None:
    """Return free memory to the system when half of many connections have ended and stay away, or a burst of large
    bodies is over, until cancelled."""
    most = now = gone = intervals = moved = trimmed_at = 0
    while True:
        await sleep(TRIM_INTERVAL)
        earlier, now = now, connections()
        most = max(most, now)
        gone = gone + 1 if most >= TRIM_FROM and now <= min(earlier, most // 2) else 0
        before, moved = moved, large_bytes()
        is_burst = moved - trimmed_at >= TRIM_FROM_BYTES
        intervals = intervals + 1 if is_burst else 0
        if gone == TRIM_AFTER or (is_burst and moved == before) or intervals == LONGEST_BURST:
            await asyncio.to_thread(trim)
            most, gone, trimmed_at, intervals = now, 0, moved, 0


# --- certificates ----------------------------------------------------------------------------------------


def roll_out_certificates(parts: Parts, spawn: Spawn, served: Callable[[], object]) -> None:
    """Put new certificates and announced keys into service from now on.

    `spawn` starts background work; `served` is called when new certificates are in service.
    """
    revoked = parts.certificates.serving.revoked

    def serve(serving: ServingCertificates) -> None:
        nonlocal revoked
        parts.acceptor.contexts = serving.contexts
        announce(parts.certificates.next_pins)
        added, revoked = serving.revoked - revoked, serving.revoked
        if added:
            spawn(close_revoked(parts, added))
        served()

    def announce(next_pins: NextPins | None) -> None:
        state = parts.state
        state.pins = tuple(pair.pin for pair in parts.certificate_pairs)
        state.pins_next, body = None, None
        if next_pins is not None:
            state.pins_next = {"pins": list(next_pins.pins), "from": unix_ms(next_pins.use_from)}
            body = encode_body(["pins.next", state.pins_next])
        spawn(state.announce(body))

    parts.certificates.on_serving = serve
    parts.certificates.on_next_pins = announce
    announce(parts.certificates.next_pins)


async def close_revoked(parts: Parts, revoked: frozenset[CertificateId]) -> None:
    """Close the connections of clients whose certificates were revoked."""
    async for connection in parts.state.each_connection():
        certificate = connection.peer_certificate()
        if certificate is not None and certificate_id(certificate) in revoked:
            log.warning("connection.certificate_revoked", peer=connection.peer, connection=connection.id)
            connection.close("certificate_revoked")
    if parts.http is not None:
        parts.http.close_those(lambda certificate: certificate_id(certificate) in revoked)
