"""What a server's objects say, as readings of the table of metrics.

Everything here runs at a scrape, in the loop, and reads plain integers: nothing is counted here.
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
from zcproto.alerts import Severity
from zcproto.alerts.service import SINKS
from zcproto.certs.maintainer import CertificateStatus, NoticeKind
from zcproto.errors import Code
from zcproto.observe import metric_table as table
from zcproto.observe.histogram import Histogram
from zcproto.observe.log import lost_lines
from zcproto.observe.loop_lag import BOUNDS_MS
from zcproto.observe.metrics import Metrics, Reading
from zcproto.observe.process import ProcessMetrics
from zcproto.server.idempotency import IdempotencyCache
from zcproto.sessions import EndReason
from zcproto.sessions.health import State
from zcproto.stores.pending import LIMIT as PENDING_LIMIT

OTHER: Final = "other"
END_LABELS: Final = {reason: reason.name.lower() for reason in EndReason} | {
    EndReason.REVOKED_ELSEWHERE: "elsewhere",
    EndReason.UNKNOWN: OTHER,
}
"""The label of each reason for the end of a session."""

_MS: Final = 1_000


class ServerMetrics:
    """Reads the parts of one server."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def metrics(self) -> Metrics:
        """All of them, to be rendered."""
        return Metrics(
            self._of_the_server,
            self._of_limits,
            self._of_connections,
            self._of_tls,
            self._of_certificates,
            self._of_sessions,
            self._of_logins,
            self._of_requests,
            self._of_errors,
            self._of_the_store,
            self._of_https,
            self._of_alerts,
            ProcessMetrics(),
        )

    def _of_the_server(self) -> Iterator[Reading]:
        yield table.BUILD_INFO.at(1, *_versions())
        yield table.DRAINING.at(self.parts.state.draining)
        yield table.LOST_LOG_LINES.at(lost_lines())
        yield table.INCIDENTS.at(self.parts.state.counters.incidents)
        yield table.CONFIG_RELOADS.at(self.parts.state.counters.reloads, "applied")
        yield table.CONFIG_RELOADS.at(self.parts.state.counters.reloads_refused, "refused")
        lag = Histogram([bound / _MS for bound in BOUNDS_MS])
        lag.counts, lag.total = list(self.parts.loop_lag.counts), self.parts.loop_lag.total
        yield table.LOOP_LAG.at(lag)

    def _of_limits(self) -> Iterator[Reading]:
        parts, config, state = self.parts, self.parts.config, self.parts.state
        registry, settings = state.registry, state.registry.settings
        limits: list[tuple[str, int, int | None]] = [
            ("limits.max_connections", config.limits.max_connections, self.parts.listener.connections),
            (
                "limits.connections_per_address",
                config.limits.connections_per_address,
                self.parts.listener.most_of_one,
            ),
            ("limits.max_streams", config.limits.max_streams, self._most_in_flight()),
            ("limits.max_frame_bytes", config.limits.max_frame_bytes, None),
            (
                "limits.max_frame_bytes_before_session",
                config.limits.max_frame_bytes_before_session,
                None,
            ),
            ("limits.max_depth", config.limits.max_depth, None),
            ("limits.write_buffer_bytes", config.limits.write_buffer_bytes, None),
            ("limits.login_failures", config.limits.login_failures, None),
            ("tls.max_handshakes", config.tls.max_handshakes, self.parts.acceptor.handshakes_in_progress),
            ("sessions.per_user", config.sessions.per_user, None),
            ("idempotency.per_user", config.idempotency.per_user, None),
            (
                "idempotency.max_bytes",
                config.idempotency.max_bytes,
                state.idempotency.bytes_kept if parts.store is None else None,
            ),
            ("sessions", settings.max_sessions, registry.kept),
            ("remembered_tokens", settings.dead_limit, registry.tombstones),
        ]
        if parts.store is not None:
            limits.append(("pending_revocations", PENDING_LIMIT, len(parts.store.pending)))
        for name, limit, use in limits:
            yield table.LIMIT.at(limit or float("inf"), name)  # 0 is no limit
            if use is not None:
                yield table.LIMIT_USE.at(use, name)

    def _most_in_flight(self) -> int:
        return max((protocol.in_flight for protocol in self.parts.state.connections), default=0)

    def _of_connections(self) -> Iterator[Reading]:
        state, counters = self.parts.state, self.parts.state.counters
        yield table.TCP_CONNECTIONS.at(self.parts.listener.connections)
        yield table.CONNECTIONS.at(len(state.connections))
        yield table.CONNECTIONS_OPENED.at(counters.connections_opened)
        for reason, count in counters.connections_ended.items():
            yield table.CONNECTIONS_ENDED.at(count, reason)
        yield table.CONNECTIONS_REFUSED.at(counters.refused_full, "full")
        yield table.CONNECTIONS_REFUSED.at(counters.refused_per_address, "per_address")
        yield table.CONNECTIONS_REFUSED.at(counters.accept_failed, "exhausted")
        yield table.WRITE_PAUSES.at(counters.write_pauses)
        yield table.SLOW_READERS.at(sum(protocol.reads_too_slowly for protocol in state.connections))
        yield table.EVENTS_SENT.at(counters.events)

    def _of_tls(self) -> Iterator[Reading]:
        yield table.HANDSHAKES_COMPLETED.at(self.parts.acceptor.handshakes_completed)
        yield table.HANDSHAKES_IN_PROGRESS.at(self.parts.acceptor.handshakes_in_progress)
        for failure, count in self.parts.acceptor.failures.items():
            yield table.TLS_FAILURES.at(count, failure.value)

    def _of_certificates(self) -> Iterator[Reading]:
        keeper = self.parts.certificates
        for one in keeper.status():
            labels = _certificate_labels(one)
            yield table.CERTIFICATE_EXPIRES.at(one.not_after.timestamp(), *labels)
            yield table.CERTIFICATE_LEFT.at(one.seconds_left, *labels)
        for kind in NoticeKind:
            yield table.CERTIFICATE_EVENTS.at(keeper.notices[kind], kind.value)
        if keeper.last_renewal is not None:
            yield table.RENEWED.at(keeper.last_renewal.at.timestamp())
            yield table.RENEWED_OK.at(keeper.last_renewal.ok)

    def _of_sessions(self) -> Iterator[Reading]:
        registry, binding = self.parts.state.registry, self.parts.state.binding
        yield table.SESSIONS.at(len(registry), "live")
        yield table.SESSIONS.at(registry.lapsed, "lapsed")
        yield table.SESSIONS_OPENED.at(registry.opened)
        yield table.SESSIONS_REFRESHED.at(registry.refreshed)
        yield table.SESSIONS_REVOKED.at(registry.revoked)
        yield table.REFRESH_REUSED.at(registry.refresh_reused)
        yield table.TOKENS_REFUSED.at(registry.checks_refused)
        ended = dict.fromkeys(END_LABELS.values(), 0)
        for reason, count in self.parts.state.counters.sessions_ended.items():
            ended[END_LABELS[reason]] += count
        for label, count in ended.items():
            yield table.SESSIONS_ENDED.at(count, label)
        yield table.NOT_ADMITTED.at(binding.refused_users, "user")
        yield table.NOT_ADMITTED.at(binding.refused_addresses, "address")
        yield table.NOT_ADMITTED.at(binding.refused_clients, "client")

    def _of_logins(self) -> Iterator[Reading]:
        for result, counts in (
            ("accepted", self.parts.login.accepted),
            ("refused", self.parts.login.refused),
        ):
            for scheme, count in counts.items():
                yield table.LOGINS.at(count, scheme, result)
        yield table.LOGINS_THROTTLED.at(self.parts.login.throttled)

    def _of_requests(self) -> Iterator[Reading]:
        state = self.parts.state
        yield table.REQUESTS.at(state.counters.requests)
        yield table.IN_FLIGHT.at(state.tasks.running)
        for name, method in state.methods.items():
            yield table.CALLS.at(method.calls, name)
            if any(method.durations.counts):
                yield table.DURATIONS.at(method.durations, name)
            if any(method.waits.counts):
                yield table.WAITS.at(method.waits, name)
        yield from _idempotency(state.idempotency)

    def _of_errors(self) -> Iterator[Reading]:
        counters = self.parts.state.counters
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

    def _of_the_store(self) -> Iterator[Reading]:
        store = self.parts.store
        if store is None:
            return
        health = store.health
        for each in State:
            yield table.STORE_STATE.at(health.state is each, each.value)
        yield table.STORE_REFUSING.at(store.registry.closed)
        yield table.STORE_OUTAGE.at(
            0.0 if health.is_asked else max(0.0, self.parts.clock.now() - health.since)
        )
        yield table.STORE_OUTAGES.at(health.outages)
        yield table.STORE_FAILURES.at(health.failures)
        yield table.STORE_ASKING.at(store.breaker.in_flight)
        yield table.STORE_DURATION.at(store.breaker.durations)
        yield table.STORE_PENDING.at(len(store.pending))
        yield table.STORE_CHANGES.at(store.changes.count)
        known = self.parts.state.sessions.statistics()
        if "lookups" in known:
            yield table.STORE_LOOKUPS.at(known["lookups"] - known["misses"], "found")
            yield table.STORE_LOOKUPS.at(known["misses"], "missed")

    def _of_https(self) -> Iterator[Reading]:
        http = self.parts.http
        if http is None:
            return
        counters = http.endpoint.counters
        yield table.HTTP_CONNECTIONS.at(len(http.connections))
        yield table.HTTP_OPENED.at(counters.connections_opened)
        yield table.HTTP_WRITE_TIMEOUTS.at(counters.write_timeouts)
        for status, count in counters.responses.items():
            yield table.HTTP_RESPONSES.at(count, str(int(status)))

    def _of_alerts(self) -> Iterator[Reading]:
        center = self.parts.alerts.center
        open_now = Counter(alert.severity for alert in center.open_alerts())
        for severity in Severity:
            yield table.ALERTS_OPEN.at(open_now[severity], severity.word)
        for kind, count in center.raised.items():
            yield table.ALERTS_RAISED.at(count, kind.value)
        queues = {queue.name: queue for queue in self.parts.alerts.queues}
        for name in SINKS:
            queue = queues.get(name)
            results = (0, 0, 0) if queue is None else (queue.delivered, queue.failures, queue.lost)
            for result, count in zip(("arrived", "failed", "lost"), results, strict=True):
                yield table.ALERT_MESSAGES.at(count, name, result)
            yield table.ALERT_MESSAGES_WAITING.at(0 if queue is None else len(queue), name)
            yield table.ALERT_SINK_DOWN.at(queue is not None and queue.is_down, name)


@cache
def _versions() -> tuple[str, str, str]:
    return version("zcproto"), python_version(), ssl.OPENSSL_VERSION


def _code_name(code: int) -> str:
    """An application may raise errors with codes of its own."""
    try:
        return Code(code).name
    except ValueError:
        return OTHER


def _idempotency(cache: IdempotencyCache) -> Iterator[Reading]:
    yield table.ONCE_RUNNING.at(cache.running)
    yield table.ONCE.at(cache.repeated, "repeated")
    yield table.ONCE.at(cache.conflicts, "conflict")
    yield table.ONCE.at(cache.lost, "lost")


def _certificate_labels(one: CertificateStatus) -> tuple[str, str, str, str]:
    return str(one.path), one.source.value, one.site[0] if one.site else "", one.key_type
