"""Joins the processes of one server: what the coordinator has for all of them, and what a worker uses of it.

    coordinator: the store, the throttle of logins, the alerts, all figures -> served on <home>/workers.sock
    worker:      a link to it, which is made again when it is lost

Must not know: how the processes are started and ended.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Final

from zcproto.auth import Throttle
from zcproto.common.clock import random_fraction, system_clock, system_entropy
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import level, set_level
from zcproto.runtime.alert_sources import on_store_event
from zcproto.runtime.build import WorkerRole, build_alerts
from zcproto.runtime.store_setup import MEMORY, SQLITE, report_notice
from zcproto.server.idempotency import answer_limits
from zcproto.stores.base import Change, ChangeKind, StoreUnavailable
from zcproto.stores.revoker import OnEvent
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import StoreSync
from zcproto.workers import connections, joined_figures
from zcproto.workers.alerts import WorkerAlerts, WorkerReports
from zcproto.workers.gone import report_gone
from zcproto.workers.hub import StoreHub
from zcproto.workers.limits import WorkerCounting
from zcproto.workers.link import SILENCE_S, Link, LinkClient, LinkServer, Topics
from zcproto.workers.place import Place
from zcproto.workers.remote_store import RemoteStore, StoreServer
from zcproto.workers.throttle import SharedThrottle, throttle_calls

LOG_LEVEL: Final = "log.level"
"""Notice of the coordinator: the level of the log, which an operator has set."""

CERTIFICATES: Final = "certificates.changed"
"""Notice of the coordinator: it serves new certificates, or verifies clients by new files."""

LEFT_AFTER_S: Final = 0.2
"""After the end of a worker's link: the process ends, and its files are free."""

_LOSSES: Final = ("store_damaged", "store_missing")
_RUN_SIZE: Final = 2


@dataclass(frozen=True, slots=True)
class Joined:
    """The part of one process in its server. Handlers may be added to `topics`.

    `server` is the coordinator's end of the links, `client` that of a worker.
    """

    role: WorkerRole
    topics: Topics
    server: LinkServer | None = None
    client: LinkClient | None = None
    stores: StoreServer | None = None
    """Serves the coordinator's store to the workers, unless the store is one of several servers."""
    announce_end: Callable[[], None] = lambda: None
    """Let the workers know that this process, the coordinator, is about to end by order."""

    def share_log_level(self) -> None:
        """Have the workers log at the level of this process, the coordinator."""
        assert self.server is not None
        self.server.notify(LOG_LEVEL, level())

    def certificates_changed(self) -> None:
        """Have the workers check the certificates now."""
        assert self.server is not None
        self.server.notify(CERTIFICATES)

    def share_failures(self, store: StoreSync) -> None:
        """Have the coordinator's store count what fails for workers: each may see too little of an outage."""
        if self.stores is not None:
            self.stores.on_failed = store.breaker.failed

    def take_left_revocations(self, store: StoreSync) -> None:
        """Have the coordinator's store take over the pending revocations of workers that end from now on."""
        assert self.server is not None
        loop, is_planned = asyncio.get_running_loop(), False

        def take() -> None:
            nonlocal is_planned
            is_planned = False
            store.take_left()

        def on_lost(link: Link) -> None:
            nonlocal is_planned
            if not is_planned:
                is_planned = True
                loop.call_later(LEFT_AFTER_S, take)

        self.server.on_lost.append(on_lost)


def build_hub(config: Config, home: Home, on_event: OnEvent = lambda event, values: None) -> StoreHub | None:
    """Return the hub that gives one store to all processes of a server; None if they share the configured one.

    Raises and calls as `build_store`.
    """
    settings = config.store
    if settings.url not in (MEMORY, SQLITE):
        return None

    def report(name: str, **values: object) -> None:
        report_notice(on_event, name, **values)
        if name in _LOSSES:
            hub.store_emptied()

    store = SqliteStore(
        home.sessions if settings.url == SQLITE else None,
        timeout=settings.timeout,
        answers=answer_limits(config.idempotency.max_bytes, config.idempotency.per_user),
        on_notice=report,
    )
    hub = StoreHub(store, is_lasting=settings.url == SQLITE, now=system_clock.now, entropy=system_entropy)
    return hub


@asynccontextmanager
async def coordinator(place: Place, config: Config, home: Home) -> AsyncIterator[Joined]:
    """Serve what exists once to the workers while the body runs."""
    assert place.link is not None
    alerts = await build_alerts(config, system_clock, system_entropy)
    reports = WorkerReports(alerts)
    throttle = Throttle(config.limits.login_failures)
    calls, notices = throttle_calls(throttle, system_clock.now)
    topics = Topics(calls, {**notices, **reports.topics})
    server = LinkServer(place.link, topics, name=place.name, facts={"pid": os.getpid()})
    first_level = level()

    def on_link(link: Link) -> None:
        if level() != first_level:  # else a worker has that of its configuration
            link.notify(LOG_LEVEL, level())

    server.on_link.append(on_link)
    server.on_lost.append(reports.link_lost)
    hub = build_hub(config, home, partial(on_store_event, alerts))

    def announce_end() -> None:
        if hub is not None:
            hub.notify([Change(ChangeKind.AWAY)], None)

    stores = None
    if hub is not None:
        stores = StoreServer(hub)
        stores.serve(server)
    collector, whole = joined_figures.collect(
        server, topics, place, lambda: None if hub is None else hub.sessions
    )
    connections.serve(server, topics)
    await server.start()
    if hub is not None:
        # First of all, because the workers wait for it. A failure is reported when the server opens the store.
        with suppress(StoreUnavailable, ConfigError):
            await hub.open()
    collecting = asyncio.create_task(collector.run(), name="zcproto-figures")
    try:
        role = WorkerRole(
            has_lifespans=False,
            store=None if hub is None else hub.member(),
            heartbeat=None if hub is None else inf,  # its changes are calls in this process: none is missed
            alerts=alerts,
            throttle=throttle,
            fleet=whole,
        )
        yield Joined(role, topics, server=server, stores=stores, announce_end=announce_end)
    finally:
        collecting.cancel()
        announce_end()  # again: the drain may have been long
        await server.flush()
        await server.close()
        if hub is not None:
            await hub.close()


@asynccontextmanager
async def worker(place: Place, config: Config, path: Path, counting: WorkerCounting) -> AsyncIterator[Joined]:
    """Use what the coordinator serves at `path` while the body runs."""
    topics = Topics(notices={LOG_LEVEL: lambda link, name: set_level(name)})
    # On a busy machine the coordinator may have to wait for a processor, and its end is noticed at once.
    silence = max(SILENCE_S, config.store.timeout)
    client = LinkClient(
        path,
        topics,
        name=place.name,
        facts=joined_figures.facts_of(place),
        silence=silence,
        random=partial(random_fraction, system_entropy),
    )
    alerts = WorkerAlerts(config.alerts, client.notify, clock=system_clock, entropy=system_entropy)
    client.on_up.append(alerts.link_made)
    throttle = SharedThrottle(client, counting, config.limits.login_failures)
    client.on_down.append(throttle.link_lost)
    whole, report_last = joined_figures.report(client, topics, place)
    store = None
    if config.store.url in (MEMORY, SQLITE):
        store = RemoteStore(
            path,
            client,
            name=place.name,
            silence=silence,
            answers=answer_limits(config.idempotency.max_bytes, config.idempotency.per_user),
            entropy=system_entropy,
        )
    client.start()
    try:
        role = WorkerRole(
            counting=counting,
            maintains=False,
            store=store,
            alerts=alerts,
            throttle=throttle,
            report_gone=partial(report_gone, client),
            run=f"{place.number:x}{system_entropy(_RUN_SIZE).hex()}",
            fleet=whole,
            connections=connections.join(client, topics),
        )
        yield Joined(role, topics, client=client)
    finally:
        await report_last()
        await client.close()
