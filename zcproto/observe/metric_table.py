"""Every metric, with what it means: the source of docs/reference/metrics.md.

Must not know: where the values come from.
"""

from __future__ import annotations

from typing import Final

from zcproto.observe.metrics import Kind, Metric

TABLE: Final[dict[str, tuple[Metric, ...]]] = {}
"""The metrics of each part, in the order of their page. Filled below."""

_part: list[Metric] = []


def _counter(name: str, help: str, *labels: str) -> Metric:
    return _keep(Metric(name, Kind.COUNTER, help, labels))


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return _keep(Metric(name, Kind.GAUGE, help, labels))


def _histogram(name: str, help: str, *labels: str) -> Metric:
    return _keep(Metric(name, Kind.HISTOGRAM, help, labels))


def _keep(metric: Metric) -> Metric:
    _part.append(metric)
    return metric


def _end_of_part(title: str) -> None:
    TABLE[title] = tuple(_part)
    _part.clear()


BUILD_INFO = _gauge(
    "zcproto_build_info",
    "Always 1; its labels are the versions of zcproto, of Python and of OpenSSL.",
    *("version", "python", "openssl"),
)
DRAINING = _gauge("zcproto_draining", "1 while the server finishes what runs and takes nothing new, else 0.")
LIMIT = _gauge(
    "zcproto_limit",
    "The most that a limit lets in. `limit` is the name of its setting, if it has one.",
    "limit",
)
LIMIT_USE = _gauge(
    "zcproto_limit_use",
    "How much of a limit is used now. Of limits that each connection or address has for itself: by the one that"
    " uses most.",
    "limit",
)
LOST_LOG_LINES = _counter(
    "zcproto_log_lines_lost_total",
    "Lines of the log that could not be written; those that are left out on purpose are told in the log.",
)
INCIDENTS = _counter(
    "zcproto_incidents_total",
    "Faults of a method or of the server. Each is in the log with its traceback, and the caller got its id.",
)
CONFIG_RELOADS = _counter(
    "zcproto_config_reloads_total",
    "How often the configuration was read again; refused is one with faults, which changed nothing.",
    "result",
)
_end_of_part("The server")

TCP_CONNECTIONS = _gauge(
    "zcproto_tcp_connections", "Open TCP connections, those in their handshake included."
)
CONNECTIONS = _gauge("zcproto_connections", "Open conversations in ZCP/1.")
CONNECTIONS_OPENED = _counter("zcproto_connections_opened_total", "Conversations in ZCP/1 that have begun.")
CONNECTIONS_ENDED = _counter(
    "zcproto_connections_ended_total",
    "Conversations in ZCP/1 that have ended. `reason` is what ended them: a rule of the server, a code or a cause"
    " of zcproto_tls_failures_total.",
    "reason",
)
CONNECTIONS_REFUSED = _counter(
    "zcproto_connections_refused_total",
    "Connections closed at accept. `reason`: full (limits.max_connections), per_address"
    " (limits.connections_per_address), exhausted (the system had no descriptor or memory; tried again).",
    "reason",
)
WRITE_PAUSES = _counter(
    "zcproto_write_pauses_total", "Times that a peer read so slowly that it was not read from any more."
)
SLOW_READERS = _gauge("zcproto_slow_readers", "Connections that are not read from until their peer reads.")
EVENTS_SENT = _counter(
    "zcproto_events_sent_total", "Events sent by methods and by the server, warnings of expiry not counted."
)
_end_of_part("Connections")

HANDSHAKES_COMPLETED = _counter(
    "zcproto_tls_handshakes_completed_total", "TLS handshakes that led to a connection."
)
HANDSHAKES_IN_PROGRESS = _gauge("zcproto_tls_handshakes_in_progress", "TLS handshakes that are not complete.")
TLS_FAILURES = _counter(
    "zcproto_tls_failures_total",
    "TLS connections that could not be made, or ended badly.",
    "cause",
)
_end_of_part("TLS")

CERTIFICATE_EXPIRES = _gauge(
    "zcproto_certificate_expires_timestamp_seconds",
    "When a certificate in use ends, in seconds since the Unix epoch. `source`: own, files, authority (that signs"
    " own ones), client_authority.",
    *("path", "source", "site", "key_type"),
)
CERTIFICATE_LEFT = _gauge(
    "zcproto_certificate_left_seconds",
    "How long a certificate in use is still valid by the server's clock; below 0 it has ended.",
    *("path", "source", "site", "key_type"),
)
CERTIFICATE_EVENTS = _counter(
    "zcproto_certificate_events_total",
    "What happened to certificates: they were loaded, renewed, could not be used, are about to end.",
    "event",
)
RENEWED = _gauge(
    "zcproto_certificate_last_renewal_timestamp_seconds",
    "When own certificates were last renewed, or that was tried, in seconds since the Unix epoch. Missing if it was"
    " not since the start.",
)
RENEWED_OK = _gauge(
    "zcproto_certificate_last_renewal_success",
    "1 if the last renewal went well, 0 if it failed. Missing likewise.",
)
_end_of_part("Certificates")

SESSIONS = _gauge(
    "zcproto_sessions",
    "Sessions known to this server. `state`: live, or lapsed (the token has expired, a refresh brings it back).",
    "state",
)
SESSIONS_OPENED = _counter("zcproto_sessions_opened_total", "Sessions opened here.")
SESSIONS_REFRESHED = _counter("zcproto_sessions_refreshed_total", "Refreshes of sessions.")
SESSIONS_ENDED = _counter(
    "zcproto_sessions_ended_total",
    "Live sessions that have ended, or whose token has. `reason`: expired, idle, closed (by the holder), by_user,"
    " by_operator, user_changed, device_removed, replaced, refresh_reused, elsewhere (by another server), other.",
    "reason",
)
SESSIONS_REVOKED = _counter(
    "zcproto_sessions_revoked_total", "Sessions ended by a word, closed ones too, live and lapsed."
)
REFRESH_REUSED = _counter(
    "zcproto_refresh_tokens_reused_total",
    "Spent refresh tokens that were shown again, which ended their session: one of its holders is a thief.",
)
TOKENS_REFUSED = _counter("zcproto_tokens_refused_total", "Checks of a token that was not good.")
NOT_ADMITTED = _counter(
    "zcproto_sessions_not_admitted_total",
    "Good tokens that were refused for what came with them. `reason`: user (it is none any more), address, client.",
    "reason",
)
_end_of_part("Sessions")

LOGINS = _counter(
    "zcproto_logins_total",
    "Logins that were decided. `scheme` is how the user was to be proved, or session.attach; `result`: accepted,"
    " refused.",
    *("scheme", "result"),
)
LOGINS_THROTTLED = _counter(
    "zcproto_logins_throttled_total", "Logins that were not looked at, as too many had failed before."
)
_end_of_part("Logins")

REQUESTS = _counter(
    "zcproto_requests_total", "Requests that reached a method, or asked for one that they may not have."
)
CALLS = _counter("zcproto_method_calls_total", "Calls of each method.", "method")
IN_FLIGHT = _gauge("zcproto_requests_in_flight", "Calls that wait for something, of all connections.")
DURATIONS = _histogram(
    "zcproto_method_duration_seconds",
    "How long the loop was at a call, to its answer or its first wait. Measured of the requests of one read in 16"
    " ms.",
    "method",
)
WAITS = _histogram(
    "zcproto_method_wait_seconds",
    "How long those calls took that waited, from the first wait to the end. Measured of all of them.",
    "method",
)
ERRORS = _counter("zcproto_errors_total", "Error frames sent, by the name of their code.", "code")
FRAMES_REFUSED = _counter(
    "zcproto_frames_refused_total",
    "Frames that led to no call. `reason`: token, stale, stale_dropped (with no answer; counted when the"
    " connection ends), malformed, deadline (it had passed), key_not_proved, max_streams, draining,"
    " too_large_without_session.",
    *("reason", "code"),
)
ONCE_RUNNING = _gauge("zcproto_idempotent_requests_running", "Requests with an idempotency key that run now.")
ONCE = _counter(
    "zcproto_idempotent_answers_total",
    "Requests with an idempotency key that were not run. `result`: repeated (they got the first one's answer),"
    " conflict (the key was used for another request), lost (nobody knows what became of the first one).",
    "result",
)
_end_of_part("Requests")

STORE_STATE = _gauge(
    "zcproto_store_state",
    "1 for the state that the store of sessions is in, 0 for the others: healthy; degraded (it is out, and not"
    " asked); recovering (a probe is under way).",
    "state",
)
STORE_REFUSING = _gauge(
    "zcproto_store_refusing",
    "1 while every token is refused, as the store was out for longer than store.grace.",
)
STORE_OUTAGE = _gauge("zcproto_store_outage_seconds", "How long the store has been out; 0 if it is not.")
STORE_OUTAGES = _counter("zcproto_store_outages_total", "Outages that have begun.")
STORE_FAILURES = _counter("zcproto_store_failures_total", "Operations that the store could not do.")
STORE_ASKING = _gauge("zcproto_store_operations_in_progress", "Operations that wait for the store's answer.")
STORE_DURATION = _histogram(
    "zcproto_store_operation_seconds", "How long operations of the store took, those that failed included."
)
STORE_PENDING = _gauge(
    "zcproto_store_pending_revocations", "Revocations on this machine's disk that the store does not have."
)
STORE_CHANGES = _counter(
    "zcproto_store_changes_total", "Changes that other servers made and the store told of."
)
STORE_LOOKUPS = _counter(
    "zcproto_store_lookups_total",
    "Tokens that were not known here and looked up in a shared store. `result`: found, missed.",
    "result",
)
_end_of_part("The store of sessions")

LOOP_LAG = _histogram(
    "zcproto_loop_lag_seconds",
    "How late a timer of the event loop came: how long a request may have had to wait. Measured once in 5 ms while"
    " there is traffic, four times a second else.",
)
_end_of_part("The event loop")

HTTP_CONNECTIONS = _gauge("zcproto_http_connections", "Open HTTPS connections.")
HTTP_OPENED = _counter("zcproto_http_connections_opened_total", "HTTPS connections that have begun.")
HTTP_RESPONSES = _counter("zcproto_http_responses_total", "Responses over HTTPS, by status.", "status")
HTTP_WRITE_TIMEOUTS = _counter(
    "zcproto_http_write_timeouts_total", "HTTPS connections that were reset, as their peer did not read."
)
_end_of_part("HTTPS")

ALERTS_OPEN = _gauge(
    "zcproto_alerts_open", "Alerts that were told and are not over, by severity.", "severity"
)
ALERTS_RAISED = _counter(
    "zcproto_alerts_raised_total",
    "How often something was an alert, told or only counted. `kind`: as in docs/alerts.md.",
    "kind",
)
ALERT_MESSAGES = _counter(
    "zcproto_alert_messages_total",
    "Messages about alerts by what takes them (webhook, command). `result`: arrived; failed (one try, there may be"
    " more); lost (given up).",
    *("sink", "result"),
)
ALERT_MESSAGES_WAITING = _gauge("zcproto_alert_messages_waiting", "Messages that wait to be taken.", "sink")
ALERT_SINK_DOWN = _gauge("zcproto_alert_sink_down", "1 if the last messages were not taken, else 0.", "sink")
_end_of_part("Alerts")

CPU = _counter("process_cpu_seconds_total", "CPU of the process, user and system.")
RESIDENT = _gauge("process_resident_memory_bytes", "Memory of the process that is in RAM.")
VIRTUAL = _gauge("process_virtual_memory_bytes", "Address space of the process.")
STARTED = _gauge("process_start_time_seconds", "When the process began, in seconds since the Unix epoch.")
OPEN_FDS = _gauge("process_open_fds", "Open file descriptors.")
MAX_FDS = _gauge("process_max_fds", "The limit of file descriptors.")
_end_of_part("The process")

ALL: Final[tuple[Metric, ...]] = tuple(metric for part in TABLE.values() for metric in part)

OF_THE_LIBRARY: Final[dict[str, str]] = {
    "python_gc_collections_total": "Runs of the garbage collector, by generation.",
    "python_gc_objects_collected_total": "Objects that it collected, by generation.",
    "python_gc_objects_uncollectable_total": "Objects that it found and could not collect, by generation.",
    "python_info": "Always 1; its labels are the version of Python.",
}
"""What prometheus_client tells of any interpreter, by its usual names."""
