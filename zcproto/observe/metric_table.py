"""Define every metric and its meaning: the source of docs/reference/metrics.md.

Must not know: where the values come from.
"""

from __future__ import annotations

from typing import Final

from zcproto.observe.metrics import Metric, MetricKind

TABLE: Final[dict[str, tuple[Metric, ...]]] = {}
"""The metrics of each part, in the order of the page. Filled below."""

_part: list[Metric] = []


def _counter(name: str, help: str, *labels: str) -> Metric:
    return _add(Metric(name, MetricKind.COUNTER, help, labels))


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return _add(Metric(name, MetricKind.GAUGE, help, labels))


def _histogram(name: str, help: str, *labels: str) -> Metric:
    return _add(Metric(name, MetricKind.HISTOGRAM, help, labels))


def _add(metric: Metric) -> Metric:
    _part.append(metric)
    return metric


def _end_of_part(title: str) -> None:
    TABLE[title] = tuple(_part)
    _part.clear()


BUILD_INFO = _gauge(
    "zcproto_build_info",
    "Always 1; the labels are the versions of zcproto, Python and OpenSSL.",
    *("version", "python", "openssl"),
)
DRAINING = _gauge("zcproto_draining", "1 while the server drains, else 0.")
LIMIT = _gauge(
    "zcproto_limit",
    "Value of a limit. `limit` is the name of its setting, if it has one.",
    "limit",
)
LIMIT_USE = _gauge(
    "zcproto_limit_use",
    "Current use of a limit. For limits per connection or address: the highest use of any of them.",
    "limit",
)
LOST_LOG_LINES = _counter(
    "zcproto_log_lines_lost_total",
    "Log lines that could not be written. Lines suppressed by a limit are counted in the log itself.",
)
INCIDENTS = _counter(
    "zcproto_incidents_total",
    "Unexpected exceptions of methods or the server. Each is logged with its stack and the caller's incident id.",
)
CONFIG_RELOADS = _counter(
    "zcproto_config_reloads_total",
    "Reloads of the configuration. A refused one was invalid and changed nothing.",
    "result",
)
_end_of_part("The server")

TCP_CONNECTIONS = _gauge(
    "zcproto_tcp_connections", "Open TCP connections, including those in their handshake."
)
CONNECTIONS = _gauge("zcproto_connections", "Open ZCP/1 connections.")
CONNECTIONS_OPENED = _counter("zcproto_connections_opened_total", "ZCP/1 connections opened.")
CONNECTIONS_ENDED = _counter(
    "zcproto_connections_ended_total",
    "ZCP/1 connections ended. `reason`: a rule of the server, a protocol code, or a cause of"
    " zcproto_tls_failures_total.",
    "reason",
)
CONNECTIONS_REFUSED = _counter(
    "zcproto_connections_refused_total",
    "Connections refused at accept. `reason`: full (limits.max_connections), per_address"
    " (limits.connections_per_address), exhausted (no descriptor or memory left; retried).",
    "reason",
)
WRITE_PAUSES = _counter(
    "zcproto_write_pauses_total", "Times that reading from a peer was paused because it reads too slowly."
)
SLOW_READERS = _gauge("zcproto_slow_readers", "Connections paused until their peer reads.")
EVENTS_SENT = _counter(
    "zcproto_events_sent_total", "Events sent by methods and the server, except session.expiring."
)
_end_of_part("Connections")

HANDSHAKES_COMPLETED = _counter("zcproto_tls_handshakes_completed_total", "TLS handshakes completed.")
HANDSHAKES_IN_PROGRESS = _gauge("zcproto_tls_handshakes_in_progress", "TLS handshakes in progress.")
TLS_FAILURES = _counter(
    "zcproto_tls_failures_total",
    "TLS handshakes and connections that failed.",
    "cause",
)
_end_of_part("TLS")

CERTIFICATE_EXPIRES = _gauge(
    "zcproto_certificate_expires_timestamp_seconds",
    "Expiry of a certificate in use, in seconds since the Unix epoch. `source`: own (managed), files, authority"
    " (the CA of managed certificates), client_authority.",
    *("path", "source", "site", "key_type"),
)
CERTIFICATE_LEFT = _gauge(
    "zcproto_certificate_left_seconds",
    "Remaining validity of a certificate in use by the server's clock; negative if it has expired.",
    *("path", "source", "site", "key_type"),
)
CERTIFICATE_EVENTS = _counter(
    "zcproto_certificate_events_total",
    "Certificate events: loaded, renewed, invalid files, expiry and others.",
    "event",
)
RENEWED = _gauge(
    "zcproto_certificate_last_renewal_timestamp_seconds",
    "Time of the last renewal of managed certificates, successful or not, in seconds since the Unix epoch. Missing"
    " before the first one since the start.",
)
RENEWED_OK = _gauge(
    "zcproto_certificate_last_renewal_success",
    "1 if the last renewal succeeded, 0 if it failed. Missing before the first one since the start.",
)
_end_of_part("Certificates")

SESSIONS = _gauge(
    "zcproto_sessions",
    "Sessions known to this server. `state`: live, or lapsed (the token has expired; a refresh revives it).",
    "state",
)
SESSIONS_OPENED = _counter("zcproto_sessions_opened_total", "Sessions opened here.")
SESSIONS_REFRESHED = _counter("zcproto_sessions_refreshed_total", "Refreshes of sessions.")
SESSIONS_ENDED = _counter(
    "zcproto_sessions_ended_total",
    "Live sessions that ended or whose token expired. `reason`: expired, idle, closed (by the client), by_user,"
    " by_operator, user_changed, device_removed, replaced, refresh_reused, elsewhere (by another server), other.",
    "reason",
)
SESSIONS_REVOKED = _counter("zcproto_sessions_revoked_total", "Sessions revoked or closed, live and lapsed.")
REFRESH_REUSED = _counter(
    "zcproto_refresh_tokens_reused_total",
    "Spent refresh tokens that were reused and ended their session: the token may be stolen.",
)
TOKENS_REFUSED = _counter("zcproto_tokens_refused_total", "Invalid tokens refused.")
NOT_ADMITTED = _counter(
    "zcproto_sessions_not_admitted_total",
    "Valid tokens refused by session binding. `reason`: user (removed), address, client.",
    "reason",
)
_end_of_part("Sessions")

LOGINS = _counter(
    "zcproto_logins_total",
    "Logins decided. `scheme`: the login scheme, or session.attach; `result`: accepted, refused.",
    *("scheme", "result"),
)
LOGINS_THROTTLED = _counter(
    "zcproto_logins_throttled_total", "Logins refused without a check after too many failures."
)
_end_of_part("Logins")

REQUESTS = _counter(
    "zcproto_requests_total", "Requests dispatched to a method, including unknown and forbidden methods."
)
CALLS = _counter("zcproto_method_calls_total", "Calls of each method.", "method")
IN_FLIGHT = _gauge(
    "zcproto_requests_in_flight", "Calls in flight that wait for something, over all connections."
)
DURATIONS = _histogram(
    "zcproto_method_duration_seconds",
    "Loop time of a call, up to its answer or first await. Sampled from one read every 16 ms.",
    "method",
)
WAITS = _histogram(
    "zcproto_method_wait_seconds",
    "Duration of calls that awaited something, from the first await to the end. Measured for all of them.",
    "method",
)
ERRORS = _counter("zcproto_errors_total", "Error frames sent, by the name of their code.", "code")
FRAMES_REFUSED = _counter(
    "zcproto_frames_refused_total",
    "Frames refused before they became a call. `reason`: token, stale, stale_dropped (without answer; counted when"
    " the connection ends), malformed, deadline (already passed), key_not_proved, max_streams, draining,"
    " too_large_without_session.",
    *("reason", "code"),
)
ONCE_RUNNING = _gauge(
    "zcproto_idempotent_requests_running", "Requests with an idempotency key that are running."
)
ONCE = _counter(
    "zcproto_idempotent_answers_total",
    "Requests with an idempotency key that were not run. `result`: repeated (answered with the first result),"
    " conflict (the key was used for another request), lost (the result of the first request is unknown).",
    "result",
)
_end_of_part("Requests")

STORE_STATE = _gauge(
    "zcproto_store_state",
    "1 for the current state of the session store, 0 for the others: healthy; degraded (unavailable and not used);"
    " recovering (a probe is running).",
    "state",
)
STORE_REFUSING = _gauge(
    "zcproto_store_refusing",
    "1 while every token is refused because an outage exceeds store.grace.",
)
STORE_OUTAGE = _gauge(
    "zcproto_store_outage_seconds", "Duration of the current outage of the store; 0 without one."
)
STORE_OUTAGES = _counter("zcproto_store_outages_total", "Outages of the store begun.")
STORE_FAILURES = _counter("zcproto_store_failures_total", "Failed operations of the store.")
STORE_ASKING = _gauge("zcproto_store_operations_in_progress", "Operations of the store in progress.")
STORE_DURATION = _histogram(
    "zcproto_store_operation_seconds", "Duration of operations of the store, including failed ones."
)
STORE_PENDING = _gauge(
    "zcproto_store_pending_revocations", "Revocations on the local disk not yet written to the store."
)
STORE_CHANGES = _counter("zcproto_store_changes_total", "Changes by other servers, received from the store.")
STORE_LOOKUPS = _counter(
    "zcproto_store_lookups_total",
    "Unknown tokens looked up in a shared store. `result`: found, missed.",
    "result",
)
_end_of_part("The store of sessions")

LOOP_LAG = _histogram(
    "zcproto_loop_lag_seconds",
    "Delay of a timer of the event loop: how long a request may have waited. Measured every 5 ms under traffic,"
    " else four times a second.",
)
_end_of_part("The event loop")

HTTP_CONNECTIONS = _gauge("zcproto_http_connections", "Open HTTPS connections.")
HTTP_OPENED = _counter("zcproto_http_connections_opened_total", "HTTPS connections opened.")
HTTP_RESPONSES = _counter("zcproto_http_responses_total", "Responses over HTTPS, by status.", "status")
HTTP_WRITE_TIMEOUTS = _counter(
    "zcproto_http_write_timeouts_total", "HTTPS connections reset because their peer did not read."
)
_end_of_part("HTTPS")

ALERTS_OPEN = _gauge("zcproto_alerts_open", "Active alerts, by severity.", "severity")
ALERTS_RAISED = _counter(
    "zcproto_alerts_raised_total",
    "Alerts raised, sent or only counted. `kind`: see docs/alerts.md.",
    "kind",
)
ALERT_MESSAGES = _counter(
    "zcproto_alert_messages_total",
    "Messages about alerts by sink (webhook, command). `result`: arrived; failed (one attempt, may be retried);"
    " lost (given up).",
    *("sink", "result"),
)
ALERT_MESSAGES_WAITING = _gauge("zcproto_alert_messages_waiting", "Messages waiting for delivery.", "sink")
ALERT_SINK_DOWN = _gauge("zcproto_alert_sink_down", "1 if the last delivery failed, else 0.", "sink")
_end_of_part("Alerts")

CPU = _counter("process_cpu_seconds_total", "CPU time of the process, user and system.")
RESIDENT = _gauge("process_resident_memory_bytes", "Resident memory of the process.")
VIRTUAL = _gauge("process_virtual_memory_bytes", "Address space of the process.")
STARTED = _gauge("process_start_time_seconds", "Start time of the process, in seconds since the Unix epoch.")
OPEN_FDS = _gauge("process_open_fds", "Open file descriptors.")
MAX_FDS = _gauge("process_max_fds", "The limit of file descriptors.")
_end_of_part("The process")

ALL: Final[tuple[Metric, ...]] = tuple(metric for part in TABLE.values() for metric in part)

OF_THE_LIBRARY: Final[dict[str, str]] = {
    "python_gc_collections_total": "Runs of the garbage collector, by generation.",
    "python_gc_objects_collected_total": "Objects collected, by generation.",
    "python_gc_objects_uncollectable_total": "Objects found uncollectable, by generation.",
    "python_info": "Always 1; the labels are the version of Python.",
}
"""Metrics of the interpreter that prometheus_client provides."""
