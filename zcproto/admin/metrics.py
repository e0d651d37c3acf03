"""A snapshot of a server as Prometheus metrics: which value goes to which metric of the table.

    GET /metrics  ->  take_snapshot  ->  readings  ->  observe/metrics.py renders them

Rules: everything happens at a scrape, in the loop. Nothing is counted here.
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from platform import python_version
from typing import Final

from zcproto.admin.parts import Parts
from zcproto.admin.snapshot import Snapshot, take_snapshot
from zcproto.alerts import Severity
from zcproto.alerts.service import SINKS
from zcproto.certs.notices import NoticeKind
from zcproto.errors import Code
from zcproto.observe import metric_table as table
from zcproto.observe.log import lost_lines
from zcproto.observe.metrics import Metrics, Reading
from zcproto.observe.process import ProcessMetrics
from zcproto.sessions import EndReason
from zcproto.sessions.health import HealthState
from zcproto.stores.pending import LIMIT as PENDING_LIMIT

OTHER: Final = "other"
END_LABELS: Final = {reason: reason.name.lower() for reason in EndReason} | {
    EndReason.REVOKED_ELSEWHERE: "elsewhere",
    EndReason.UNKNOWN: OTHER,
}
"""The label of each reason for the end of a session."""

_NO_SINK: Final = dict.fromkeys(("delivered", "failures", "lost", "waiting", "down"), 0)


def server_metrics(parts: Parts) -> Metrics:
    """Return all metrics of a process with one server."""
    return Metrics(lambda: readings(take_snapshot(parts)), ProcessMetrics())


def readings(snapshot: Snapshot) -> Iterator[Reading]:
    """Yield the value of each metric of a server."""
    for part in (
        _server,
        _limits,
        _connections,
        _tls,
        _certificates,
        _sessions,
        _logins,
        _requests,
        _errors,
        _store,
        _https,
        _alerts,
    ):
        yield from part(snapshot)


def _server(snapshot: Snapshot) -> Iterator[Reading]:
    yield table.BUILD_INFO.at(1, *_versions())
    yield table.DRAINING.at(snapshot.parts.state.draining)
    yield table.LOST_LOG_LINES.at(lost_lines())
    yield table.INCIDENTS.at(snapshot.counters.incidents)
    yield table.CONFIG_RELOADS.at(snapshot.counters.reloads, "applied")
    yield table.CONFIG_RELOADS.at(snapshot.counters.reloads_refused, "refused")
    yield table.LOOP_LAG.at(snapshot.loop_lag)


def _limits(snapshot: Snapshot) -> Iterator[Reading]:
    parts, connections = snapshot.parts, snapshot.connections
    config, limits, listener, registry = (
        parts.config,
        parts.config.limits,
        parts.listener,
        parts.state.registry,
    )
    rows: list[tuple[str, int, int | None]] = [
        ("limits.max_connections", limits.max_connections, listener.connections),
        ("limits.connections_per_address", limits.connections_per_address, listener.most_per_address),
        ("limits.max_streams", limits.max_streams, connections.most_in_flight),
        ("limits.max_frame_bytes", limits.max_frame_bytes, None),
        ("limits.max_frame_bytes_before_session", limits.max_frame_bytes_before_session, None),
        ("limits.max_depth", limits.max_depth, None),
        ("limits.write_buffer_bytes", limits.write_buffer_bytes, None),
        ("limits.login_failures", limits.login_failures, None),
        ("tls.max_handshakes", config.tls.max_handshakes, parts.acceptor.handshakes_in_progress),
        ("sessions.per_user", config.sessions.per_user, None),
        ("idempotency.per_user", config.idempotency.per_user, None),
        (
            "idempotency.max_bytes",
            config.idempotency.max_bytes,
            parts.state.idempotency.bytes_kept if parts.store is None else None,
        ),
        ("sessions", registry.settings.max_sessions, registry.kept),
        ("remembered_tokens", registry.settings.dead_limit, registry.tombstones),
    ]
    if parts.store is not None:
        rows.append(("pending_revocations", PENDING_LIMIT, snapshot.store_report["pending_revocations"]))
    for name, limit, use in rows:
        yield table.LIMIT.at(limit or float("inf"), name)  # 0 means unlimited
        if use is not None:
            yield table.LIMIT_USE.at(use, name)


def _connections(snapshot: Snapshot) -> Iterator[Reading]:
    parts, counters = snapshot.parts, snapshot.counters
    yield table.TCP_CONNECTIONS.at(parts.listener.connections)
    yield table.CONNECTIONS.at(len(parts.state.connections))
    yield table.CONNECTIONS_OPENED.at(counters.connections_opened)
    for reason, count in counters.connections_ended.items():
        yield table.CONNECTIONS_ENDED.at(count, reason)
    yield table.CONNECTIONS_REFUSED.at(counters.refused_full, "full")
    yield table.CONNECTIONS_REFUSED.at(counters.refused_per_address, "per_address")
    yield table.CONNECTIONS_REFUSED.at(counters.accept_failed, "exhausted")
    yield table.WRITE_PAUSES.at(counters.write_pauses)
    yield table.SLOW_READERS.at(snapshot.connections.slow_readers)
    yield table.EVENTS_SENT.at(counters.events)


def _tls(snapshot: Snapshot) -> Iterator[Reading]:
    acceptor = snapshot.parts.acceptor
    yield table.HANDSHAKES_COMPLETED.at(acceptor.handshakes_completed)
    yield table.HANDSHAKES_IN_PROGRESS.at(acceptor.handshakes_in_progress)
    for failure, count in acceptor.failures.items():
        yield table.TLS_FAILURES.at(count, failure.value)


def _certificates(snapshot: Snapshot) -> Iterator[Reading]:
    certificates = snapshot.parts.certificates
    for one in snapshot.certificates:
        labels = str(one.path), one.source.value, one.site[0] if one.site else "", one.key_type
        yield table.CERTIFICATE_EXPIRES.at(one.not_after.timestamp(), *labels)
        yield table.CERTIFICATE_LEFT.at(one.seconds_left, *labels)
    for kind in NoticeKind:
        yield table.CERTIFICATE_EVENTS.at(certificates.notices[kind], kind.value)
    if certificates.last_renewal is not None:
        yield table.RENEWED.at(certificates.last_renewal.at.timestamp())
        yield table.RENEWED_OK.at(certificates.last_renewal.ok)


def _sessions(snapshot: Snapshot) -> Iterator[Reading]:
    registry, binding = snapshot.parts.state.registry, snapshot.parts.state.binding
    yield table.SESSIONS.at(len(registry), "live")
    yield table.SESSIONS.at(registry.lapsed, "lapsed")
    yield table.SESSIONS_OPENED.at(registry.opened)
    yield table.SESSIONS_REFRESHED.at(registry.refreshed)
    yield table.SESSIONS_REVOKED.at(registry.revoked)
    yield table.REFRESH_REUSED.at(registry.refresh_reused)
    yield table.TOKENS_REFUSED.at(registry.checks_refused)
    ended = dict.fromkeys(END_LABELS.values(), 0)
    for reason, count in snapshot.counters.sessions_ended.items():
        ended[END_LABELS[reason]] += count
    for label, count in ended.items():
        yield table.SESSIONS_ENDED.at(count, label)
    yield table.NOT_ADMITTED.at(binding.refused_users, "user")
    yield table.NOT_ADMITTED.at(binding.refused_addresses, "address")
    yield table.NOT_ADMITTED.at(binding.refused_clients, "client")


def _logins(snapshot: Snapshot) -> Iterator[Reading]:
    login = snapshot.parts.login
    for scheme, count in login.accepted.items():
        yield table.LOGINS.at(count, scheme, "accepted")
    for scheme, count in login.refused.items():
        yield table.LOGINS.at(count, scheme, "refused")
    yield table.LOGINS_THROTTLED.at(login.throttled)


def _requests(snapshot: Snapshot) -> Iterator[Reading]:
    state = snapshot.parts.state
    yield table.REQUESTS.at(state.counters.requests)
    yield table.IN_FLIGHT.at(state.tasks.running)
    for name, method in state.methods.items():
        yield table.CALLS.at(method.calls, name)
        if any(method.durations.counts):
            yield table.DURATIONS.at(method.durations, name)
        if any(method.waits.counts):
            yield table.WAITS.at(method.waits, name)
    yield table.ONCE_RUNNING.at(state.idempotency.running)
    yield table.ONCE.at(state.idempotency.repeated, "repeated")
    yield table.ONCE.at(state.idempotency.conflicts, "conflict")
    yield table.ONCE.at(state.idempotency.lost, "lost")


def _errors(snapshot: Snapshot) -> Iterator[Reading]:
    counters = snapshot.counters
    errors = {code.name: 0 for code in Code}
    for code, count in counters.errors.items():
        name = _code_name(code)
        errors[name] = errors.get(name, 0) + count
    for (reason, code), count in counters.refused.items():
        yield table.FRAMES_REFUSED.at(count, reason, _code_name(code))
        errors[_code_name(code)] += count
    yield table.FRAMES_REFUSED.at(counters.dropped_stale, "stale_dropped", "")
    for name, count in errors.items():
        yield table.ERRORS.at(count, name)


def _store(snapshot: Snapshot) -> Iterator[Reading]:
    store, report = snapshot.parts.store, snapshot.store_report
    if store is None:
        return
    health, breaker = store.health, store.breaker
    outage_s = 0.0 if health.is_healthy else max(0.0, snapshot.parts.clock.now() - health.since)
    for state in HealthState:
        yield table.STORE_STATE.at(report["state"] == state.value, state.value)
    yield table.STORE_REFUSING.at(report["refusing"])
    yield table.STORE_OUTAGE.at(outage_s)
    yield table.STORE_OUTAGES.at(report["outages"])
    yield table.STORE_FAILURES.at(report["failures"])
    yield table.STORE_ASKING.at(breaker.in_flight)
    yield table.STORE_DURATION.at(breaker.durations)
    yield table.STORE_PENDING.at(report["pending_revocations"])
    yield table.STORE_CHANGES.at(report["changes"])
    yield table.STORE_LOOKUPS.at(report["lookups"] - report["misses"], "found")
    yield table.STORE_LOOKUPS.at(report["misses"], "missed")


def _https(snapshot: Snapshot) -> Iterator[Reading]:
    http = snapshot.parts.http
    if http is None:
        return
    counters = http.endpoint.counters
    yield table.HTTP_CONNECTIONS.at(len(http.connections))
    yield table.HTTP_OPENED.at(counters.connections_opened)
    yield table.HTTP_WRITE_TIMEOUTS.at(counters.write_timeouts)
    for status, count in counters.responses.items():
        yield table.HTTP_RESPONSES.at(count, str(int(status)))


def _alerts(snapshot: Snapshot) -> Iterator[Reading]:
    open_alerts = Counter(alert["severity"] for alert in snapshot.alerts["open"])
    for severity in Severity:
        yield table.ALERTS_OPEN.at(open_alerts[severity.word], severity.word)
    for kind, count in snapshot.parts.alerts.center.raised.items():
        yield table.ALERTS_RAISED.at(count, kind.value)
    sinks = {sink["name"]: sink for sink in snapshot.alerts["sinks"]}
    for name in SINKS:
        sink = sinks.get(name, _NO_SINK)
        yield table.ALERT_MESSAGES.at(sink["delivered"], name, "arrived")
        yield table.ALERT_MESSAGES.at(sink["failures"], name, "failed")
        yield table.ALERT_MESSAGES.at(sink["lost"], name, "lost")
        yield table.ALERT_MESSAGES_WAITING.at(sink["waiting"], name)
        yield table.ALERT_SINK_DOWN.at(sink["down"], name)


@cache
def _versions() -> tuple[str, str, str]:
    return version("zcproto"), python_version(), ssl.OPENSSL_VERSION


def _code_name(code: int) -> str:
    """Return the name of an error code. Applications may raise errors with codes of their own."""
    try:
        return Code(code).name
    except ValueError:
        return OTHER
