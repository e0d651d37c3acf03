"""What the processes of one server share: what the coordinator has for all, and what a worker uses of it.

    coordinator: the store, the throttle of logins, the alerts, all figures -> served on <home>/workers.sock
    worker:      a link to it, which is made again when it is lost

    connections of sessions, for `session.list`:  worker: OF -> coordinator: HERE -> every other worker
    users and devices that were removed:          worker: GONE -> coordinator

Rules:
- A list of connections shows what is known: a process that does not answer in time is left out. How much is asked
  for at once is bounded.
- The coordinator ends the sessions of removed users and devices, once. It watches their files like the workers, but
  misses a change that is made while it is being replaced: each worker reports every change until its sessions have
  ended.

It must not know: how the processes are started and ended.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.auth import DeviceFile, RegisteredDevice, Throttle, User
from zcproto.auth.users import NO_KEY
from zcproto.common.clock import random_fraction, system_clock, system_entropy
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.errors import CallError, ConfigError, ResourceExhausted, Unavailable, ZcprotoError
from zcproto.observe.log import level, set_level
from zcproto.runs.shared import SharedRuns, new_process
from zcproto.runtime.alert_sources import on_store_event
from zcproto.runtime.build import WorkerRole, build_alerts, run_limits
from zcproto.runtime.store_setup import MEMORY, SQLITE, report_notice
from zcproto.server.idempotency import answer_limits
from zcproto.server.remote_pending import decode_answer, encode_answer
from zcproto.server.state import ConnectionsElsewhere, ConnectionUses, ServerState
from zcproto.stores.base import HEARTBEAT_S, Change, ChangeKind, StoreUnavailable
from zcproto.stores.revoker import OnEvent
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import StoreSync
from zcproto.workers.alerts import WorkerAlerts, WorkerReports
from zcproto.workers.figures import Collector, Member, Reporter
from zcproto.workers.hub import StoreHub
from zcproto.workers.limits import WorkerCounting
from zcproto.workers.link import SILENCE_S, Link, LinkClient, LinkLost, LinkServer, Topics
from zcproto.workers.remote_store import RemoteStore, StoreServer
from zcproto.workers.runs import RunHub, WorkerRuns
from zcproto.workers.throttle import SharedThrottle, throttle_calls
from zcproto.workers.topics import TopicHub, WorkerTopics

LOG_LEVEL: Final = "log.level"
"""Notice of the coordinator: the level of the log, which an operator has set."""

CERTIFICATES: Final = "certificates.changed"
"""Notice of the coordinator: it serves new certificates, or verifies clients by new files."""

GONE: Final = "auth.gone"
"""Call to the coordinator: a user, or a device of a user, was removed. Answered when the sessions have ended."""

GONE_WITHIN_S: Final = 5.0

OF: Final = "connections.of"
"""Call to the coordinator: the connections of sessions in the other workers, by session."""

HERE: Final = "connections.here"
"""Call to a worker: those of its own."""

CALLS: Final = "calls.list"
"""Call to a worker: the pending calls of all processes."""

DECIDE: Final = "calls.decide"
"""Call to a worker: the answer of an operator to one of them."""

CALLS_S: Final = 2.0

ANSWER_S: Final = 0.25
ASK_S: Final = 0.5

SESSIONS: Final = 64
"""Sessions of one list that other processes are asked about: the newest."""

ASKED_AT_ONCE: Final = 16

LEFT_AFTER_S: Final = 0.2
"""After the end of a worker's link: the process ends, and its files are free."""

_LOSSES: Final = ("store_damaged", "store_missing")
_RUN_SIZE: Final = 2
_UNKNOWN: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Membership:
    """What one process has from its server, and gives to it. Handlers may be added to `topics`.

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

    def serve_parts(self, parts: Parts) -> None:
        """Do for the workers what needs the parts of the coordinator, which has started."""
        self.topics.calls[GONE] = partial(_end_sessions, parts)
        if parts.store is not None:
            if self.stores is not None:  # each worker may see too little of an outage
                self.stores.on_failed = parts.store.breaker.failed
            self.take_left_revocations(parts.store)

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


@asynccontextmanager
async def coordinator(
    member: Member,
    workers: int,
    listening: socket.socket,
    config: Config,
    home: Home,
    *,
    has_predecessor: bool = False,
) -> AsyncIterator[Membership]:
    """Serve what exists once to so many workers while the body runs, and to those of a predecessor."""
    alerts = await build_alerts(config, system_clock, system_entropy)
    reports = WorkerReports(alerts)
    throttle = Throttle(config.limits.login_failures)
    calls, notices = throttle_calls(throttle, system_clock.now)
    topics = Topics(calls, {**notices, **reports.topics})
    server = LinkServer(listening, topics, name=member.name, facts={"pid": os.getpid()})
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
    collector = Collector(member.pid, workers, system_clock)
    collector.serve(server)
    serve_connections(server)
    topic_hub = TopicHub(system_entropy)
    topic_hub.serve(server)
    writers = workers * (1 + has_predecessor)  # of runs, to this table
    run_hub = RunHub(run_limits(config), writers, system_clock.now)
    run_hub.serve(server)
    await server.start()
    if hub is not None:
        # First of all, because the workers wait for it. A failure is reported when the server opens the store.
        with suppress(StoreUnavailable, ConfigError):
            await hub.open()
    collecting = asyncio.create_task(collector.run(), name="zcproto-figures")
    sweeping = asyncio.create_task(run_hub.run(), name="zcproto-runs")
    try:
        role = WorkerRole(
            has_lifespans=False,
            store=None if hub is None else hub.member(),
            # The changes of a hub are calls in this process: none is missed.
            heartbeat=HEARTBEAT_S if hub is None else inf,
            alerts=alerts,
            throttle=throttle,
            topics=None if hub is None else topic_hub,
            calls=WorkerCalls(server),
            runs=None if hub is None else run_hub.store,
            fleet=partial(
                collector.read_parts, member, count_sessions=None if hub is None else lambda: hub.sessions
            ),
        )
        yield Membership(role, topics, server=server, stores=stores, announce_end=announce_end)
    finally:
        collecting.cancel()
        sweeping.cancel()
        announce_end()  # again: the drain may have been long
        await server.flush()
        await server.close()
        if hub is not None:
            await hub.close()


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
async def worker(
    member: Member, config: Config, path: Path, counting: WorkerCounting
) -> AsyncIterator[Membership]:
    """Use what the coordinator serves at `path` while the body runs."""
    topics = Topics(notices={LOG_LEVEL: lambda link, name: set_level(name)})
    # On a busy machine the coordinator may have to wait for a processor, and its end is noticed at once.
    silence = max(SILENCE_S, config.store.timeout)
    random = partial(random_fraction, system_entropy)
    client = LinkClient(
        path,
        topics,
        name=member.name,
        facts=member.facts,
        silence=silence,
        random=random,
    )
    alerts = WorkerAlerts(config.alerts, client.notify, clock=system_clock, entropy=system_entropy)
    client.on_up.append(alerts.link_made)
    throttle = SharedThrottle(client, counting, config.limits.login_failures)
    client.on_down.append(throttle.link_lost)
    reporter = Reporter()
    reporter.serve(topics)
    store = shared = runs = None
    if config.store.url in (MEMORY, SQLITE):
        shared = WorkerTopics(path, name=member.name, silence=silence, random=random)
        limits, process = run_limits(config), new_process(system_entropy)
        carrier = WorkerRuns(path, process, name=member.name, silence=silence, random=random)
        runs = SharedRuns(carrier, limits, process)
        store = RemoteStore(
            path,
            client,
            name=member.name,
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
            report_gone=partial(client.call, GONE, within=GONE_WITHIN_S),
            run=f"{member.number:x}{system_entropy(_RUN_SIZE).hex()}",
            topics=shared,
            runs=runs,
            fleet=partial(reporter.read_parts, member, client),
            connections=partial(connections_elsewhere, client, topics),
        )
        yield Membership(role, topics, client=client)
    finally:
        await reporter.report_last(client)
        await client.close()


async def _end_sessions(parts: Parts, link: object, kind: str, name: str, user: str) -> None:
    """End the sessions of a user or a device that a worker reports as gone."""
    if kind == DeviceFile.kind:
        if parts.devices is not None:
            await parts.devices.report_gone(name, RegisteredDevice(user, b"", _UNKNOWN))
    elif parts.users is not None:
        await parts.users.report_gone(name, User(NO_KEY))


# --- pending calls -------------------------------------------------------------------------------------------


class WorkerCalls:
    """The pending calls of the workers, for the coordinator, which asks one worker: it asks all others."""

    def __init__(self, server: LinkServer) -> None:
        self._server = server

    async def list(self, user: str | None) -> tuple[list[dict[str, Any]], bool]:
        rows, is_complete = await self._ask(CALLS, user)
        return rows, is_complete

    async def decide(
        self, call_id: str, value: Any, error: CallError | None, operator: str
    ) -> dict[str, Any]:
        row: dict[str, Any] = await self._ask(DECIDE, call_id, *encode_answer(value, error), operator)
        return row

    async def _ask(self, topic: str, *arguments: Any) -> Any:
        for link in _workers(self._server):
            with suppress(LinkLost):
                return await link.call(topic, *arguments, within=CALLS_S)
        raise Unavailable("no worker has answered; retry")


def _workers(server: LinkServer) -> list[Link]:
    """Return the links to the workers. Each has other links, without a number: to its store, for instance."""
    return [link for link in server.links if "number" in link.facts]


# --- connections of sessions ---------------------------------------------------------------------------------


def serve_connections(server: LinkServer) -> None:
    """Let workers find out about each other's connections."""
    running = 0

    async def ask(link: Link, session_ids: list[str]) -> ConnectionUses:
        try:
            uses: ConnectionUses = await link.call(HERE, session_ids, within=ANSWER_S)
        except ZcprotoError:
            return {}
        return uses

    async def of(link: Link, session_ids: list[str]) -> ConnectionUses:
        nonlocal running
        if running >= ASKED_AT_ONCE:
            raise ResourceExhausted("too many lists of sessions at once")
        running += 1
        try:
            others = [each for each in _workers(server) if each is not link]
            found = await asyncio.gather(*(ask(each, session_ids) for each in others))
        finally:
            running -= 1
        return {
            session_id: [*chain.from_iterable(uses.get(session_id, ()) for uses in found)]
            for session_id in session_ids
        }

    server.topics.calls[OF] = of


def connections_elsewhere(client: LinkClient, topics: Topics, state: ServerState) -> ConnectionsElsewhere:
    """Answer for a worker, and return what asks for the connections of the others."""

    async def list_calls(link: Link, user: str | None) -> tuple[list[dict[str, Any]], bool]:
        return await state.list_calls(user)

    async def decide_call(link: Link, call_id: str, kind: int, body: bytes, operator: str) -> dict[str, Any]:
        return await state.decide_call(call_id, *decode_answer(kind, body), operator)

    topics.calls |= {CALLS: list_calls, DECIDE: decide_call}

    async def here(link: Link, session_ids: list[str]) -> ConnectionUses:
        return {session_id: state.session_connections.uses(session_id) for session_id in session_ids}

    async def elsewhere(session_ids: Sequence[str]) -> ConnectionUses:
        try:
            uses: ConnectionUses = await client.call(OF, [*session_ids[-SESSIONS:]], within=ASK_S)
        except ZcprotoError:  # without a coordinator the list has what is here
            return {}
        return uses

    topics.calls[HERE] = here
    return elsewhere
