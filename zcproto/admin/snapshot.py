"""One reading of a running server, and the two reports that are made of it: the status and `server.stats`.

    server objects count  ->  take_snapshot(parts)  ->  status, server.stats, metrics.py, the page of https.py

What this file decides: what is read, and the names and units of both reports. Times are milliseconds since the Unix
epoch, durations seconds, memory bytes.

Rules:
- Nothing is counted here, and nothing is read before someone asks.
- A snapshot is for the turn of the loop in which it was taken: its maps and histograms are the server's own.
- No secret and no user's name is in it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final

from zcproto.admin.http_protocol import HttpCounters
from zcproto.admin.https import HttpSide
from zcproto.admin.parts import Parts
from zcproto.admin.traffic import Rates
from zcproto.alerts import AlertKind
from zcproto.app.app import Method
from zcproto.certs.checker import CertificateStatus
from zcproto.certs.manager import unix_ms
from zcproto.certs.notices import NoticeKind
from zcproto.certs.sources import Renewal
from zcproto.common.clock import MS_PER_SECOND
from zcproto.config import Config
from zcproto.observe.histogram import Histogram
from zcproto.observe.log import level
from zcproto.observe.loop_lag import BOUNDS_MS
from zcproto.observe.process import resident_bytes, used_cpu_s
from zcproto.server.listener import Listener
from zcproto.server.state import Counters, ServerState
from zcproto.stores.sync import StoreSync
from zcproto.tls.failure import TlsFailure

API: Final = 1
"""The version of the control socket's resources. It changes when a field changes its meaning."""

DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Connections:
    """Open connections. `tcp` includes those in their handshake."""

    tcp: int
    zcp: int
    most_per_address: int
    in_flight: int
    most_in_flight: int
    slow_readers: int


@dataclass(frozen=True, slots=True)
class Handshakes:
    completed: int
    in_progress: int
    failed: Mapping[TlsFailure, int]


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions in the registry. Those in `stored` include lapsed ones, `tombstones` are of ended ones."""

    live: int
    lapsed: int
    stored: int
    tombstones: int
    opened: int
    refreshed: int
    revoked: int
    refresh_reused: int
    tokens_refused: int
    refused_users: int
    refused_addresses: int
    refused_clients: int


@dataclass(frozen=True, slots=True)
class Store:
    """The session store, beside its own report. `operations` are in flight."""

    outage_s: float
    operations: int
    durations: Histogram


@dataclass(frozen=True, slots=True)
class Http:
    """The HTTPS side. The redirecting port has `redirect` counters, or None without one."""

    connections: int
    counters: HttpCounters
    redirect: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Process:
    cpu_s: float
    rss_bytes: int
    running_tasks: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of a server. `store_report` is the store's own report, `alerts` that of the alerts."""

    config: Config
    time: int
    started_at: int
    addresses: Sequence[tuple[str, int]]
    draining: bool
    counters: Counters
    connections: Connections
    handshakes: Handshakes
    sessions: Sessions
    max_sessions: int
    max_tombstones: int
    methods: Mapping[str, Method]
    idempotency: Mapping[str, int]
    idempotency_bytes: int
    logins_accepted: Mapping[str, int]
    logins_refused: Mapping[str, int]
    logins_throttled: int
    rates: Rates
    loop_lag: Histogram
    store_report: Mapping[str, Any]
    store: Store | None
    http: Http | None
    certificates: tuple[CertificateStatus, ...]
    certificate_notices: Mapping[NoticeKind, int]
    last_renewal: Renewal | None
    alerts: Mapping[str, Any]
    alerts_raised: Mapping[AlertKind, int]
    process: Process


def take_snapshot(parts: Parts) -> Snapshot:
    """Read a server. Call it in its loop."""
    state, acceptor, certificates = parts.state, parts.acceptor, parts.certificates
    registry, binding, settings = state.registry, state.binding, state.registry.settings
    loop_lag = Histogram([bound / MS_PER_SECOND for bound in BOUNDS_MS])
    loop_lag.counts, loop_lag.total = parts.loop_lag.counts, parts.loop_lag.total
    return Snapshot(
        config=parts.config,
        time=parts.clock.wall(),
        started_at=parts.started_at,
        addresses=parts.listener.addresses,
        draining=state.draining,
        counters=state.counters,
        connections=_connections(state, parts.listener),
        handshakes=Handshakes(
            acceptor.handshakes_completed, acceptor.handshakes_in_progress, acceptor.failures
        ),
        sessions=Sessions(
            live=len(registry),
            lapsed=registry.lapsed,
            stored=registry.kept,
            tombstones=registry.tombstones,
            opened=registry.opened,
            refreshed=registry.refreshed,
            revoked=registry.revoked,
            refresh_reused=registry.refresh_reused,
            tokens_refused=registry.checks_refused,
            refused_users=binding.refused_users,
            refused_addresses=binding.refused_addresses,
            refused_clients=binding.refused_clients,
        ),
        max_sessions=settings.max_sessions,
        max_tombstones=settings.dead_limit,
        methods=state.methods,
        idempotency=state.idempotency.counts,
        idempotency_bytes=state.idempotency.bytes_kept,
        logins_accepted=parts.login.accepted,
        logins_refused=parts.login.refused,
        logins_throttled=parts.login.throttled,
        rates=parts.traffic.rates(),
        loop_lag=loop_lag,
        store_report=state.sessions.statistics(),
        store=None if parts.store is None else _store(parts.store, parts.clock.now()),
        http=None if parts.http is None else _http(parts.http),
        certificates=certificates.status(),
        certificate_notices=certificates.notices,
        last_renewal=certificates.last_renewal,
        alerts=parts.alerts.report(),
        alerts_raised=parts.alerts.center.raised,
        process=Process(used_cpu_s(), resident_bytes(), state.tasks.running),
    )


def _connections(state: ServerState, listener: Listener) -> Connections:
    in_flight = most_in_flight = slow_readers = 0
    for protocol in state.connections:
        in_flight += protocol.in_flight
        most_in_flight = max(most_in_flight, protocol.in_flight)
        slow_readers += protocol.is_slow_reader
    return Connections(
        tcp=listener.connections,
        zcp=len(state.connections),
        most_per_address=listener.most_per_address,
        in_flight=in_flight,
        most_in_flight=most_in_flight,
        slow_readers=slow_readers,
    )


def _store(sync: StoreSync, now: float) -> Store:
    outage_s = 0.0 if sync.health.is_healthy else max(0.0, now - sync.health.since)
    return Store(outage_s, sync.breaker.in_flight, sync.breaker.durations)


def _http(side: HttpSide) -> Http:
    redirect = side.redirect
    return Http(
        connections=len(side.endpoint.connections),
        counters=side.endpoint.counters,
        redirect=None
        if redirect is None
        else {
            "connections": len(redirect.open),
            "refused": redirect.refused,
            "responses": _by_status(redirect.endpoint.counters),
        },
    )


def _by_status(counters: HttpCounters) -> dict[str, int]:
    return {str(status): count for status, count in sorted(counters.responses.items())}


def status_report(snapshot: Snapshot) -> dict[str, Any]:
    """Return the status of the control API, which `zcproto status` and the status page show."""
    counters, connections, sessions = snapshot.counters, snapshot.connections, snapshot.sessions
    return {
        "api": API,
        "version": version("zcproto"),
        "pid": os.getpid(),
        "time": snapshot.time,
        "started_at": snapshot.started_at,
        "uptime_s": max(0, snapshot.time - snapshot.started_at) // MS_PER_SECOND,
        "addresses": [
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in snapshot.addresses
        ],
        "draining": snapshot.draining,
        "log_level": level(),
        "connections": {
            "tcp": connections.tcp,
            "zcp": connections.zcp,
            "http": 0 if snapshot.http is None else snapshot.http.connections,
            "limit": snapshot.config.limits.max_connections,
            "refused": {
                "full": counters.refused_full,
                "per_address": counters.refused_per_address,
                "exhausted": counters.accept_failed,
            },
        },
        "sessions": {
            "live": sessions.live,
            "lapsed": sessions.lapsed,
            "opened": sessions.opened,
            "revoked": sessions.revoked,
        },
        "requests": {
            "total": counters.requests,
            "in_flight": connections.in_flight,
            "incidents": counters.incidents,
        },
        "traffic": asdict(snapshot.rates),
        "handshakes": {
            "completed": snapshot.handshakes.completed,
            "in_progress": snapshot.handshakes.in_progress,
            "failed": _by_cause(snapshot.handshakes),
        },
        "certificates": certificate_report(snapshot.certificates),
        "store": {"url": snapshot.config.store.url.partition(":")[0], **snapshot.store_report},
        "alerts": snapshot.alerts,
        "process": {"cpu_s": snapshot.process.cpu_s, "rss_bytes": snapshot.process.rss_bytes},
    }


def certificate_report(certificates: Iterable[CertificateStatus]) -> list[dict[str, Any]]:
    return [
        {
            "file": one.path.name,
            "source": one.source.value,
            "names": list(one.names),
            "site": list(one.site),
            "key_type": one.key_type,
            "pin": one.pin,
            "sha256": one.sha256.hex(),
            "not_after": unix_ms(one.not_after),
            "days_left": int(one.seconds_left // DAY_S),
            "seconds_left": round(one.seconds_left),
        }
        for one in certificates
    ]


def stats_report(snapshot: Snapshot, longest_pause_s: float, longest_own_pause_s: float) -> dict[str, Any]:
    """Return the result of `server.stats`. The two pauses are the longest since the previous call."""
    counters, sessions, process = snapshot.counters, snapshot.sessions, snapshot.process
    http, last = snapshot.http, snapshot.last_renewal
    return {
        "connections": snapshot.connections.zcp,
        "tcp_connections": snapshot.connections.tcp,
        "http": None
        if http is None
        else {
            "connections": http.connections,
            "connections_opened": http.counters.connections_opened,
            "responses": _by_status(http.counters),
            "write_timeouts": http.counters.write_timeouts,
            "redirect": http.redirect,
        },
        "sessions": sessions.live,
        "requests": counters.requests,
        "running": process.running_tasks,
        "tasks": len(asyncio.all_tasks()),
        "errors": {str(code): count for code, count in counters.errors.items()},
        "connections_opened": counters.connections_opened,
        "connections_ended": counters.connections_ended,
        "refused_per_address": counters.refused_per_address,
        "refused_full": counters.refused_full,
        "accept_failed": counters.accept_failed,
        "dropped_stale": counters.dropped_stale,
        "refused_users": sessions.refused_users,
        "refused_addresses": sessions.refused_addresses,
        "refused_clients": sessions.refused_clients,
        "idempotency": snapshot.idempotency,
        "store": snapshot.store_report,
        "handshakes_completed": snapshot.handshakes.completed,
        "handshakes_in_progress": snapshot.handshakes.in_progress,
        "tls_failures": _by_cause(snapshot.handshakes),
        "cpu_s": process.cpu_s,
        "rss_bytes": process.rss_bytes,
        "longest_pause_s": longest_pause_s,
        "longest_own_pause_s": longest_own_pause_s,
        "pauses": snapshot.loop_lag.counts,
        "certificates": [
            {
                "file": one.path.name,
                "source": one.source.value,
                "site": list(one.site),
                "key_type": one.key_type,
                "pin": one.pin,
                "seconds_left": round(one.seconds_left),
            }
            for one in snapshot.certificates
        ],
        "certificate_notices": {
            kind.value: count for kind, count in snapshot.certificate_notices.items() if count
        },
        "last_renewal": None if last is None else {"at": round(last.at.timestamp()), "ok": last.ok},
    }


def stats_method(parts: Parts) -> Method:
    """Return the protocol method `server.stats`."""

    def server_stats() -> dict[str, Any]:
        """Connections, sessions, requests, CPU, memory and loop pauses."""
        return read_stats(parts)

    return Method("server.stats", server_stats, operator=True)


def read_stats(parts: Parts) -> dict[str, Any]:
    """Return the result of `server.stats`, and start the interval of the longest pauses again."""
    lag = parts.loop_lag
    return stats_report(take_snapshot(parts), lag.take_longest(), lag.take_longest_own())


def _by_cause(handshakes: Handshakes) -> dict[str, int]:
    return {cause.value: count for cause, count in handshakes.failed.items() if count}
