"""A snapshot of a server as Prometheus metrics: which value goes to which metric.

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
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import SINKS
from zcproto.certs.notices import NoticeKind
from zcproto.config.checks import value_of
from zcproto.connection.refusals import CUT_REASONS
from zcproto.errors import Code
from zcproto.observe.log import lost_audit_lines, lost_lines
from zcproto.observe.metrics import Metrics, Reading
from zcproto.observe.process import process_readings
from zcproto.server.clients import RESULTS
from zcproto.server.pending import PENDING_RESULTS
from zcproto.server.request_limits import LIMIT_NAMES
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
    return Metrics(lambda: readings(take_snapshot(parts)), process_readings)


def readings(snapshot: Snapshot) -> Iterator[Reading]:
    """Yield the value of each metric of a server."""
    groups = (
        _server,
        _limits,
        _connections,
        _certificates,
        _sessions,
        _issuers,
        _requests,
        _streams,
        _runs,
        _calls,
        _errors,
        _store,
        _https,
        _alerts,
    )
    for group in groups:
        yield from group(snapshot)


def _server(snapshot: Snapshot) -> Iterator[Reading]:
    yield "zcproto_build_info", 1, *_versions()
    yield "zcproto_draining", snapshot.parts.state.draining
    yield "zcproto_log_lines_lost_total", lost_lines()
    yield "zcproto_audit_lines_lost_total", lost_audit_lines()
    yield "zcproto_incidents_total", snapshot.counters.incidents
    yield "zcproto_config_reloads_total", snapshot.counters.reloads, "applied"
    yield "zcproto_config_reloads_total", snapshot.counters.reloads_refused, "refused"
    for signal, result, count in snapshot.parts.state.telemetry_counts():
        yield "zcproto_telemetry_items_total", count, signal, result
    loop_lag = snapshot.parts.loop_lag
    yield "zcproto_loop_lag_seconds", loop_lag.lags
    for method, count in (loop_lag.holds.counts if loop_lag.holds is not None else {}).items():
        yield "zcproto_loop_held_total", count, method


_LIMITS: Final = (
    *("limits.max_connections", "limits.connections_per_address", "limits.failed_handshakes_per_network"),
    *("limits.partial_frame_bytes", "limits.partial_frame_bytes_per_user", "limits.max_streams"),
    *("limits.max_frame_bytes", "limits.max_frame_bytes_before_session"),
    *("limits.write_buffer_bytes", "limits.login_failures", "limits.logins_pending"),
    *("limits.requests_per_user", "limits.requests_per_address", "limits.public_requests_per_address"),
    *("limits.running_per_user", "limits.running_per_address"),
    *("limits.threads", "limits.waiting_for_thread"),
    *("streams.max_open", "streams.max_item_bytes", "streams.window_items", "streams.window_bytes"),
    *("streams.memory_bytes", "streams.durable_bytes", "streams.durable_per_user"),
    *("calls.max", "calls.per_user", "calls.total"),
    *("calls.pending_per_user", "calls.pending_total"),
    *("idempotency.running_per_user", "tls.max_handshakes", "tls.max_pending", "sessions.per_user"),
    *("idempotency.per_user", "idempotency.max_bytes"),
)
"""The settings that are limits."""


def _limits(snapshot: Snapshot) -> Iterator[Reading]:
    parts, state, requests = snapshot.parts, snapshot.parts.state, snapshot.parts.state.request_limits
    settings = state.registry.settings
    limits = {
        **{key: value_of(parts.config, key) for key in _LIMITS},
        "sessions": settings.max_sessions,
        "remembered_tokens": settings.dead_limit,
    }
    uses = {
        "limits.max_connections": parts.listener.all_connections,
        "limits.connections_per_address": parts.listener.most_per_address,
        "limits.partial_frame_bytes": state.partial_frames.bytes,
        "limits.partial_frame_bytes_per_user": state.partial_frames.most,
        "limits.max_streams": snapshot.most_in_flight,
        "limits.logins_pending": parts.login.all_pending,
        "limits.running_per_user": requests.most_running_per_user,
        "limits.running_per_address": requests.most_running_per_address,
        "limits.threads": state.threads.running,
        "limits.waiting_for_thread": state.threads.waiting,
        "streams.max_open": snapshot.most_streams_open,
        "streams.memory_bytes": state.items.held,
        "streams.durable_bytes": 0 if state.runs is None else state.runs.store.size,
        "calls.per_user": state.clients.most_in_flight,
        "calls.total": state.clients.in_flight,
        "calls.pending_per_user": state.pending.most,
        "calls.pending_total": state.pending.held,
        "tls.max_handshakes": parts.acceptor.handshakes_in_progress,
        "tls.max_pending": parts.acceptor.pending.places,
        "sessions": state.registry.kept,
        "remembered_tokens": state.registry.tombstones,
    }
    if parts.store is None:
        uses["idempotency.max_bytes"] = state.idempotency.bytes_kept
    else:
        limits["pending_revocations"] = PENDING_LIMIT
        uses["pending_revocations"] = snapshot.store_report["pending_revocations"]
    for name, limit in limits.items():
        yield "zcproto_limit", limit or float("inf"), name  # 0 means unlimited
        if name in uses:
            yield "zcproto_limit_use", uses[name], name


def _connections(snapshot: Snapshot) -> Iterator[Reading]:
    parts, counters = snapshot.parts, snapshot.counters
    yield "zcproto_tcp_connections", parts.listener.connections
    yield "zcproto_connections", len(parts.state.connections)
    yield "zcproto_connections_opened_total", counters.connections_opened
    for reason, count in counters.connections_ended.items():
        yield "zcproto_connections_ended_total", count, reason
    yield "zcproto_connections_refused_total", counters.refused_full, "full"
    yield "zcproto_connections_refused_total", counters.refused_per_address, "per_address"
    yield "zcproto_connections_refused_total", counters.refused_per_network, "per_network"
    yield "zcproto_connections_refused_total", counters.refused_flooding, "flooding"
    yield "zcproto_connections_refused_total", counters.accept_failed, "exhausted"
    yield "zcproto_write_pauses_total", counters.write_pauses
    yield "zcproto_slow_readers", snapshot.slow_readers
    yield "zcproto_events_sent_total", counters.events
    acceptor = parts.acceptor
    yield "zcproto_tls_handshakes_completed_total", acceptor.handshakes_completed
    for group, count in acceptor.groups.items():
        yield "zcproto_tls_handshakes_total", count, group
    yield "zcproto_tls_handshakes_in_progress", acceptor.handshakes_in_progress
    pending = acceptor.pending
    yield "zcproto_tls_handshakes_pending", pending.silent, "silent"
    yield "zcproto_tls_handshakes_pending", pending.waiting, "ready"
    for failure, count in acceptor.failures.items():
        yield "zcproto_tls_failures_total", count, failure.value


def _certificates(snapshot: Snapshot) -> Iterator[Reading]:
    certificates = snapshot.parts.certificates
    for one in snapshot.certificates:
        labels = str(one.path), one.source.value, one.site[0] if one.site else "", one.key_type
        yield "zcproto_certificate_expires_timestamp_seconds", one.not_after.timestamp(), *labels
        yield "zcproto_certificate_left_seconds", one.seconds_left, *labels
        if one.lifetime_s:
            yield "zcproto_certificate_lifetime_seconds", one.lifetime_s, *labels
    for kind in NoticeKind:
        yield "zcproto_certificate_events_total", certificates.notices[kind], kind.value
    if certificates.last_renewal is not None:
        yield "zcproto_certificate_last_renewal_timestamp_seconds", certificates.last_renewal.at.timestamp()
        yield "zcproto_certificate_last_renewal_success", certificates.last_renewal.ok


def _sessions(snapshot: Snapshot) -> Iterator[Reading]:
    registry, binding = snapshot.parts.state.registry, snapshot.parts.state.binding
    yield "zcproto_sessions", len(registry), "live"
    yield "zcproto_sessions", registry.lapsed, "lapsed"
    yield "zcproto_sessions_opened_total", registry.opened
    yield "zcproto_sessions_refreshed_total", registry.refreshed
    yield "zcproto_sessions_revoked_total", registry.revoked
    yield "zcproto_refresh_tokens_reused_total", registry.refresh_reused
    yield "zcproto_tokens_refused_total", registry.checks_refused
    ended = dict.fromkeys(END_LABELS.values(), 0)
    for reason, count in snapshot.counters.sessions_ended.items():
        ended[END_LABELS[reason]] += count
    for label, count in ended.items():
        yield "zcproto_sessions_ended_total", count, label
    yield "zcproto_sessions_not_admitted_total", binding.refused_users, "user"
    yield "zcproto_sessions_not_admitted_total", binding.refused_addresses, "address"
    yield "zcproto_sessions_not_admitted_total", binding.refused_clients, "client"
    login = snapshot.parts.login
    for result, counts in (
        ("accepted", login.accepted),
        ("refused", login.refused),
        ("failed", login.failed),
    ):
        for scheme, count in counts.items():
            yield "zcproto_logins_total", count, scheme, result
    yield "zcproto_logins_pending", login.pending
    yield "zcproto_logins_throttled_total", login.throttled


def _issuers(snapshot: Snapshot) -> Iterator[Reading]:
    jwt = snapshot.parts.jwt
    for issuer, trusted in ({} if jwt is None else jwt.issuers).items():
        keys = trusted.keys
        age = keys.age()
        if age is not None:
            yield "zcproto_oidc_keys_age_seconds", age, issuer
        yield "zcproto_oidc_keys_failing", keys.is_failing, issuer
        yield "zcproto_oidc_fetches_total", keys.fetched, issuer, "fetched"
        yield "zcproto_oidc_fetches_total", keys.failures, issuer, "failed"


def _requests(snapshot: Snapshot) -> Iterator[Reading]:
    state = snapshot.parts.state
    yield "zcproto_requests_total", state.counters.requests
    yield "zcproto_requests_in_flight", state.tasks.running
    for name, method in state.methods.items():
        yield "zcproto_method_calls_total", method.calls, name
        if any(method.durations.counts):
            yield "zcproto_method_duration_seconds", method.durations, name
        if any(method.waits.counts):
            yield "zcproto_method_wait_seconds", method.waits, name
        if method.topic is not None:
            yield "zcproto_topic_subscribers", method.topic.subscribers, name
            yield "zcproto_topic_events_total", method.topic.published, name
            yield "zcproto_topic_dropped_total", method.topic.dropped, name
            yield "zcproto_topic_ended_total", method.topic.ended, name
    if state.topics is not None:
        yield "zcproto_topics_away", int(state.topics.is_away)
        for reason, count in state.topics.undelivered().items():
            yield "zcproto_topic_undelivered_total", count, reason
    for name in LIMIT_NAMES:
        yield "zcproto_requests_limited_total", state.request_limits.refused[name], name
    yield "zcproto_thread_calls_refused_total", state.threads.refused
    yield "zcproto_idempotent_requests_running", state.idempotency.running
    yield "zcproto_idempotent_answers_total", state.idempotency.repeated, "repeated"
    yield "zcproto_idempotent_answers_total", state.idempotency.conflicts, "conflict"
    yield "zcproto_idempotent_answers_total", state.idempotency.lost, "lost"
    yield "zcproto_idempotent_answers_total", state.idempotency.refused, "refused"


def _streams(snapshot: Snapshot) -> Iterator[Reading]:
    counters, totals, methods = snapshot.counters, snapshot.counters.streams, snapshot.parts.state.methods
    streaming = {name for name, method in methods.items() if method.shape != "unary"}
    for name in sorted(streaming | counters.streams_open.keys()):
        yield "zcproto_streams_open", counters.streams_open[name], name
    yield "zcproto_streams_opened_total", totals.opened
    yield "zcproto_stream_items_total", totals.items_sent, "sent"
    yield "zcproto_stream_items_total", totals.items_received, "received"
    yield "zcproto_stream_item_bytes_total", totals.bytes_sent, "sent"
    yield "zcproto_stream_item_bytes_total", totals.bytes_received, "received"
    for reason in CUT_REASONS:
        yield "zcproto_streams_cut_total", counters.streams_cut[reason], reason


def _runs(snapshot: Snapshot) -> Iterator[Reading]:
    runs = snapshot.parts.state.runs
    if runs is None:
        return
    yield "zcproto_runs_running", len(runs)
    yield "zcproto_runs_attached", runs.attached
    yield "zcproto_runs_kept_bytes", runs.store.size
    yield "zcproto_run_items_total", runs.items
    for code in ("ok", "deleted", *(code.name.lower() for code in Code)):
        yield "zcproto_runs_ended_total", runs.ended[code], code
    yield "zcproto_runs_away", not runs.store.is_up
    yield "zcproto_runs_lost_total", runs.store.lost
    yield "zcproto_runs_repaired_total", runs.store.repaired


def _calls(snapshot: Snapshot) -> Iterator[Reading]:
    clients = snapshot.parts.state.clients
    yield "zcproto_client_handlers", len(clients)
    yield "zcproto_client_calls_in_flight", clients.in_flight
    elsewhere = snapshot.parts.state.remote_clients
    yield "zcproto_client_calls_elsewhere", 0 if elsewhere is None else elsewhere.in_flight
    for result in RESULTS:
        yield "zcproto_client_calls_total", clients.ended[result], result
    pending = snapshot.parts.state.pending
    yield "zcproto_pending_calls_waiting", len(pending)
    for result in PENDING_RESULTS:
        yield "zcproto_pending_calls_total", pending.ended[result], result
    yield "zcproto_client_answers_dropped_total", snapshot.counters.dropped_answers


def _errors(snapshot: Snapshot) -> Iterator[Reading]:
    counters = snapshot.counters
    errors = {code.name: 0 for code in Code}
    for code, count in counters.errors.items():
        name = _code_name(code)
        errors[name] = errors.get(name, 0) + count
    for (reason, code), count in counters.refused.items():
        yield "zcproto_frames_refused_total", count, reason, _code_name(code)
        errors[_code_name(code)] += count
    yield "zcproto_frames_refused_total", counters.dropped_stale, "stale_dropped", ""
    for name, count in errors.items():
        yield "zcproto_errors_total", count, name


def _store(snapshot: Snapshot) -> Iterator[Reading]:
    store, report = snapshot.parts.store, snapshot.store_report
    if store is None:
        return
    health, breaker = store.health, store.breaker
    outage_s = 0.0 if health.is_healthy else max(0.0, snapshot.parts.clock.now() - health.since)
    for state in HealthState:
        yield "zcproto_store_state", report["state"] == state.value, state.value
    yield "zcproto_store_refusing", report["refusing"]
    yield "zcproto_store_outage_seconds", outage_s
    yield "zcproto_store_outages_total", report["outages"]
    yield "zcproto_store_failures_total", report["failures"]
    yield "zcproto_store_operations_in_progress", breaker.in_flight
    yield "zcproto_store_operation_seconds", breaker.durations
    yield "zcproto_store_pending_revocations", report["pending_revocations"]
    yield "zcproto_store_changes_total", report["changes"]
    yield "zcproto_store_lookups_total", report["lookups"] - report["misses"], "found"
    yield "zcproto_store_lookups_total", report["misses"], "missed"


def _https(snapshot: Snapshot) -> Iterator[Reading]:
    if snapshot.parts.http is None:
        return
    endpoint = snapshot.parts.http.endpoint
    yield "zcproto_http_connections", len(endpoint.connections)
    yield "zcproto_http_connections_opened_total", endpoint.connections_opened
    yield "zcproto_http_write_timeouts_total", endpoint.write_timeouts
    for status, count in endpoint.responses.items():
        yield "zcproto_http_responses_total", count, str(int(status))


def _alerts(snapshot: Snapshot) -> Iterator[Reading]:
    kinds = {alert["kind"] for alert in snapshot.alerts["open"]}
    yield "zcproto_config_refused", AlertKind.CONFIG_REFUSED.value in kinds
    yield "zcproto_file_unreadable", AlertKind.FILE_UNREADABLE.value in kinds
    open_alerts = Counter(alert["severity"] for alert in snapshot.alerts["open"])
    for severity in Severity:
        yield "zcproto_alerts_open", open_alerts[severity.word], severity.word
    for kind, count in snapshot.parts.alerts.center.raised.items():
        yield "zcproto_alerts_raised_total", count, kind.value
    sinks = {sink["name"]: sink for sink in snapshot.alerts["sinks"]}
    for name in SINKS:
        sink = sinks.get(name, _NO_SINK)
        yield "zcproto_alert_messages_total", sink["delivered"], name, "arrived"
        yield "zcproto_alert_messages_total", sink["failures"], name, "failed"
        yield "zcproto_alert_messages_total", sink["lost"], name, "lost"
        yield "zcproto_alert_messages_waiting", sink["waiting"], name
        yield "zcproto_alert_sink_down", sink["down"], name


@cache
def _versions() -> tuple[str, str, str]:
    return version("zcproto"), python_version(), ssl.OPENSSL_VERSION


def _code_name(code: int) -> str:
    """Return the name of an error code. Applications may raise errors with codes of their own."""
    try:
        return Code(code).name
    except ValueError:
        return OTHER
