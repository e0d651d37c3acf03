"""One reading of a running server, and the reports that are made of it: the status, `server.stats`, readiness.

    server objects count  ->  take_snapshot(parts)  ->  status, server.stats, metrics.py, the page of https.py

Decides: what is read, and the names and units of the reports; those of several processes are added up in
zcproto/workers. Times are milliseconds since the Unix epoch, durations seconds, memory bytes.

Rules:
- Nothing is counted here, and nothing is read before someone asks.
- A snapshot is for the turn of the loop in which it was taken: its maps and histograms are the server's own.
- No secret and no user's name is in it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from zcproto.admin.http_protocol import HttpEndpoint
from zcproto.admin.https import HttpSide
from zcproto.admin.parts import Parts
from zcproto.admin.traffic import rates_of
from zcproto.app.app import Method
from zcproto.certs.checker import CertificateStatus
from zcproto.certs.manager import unix_ms
from zcproto.common.clock import MS_PER_SECOND, used_cpu_s
from zcproto.common.roles import OPERATORS
from zcproto.observe.log import level
from zcproto.observe.process import resident_bytes
from zcproto.server.state import Counters, Runs
from zcproto.sessions.health import HealthState
from zcproto.tls.failure import TlsFailure

API: Final = 1
"""The version of the control socket's resources. It changes when a field changes its meaning."""

DAY_S: Final = 86_400

_HEALTHY: Final = HealthState.HEALTHY.value
_STORE_OUT: Final = "store: it does not answer; known sessions continue, none can be opened"

_STATS_CERTIFICATE_KEYS: Final = ("file", "source", "site", "key_type", "pin", "seconds_left")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of a server: what had to be computed, beside the counters that its `parts` keep.

    `in_flight` and `slow_readers` are sums over the connections of zcp/1, `most_in_flight` and `most_streams_open`
    the maximum.
    `window`, `store_report` and `alerts` are reports of the traffic, the session store and the alerts.
    """

    parts: Parts
    time: int
    in_flight: int
    most_in_flight: int
    most_streams_open: int
    slow_readers: int
    window: Mapping[str, Any]
    store_report: Mapping[str, Any]
    certificates: tuple[CertificateStatus, ...]
    alerts: Mapping[str, Any]
    cpu_s: float
    rss_bytes: int

    @property
    def counters(self) -> Counters:
        return self.parts.state.counters


def take_snapshot(parts: Parts) -> Snapshot:
    """Read a server. Call it in its loop."""
    connections = parts.state.connections
    in_flight = [protocol.in_flight for protocol in connections]
    return Snapshot(
        parts=parts,
        time=parts.clock.wall(),
        in_flight=sum(in_flight),
        most_in_flight=max(in_flight, default=0),
        most_streams_open=max((protocol.streams_open for protocol in connections), default=0),
        slow_readers=sum(protocol.is_slow_reader for protocol in connections),
        window=parts.traffic.window(),
        store_report=parts.state.sessions.statistics(),
        certificates=parts.certificates.status(),
        alerts=parts.alerts.report(),
        cpu_s=used_cpu_s(),
        rss_bytes=resident_bytes(),
    )


def status_report(snapshot: Snapshot) -> dict[str, Any]:
    """Return the status of the control API, which `zcproto status` and the status page show."""
    return finish_status(status_figures(snapshot))


def finish_status(figures: Mapping[str, Any], workers: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the status of some figures: with percentiles in place of counts, and with the lines of workers."""
    return {**figures, "traffic": rates_of(figures["traffic"]), "workers": list(workers)}


def status_figures(snapshot: Snapshot) -> dict[str, Any]:
    """Return the figures of a status, which `merge` can add to those of other processes."""
    parts, counters = snapshot.parts, snapshot.counters
    state, acceptor = parts.state, parts.acceptor
    return {
        "api": API,
        "version": version("zcproto"),
        "pid": os.getpid(),
        "time": snapshot.time,
        "started_at": parts.started_at,
        "uptime_s": max(0, snapshot.time - parts.started_at) // MS_PER_SECOND,
        "addresses": [
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in parts.listener.addresses
        ],
        "draining": state.draining,
        "log_level": level(),
        "connections": {
            "tcp": parts.listener.connections,
            "zcp": len(state.connections),
            "http": 0 if parts.http is None else len(parts.http.endpoint.connections),
            "limit": parts.config.limits.max_connections,
            "refused": {
                "full": counters.refused_full,
                "per_address": counters.refused_per_address,
                "per_network": counters.refused_per_network,
                "flooding": counters.refused_flooding,
                "exhausted": counters.accept_failed,
            },
        },
        "sessions": {
            "live": len(state.registry),
            "lapsed": state.registry.lapsed,
            "opened": state.registry.opened,
            "revoked": state.registry.revoked,
        },
        "requests": {
            "total": counters.requests,
            "in_flight": snapshot.in_flight,
            "incidents": counters.incidents,
        },
        "streams": {
            "open": counters.streams_open.total(),
            "opened": counters.streams.opened,
            "cut": sum(counters.streams_cut.values()),
            "items_sent": counters.streams.items_sent,
            "items_received": counters.streams.items_received,
            "bytes_sent": counters.streams.bytes_sent,
            "bytes_received": counters.streams.bytes_received,
            "waiting_bytes": state.items.held,
        },
        "runs": run_report(state.runs),
        "calls": {
            "handlers": len(state.clients),
            "in_flight": state.clients.in_flight,
            "elsewhere": 0 if state.remote_clients is None else state.remote_clients.in_flight,
            "ended": dict(state.clients.ended),
            "pending": len(state.pending),
        },
        "traffic": snapshot.window,
        "handshakes": {
            "completed": acceptor.handshakes_completed,
            "groups": dict(acceptor.groups),
            "in_progress": acceptor.handshakes_in_progress,
            "pending": acceptor.pending.places,
            "failed": _by_cause(acceptor.failures),
        },
        "certificates": certificate_report(snapshot.certificates),
        "store": {"url": parts.config.store.url.partition(":")[0], **snapshot.store_report},
        "alerts": snapshot.alerts,
        "process": {
            "cpu_s": snapshot.cpu_s,
            "rss_bytes": snapshot.rss_bytes,
            "loop_lag_s": round(parts.traffic.longest_lag(), 6),
        },
    }


def run_report(runs: Runs | None) -> dict[str, int]:
    """Return the figures of durable runs; zeros without durable methods."""
    if runs is None:
        return dict.fromkeys(("running", "attached", "ended", "lost", "kept_bytes", "away"), 0)
    return {
        "running": len(runs),
        "attached": runs.attached,
        "ended": runs.ended.total(),
        "lost": runs.store.lost,
        "kept_bytes": runs.store.size,
        "away": int(not runs.store.is_up),
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


def store_readiness(parts: Parts) -> dict[str, Any]:
    """Return what a process that has the store for others adds to their readiness: without it none is ready."""
    store = str(parts.state.sessions.statistics()["state"])
    is_healthy = store == _HEALTHY
    return {
        "has_store": is_healthy,
        "reasons": [] if is_healthy else [_STORE_OUT],
        "checks": {"store": store},
    }


def readiness_report(parts: Parts) -> dict[str, Any]:
    """Return as JSON fields whether new clients should connect, and the checks with the reasons against it.

    Cheap, since anyone may ask: no snapshot is taken.
    """
    state, now = parts.state, parts.certificates.now()
    store = str(state.sessions.statistics()["state"])
    lives = [
        (pair.key_type, round((pair.not_after - now).total_seconds())) for pair in parts.certificate_pairs
    ]
    reasons = []
    if state.draining:
        reasons.append("draining: the server is stopping")
    if state.registry.closed:
        reasons.append("store: sessions cannot be checked, and every token is refused")
    elif store != _HEALTHY:
        reasons.append(_STORE_OUT)
    if not lives or min(seconds for _, seconds in lives) <= 0:
        reasons.append("certificate: a serving certificate has expired")
    return {
        "ready": not reasons,
        "reasons": reasons,
        "warnings": [f"store: {problem}" for problem in parts.store.problems] if parts.store else [],
        "checks": {
            "draining": state.draining,
            "store": store,
            "certificates": [{"key_type": key_type, "seconds_left": seconds} for key_type, seconds in lives],
        },
    }


def read_stats(parts: Parts) -> dict[str, Any]:
    """Return the result of `server.stats`, and start the interval of the longest pauses again."""
    return stats_figures(parts, take_snapshot(parts), take=True)


def stats_figures(parts: Parts, snapshot: Snapshot, take: bool) -> dict[str, Any]:
    """Return the figures of `server.stats`. `take` starts the interval of the longest pauses again."""
    state, acceptor, loop_lag = parts.state, parts.acceptor, parts.loop_lag
    counters = state.counters
    last = parts.certificates.last_renewal
    return {
        "connections": len(state.connections),
        "tcp_connections": parts.listener.connections,
        "http": None if parts.http is None else _http_stats(parts.http),
        "sessions": len(state.registry),
        "requests": counters.requests,
        "items_sent": counters.streams.items_sent,
        "running": state.tasks.running,
        "tasks": len(asyncio.all_tasks()),
        "errors": {str(code): count for code, count in counters.errors.items()},
        "connections_opened": counters.connections_opened,
        "connections_ended": dict(counters.connections_ended),
        "refused_per_address": counters.refused_per_address,
        "refused_per_network": counters.refused_per_network,
        "refused_flooding": counters.refused_flooding,
        "refused_full": counters.refused_full,
        "accept_failed": counters.accept_failed,
        "dropped_stale": counters.dropped_stale,
        "refused_users": state.binding.refused_users,
        "refused_addresses": state.binding.refused_addresses,
        "refused_clients": state.binding.refused_clients,
        "idempotency": state.idempotency.counts,
        "store": snapshot.store_report,
        "handshakes_completed": acceptor.handshakes_completed,
        "handshakes_in_progress": acceptor.handshakes_in_progress,
        "handshakes_pending": acceptor.pending.places,
        "tls_failures": _by_cause(acceptor.failures),
        "cpu_s": snapshot.cpu_s,
        "rss_bytes": snapshot.rss_bytes,
        "longest_pause_s": loop_lag.take_longest() if take else loop_lag.longest,
        "longest_own_pause_s": loop_lag.take_longest_own() if take else loop_lag.longest_own,
        "pauses": loop_lag.lags.counts,
        "certificates": [
            {key: one[key] for key in _STATS_CERTIFICATE_KEYS}
            for one in certificate_report(snapshot.certificates)
        ],
        "certificate_notices": {
            kind.value: count for kind, count in parts.certificates.notices.items() if count
        },
        "last_renewal": None if last is None else {"at": round(last.at.timestamp()), "ok": last.ok},
    }


# --- of this process, or of the whole server if it has several ------------------------------------------------


async def read_status(parts: Parts) -> dict[str, Any]:
    """Return the status of the server. Raises Unavailable."""
    return status_report(take_snapshot(parts)) if parts.fleet is None else await parts.fleet.status()


async def read_readiness(parts: Parts) -> Mapping[str, Any]:
    """Return whether new clients should connect to the server. Raises Unavailable."""
    return readiness_report(parts) if parts.fleet is None else await parts.fleet.readiness()


def stats_method(parts: Parts) -> Method:
    """Return the protocol method `server.stats`."""

    def server_stats() -> dict[str, Any]:
        """Connections, sessions, requests, CPU, memory and loop pauses."""
        return read_stats(parts)

    async def fleet_stats() -> dict[str, Any]:
        assert parts.fleet is not None
        return await parts.fleet.stats()

    fleet_stats.__doc__ = server_stats.__doc__
    return Method("server.stats", server_stats if parts.fleet is None else fleet_stats, roles=OPERATORS)


def _http_stats(side: HttpSide) -> dict[str, Any]:
    endpoint, redirect = side.endpoint, side.redirect
    return {
        "connections": len(endpoint.connections),
        "connections_opened": endpoint.connections_opened,
        "responses": _by_status(endpoint),
        "write_timeouts": endpoint.write_timeouts,
        "redirect": redirect
        and {
            "connections": len(redirect.open),
            "refused": redirect.refused,
            "responses": _by_status(redirect.endpoint),
        },
    }


def _by_status(endpoint: HttpEndpoint) -> dict[str, int]:
    return {str(status): count for status, count in sorted(endpoint.responses.items())}


def _by_cause(failures: Mapping[TlsFailure, int]) -> dict[str, int]:
    return {cause.value: count for cause, count in failures.items() if count}
