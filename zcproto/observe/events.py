"""Define every log event: name, level, meaning, fields and rate limit.

Rules:
- One name for one fact: the part of the program and what happened, `part.what_happened`.
- Events that a peer can cause at will have a limit, which `zcproto.observe.log` enforces for all callers.
- docs/reference/log-events.md is generated from this table; a test compares the table with all places that log.

Add an event here first: `_event(...)` or `_peer_event(...)` below, and each new field in FIELDS.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Limit(NamedTuple):
    """Lines per minute for each key, the values of the fields `by`. Further lines are only counted."""

    lines: int
    by: tuple[str, ...] = ()
    total: int | None = None
    """Lines per minute for all keys together; None if there are few keys."""


PER_ADDRESS: Final = Limit(10, ("peer",), 300)
"""Events that any stranger can cause. Ten lines show what one address does; 300 for all addresses are at most about
100 MB a day per event."""

PER_USER: Final = Limit(120, ("user",), 60_000)
"""Events caused by authenticated users: every line is wanted unless a client misbehaves. 60,000 is more than the
sessions that a server can open in a minute."""

PER_EVENT: Final = Limit(60)
"""Internal errors and failures of a disk or store, which may repeat with every attempt or request."""

FOR_DEBUGGING: Final = Limit(600, ("peer",), 6_000)


class Event(NamedTuple):
    """An event. `by_peer`: anyone who can reach the port, or has a session, can cause it at will."""

    name: str
    level: str
    meaning: str
    fields: tuple[str, ...]
    limit: Limit | None
    by_peer: bool


EVENTS: Final[dict[str, Event]] = {}
"""All events by name."""

FIELDS: Final[dict[str, str]] = {
    "about": "subject of an alert, unique among those of its kind",
    "all": "true if all sessions of the server were meant",
    "aside": "path to which a damaged file was moved",
    "balancer": "address of the load balancer that forwarded the connection",
    "changed": "configuration keys with new values",
    "cause": "cause of a TLS failure, from a fixed list",
    "client": "client string, up to 128 printable characters",
    "code": "protocol code that ended the connection",
    "connection": "id of a connection, the same in all its lines; unique within one server",
    "connections": "number of connections",
    "copy": "path to which a damaged file was moved",
    "count": "number of occurrences",
    "cure": "how to fix it",
    "cut_off": "connections cut off at the end of server.drain_timeout",
    "days_left": "days until a certificate expires, rounded down",
    "details": "values of an alert",
    "device": "name of a device",
    "exc_info": "exception: its type, with its message if zcproto or the system made it",
    "exc_info_at": "stack of the exception: file, line, function",
    "faults": "list of problems, one sentence each",
    "file": "file name of a certificate, or the names that it is valid for",
    "host": "listening address",
    "incident": "id returned to the caller, to find this line",
    "keys": "number of peers, users or causes of the suppressed lines",
    "kind": "kind of an alert, see docs/alerts.md",
    "limit": "value of the limit",
    "lines": "number of lines",
    "lost": "total of messages lost by this sink",
    "message": "description in a sentence",
    "new_level": "new log level",
    "of": "name of the suppressed event",
    "operator": "user who did it",
    "oversize": "characters of a line that was too long and was written without its values",
    "path": "path of a file",
    "peer": "address of the peer",
    "pending": "revocations not yet written to the store",
    "pid": "process id of the peer of the control socket",
    "pins": "pins of public keys, in the form that clients accept",
    "port": "TCP port",
    "reason": "reason",
    "replayed": "pending revocations written to the store",
    "restart": "changed keys that require a restart",
    "retry_after_s": "seconds until the next attempt",
    "scheme": "login scheme: api_key, device, certificate",
    "seconds": "duration",
    "session": "public id of a session; not a credential",
    "sessions": "number of sessions",
    "severity": "info, warning, error or critical",
    "sink": "receiver of alerts: webhook or command",
    "suppressed": "lines of this event and key suppressed before this one",
    "text": "text logged instead of a name",
    "threshold_days": "reached threshold of certificates.alert_days",
    "title": "alert in a sentence",
    "uid": "system user id of the peer of the control socket",
    "user": "name of a user",
    "wanted": "required value",
    "what": "name of a method, operation or internal step",
    "which": "id of the session that was meant, or all",
}
"""Meaning of each field, in every event."""


def _event(name: str, level: str, meaning: str, fields: str = "", limit: Limit | None = None) -> None:
    """Add an event that only the server or its operator causes."""
    EVENTS[name] = Event(name, level, meaning, tuple(fields.split()), limit, by_peer=False)


def _peer_event(name: str, level: str, meaning: str, fields: str, limit: Limit) -> None:
    """Add an event that a peer can cause at will."""
    EVENTS[name] = Event(name, level, meaning, tuple(fields.split()), limit, by_peer=True)


# --- the server ----------------------------------------------------------------------------------------

_event("server.listening", "info", "The server listens on an address.", "host port")
_event("server.redirecting", "info", "The server redirects from a plaintext port to https.", "host port")
_event(
    "server.file_limit",
    "warning",
    "The limit on open files is below limits.max_connections.",
    "limit wanted cure",
)
_event("server.traceable", "warning", "Other processes of this user can read the server's memory.", "cure")
_event(
    "server.key_log_ignored",
    "warning",
    "SSLKEYLOGFILE is set; it is ignored and no keys are written.",
    "cure",
)
_event("server.runs_as_root", "warning", "The server runs as root, which it does not need.", "cure")
_event(
    "service_manager.unreachable",
    "warning",
    "NOTIFY_SOCKET is set, but the service manager does not answer there.",
    "cure",
)
_event(
    "server.draining",
    "info",
    "The server drains: it accepts nothing new and finishes requests in flight.",
    "connections",
)
_event("server.methods_stuck", "error", "Methods did not end after they were cancelled.", "count")
_event("server.ended", "info", "The server has ended; all connections are closed.", "cut_off")
_event("server.forced", "warning", "A second signal ended the server at once.")
_peer_event("server.fault", "error", "Internal error in the event loop.", "what exc_info", PER_EVENT)

# --- the configuration, read again -----------------------------------------------------------------------

_event(
    "config.reloaded",
    "info",
    "The configuration was reloaded. Changes are active, except those that require a restart.",
    "changed restart",
    PER_EVENT,
)
_event(
    "config.refused",
    "error",
    "The reloaded configuration is invalid; the previous one stays active.",
    "faults",
    PER_EVENT,
)

# --- the control socket ----------------------------------------------------------------------------------

_event("control.refused", "warning", "Another user tried to use the control socket.", "uid pid", PER_EVENT)
_event(
    "control.unavailable",
    "warning",
    "The control socket cannot be created in the home folder.",
    "path reason",
)
_event(
    "control.asked",
    "info",
    "An operation was requested by the control socket.",
    "what uid pid user sessions device",
    PER_EVENT,
)

# --- connections -----------------------------------------------------------------------------------------

_peer_event(
    "listener.exhausted",
    "error",
    "A connection cannot be accepted: the system has no descriptors or memory left.",
    "reason retry_after_s",
    Limit(10),
)
_peer_event(
    "connection.refused_full",
    "info",
    "A connection was refused: limits.max_connections is reached.",
    "limit",
    Limit(10),
)
_peer_event(
    "connection.refused_per_address",
    "info",
    "A connection was refused: limits.connections_per_address is reached.",
    "peer balancer limit",
    PER_ADDRESS,
)
_peer_event(
    "tls.failed",
    "info",
    "A TLS handshake or connection failed.",
    "cause peer",
    Limit(10, ("cause", "peer"), 300),
)
_peer_event(
    "connection.opened",
    "debug",
    "A connection was opened after its handshake.",
    "peer connection",
    FOR_DEBUGGING,
)
_peer_event("connection.ended", "debug", "A connection ended.", "peer connection reason", FOR_DEBUGGING)
_peer_event(
    "connection.refused",
    "info",
    "A connection was ended because of invalid input.",
    "peer connection code reason",
    Limit(10, ("peer", "code"), 300),
)
_peer_event(
    "connection.aborted",
    "info",
    "A connection was reset because its peer does not read.",
    "peer connection reason",
    Limit(10, ("peer", "reason"), 300),
)
_peer_event(
    "connection.certificate_revoked",
    "warning",
    "A connection was closed because its client certificate was revoked.",
    "peer connection",
    PER_ADDRESS,
)
_peer_event(
    "request.failed",
    "error",
    "A method or the server raised an unexpected exception. The caller got only the incident id.",
    "what incident exc_info peer connection",
    Limit(60, ("what",), 300),
)

# --- sessions ----------------------------------------------------------------------------------------------

_peer_event(
    "session.opened", "info", "A session was opened.", "session user peer connection scheme client", PER_USER
)
_peer_event(
    "session.refreshed", "info", "A session was refreshed.", "session user peer connection client", PER_USER
)
_peer_event(
    "session.revoked",
    "info",
    "A user revoked one of their sessions, or all.",
    "session user peer connection which sessions",
    PER_USER,
)
_peer_event(
    "session.closed", "info", "A session was closed by its client.", "session user peer connection", PER_USER
)
_peer_event(
    "session.not_admitted",
    "info",
    "A token was refused from an address that its session is not bound to.",
    "peer connection session",
    PER_ADDRESS,
)
_peer_event(
    "session.refresh_reused",
    "warning",
    "A spent refresh token was reused, so it may be stolen; the session was ended.",
    "session peer",
    PER_ADDRESS,
)
_peer_event("login.failed", "info", "A login failed.", "peer connection scheme", PER_ADDRESS)
_peer_event(
    "login.certificate_refused",
    "info",
    "A login by client certificate was refused: it names no user who may log in.",
    "peer reason",
    PER_ADDRESS,
)
_peer_event("login.device_refused", "info", "A login by device key was refused.", "peer reason", PER_ADDRESS)
_peer_event("http.token_refused", "info", "The token of an HTTPS request was refused.", "peer", PER_ADDRESS)
_peer_event(
    "device.enrolled",
    "info",
    "A device was enrolled with a code of `zcproto pair`.",
    "device user peer connection",
    PER_USER,
)
_peer_event(
    "operator.revoked",
    "warning",
    "An operator revoked sessions of other users.",
    "operator user all sessions peer",
    Limit(120, ("operator",), 6_000),
)
_event("user.gone", "info", "A user was removed, disabled or given another key.", "user sessions")
_event("device.gone", "info", "A device was removed.", "device user sessions")
_event("sessions.loaded", "info", "Sessions were loaded from the store.", "sessions")
_event(
    "sessions.left_out",
    "error",
    "Stored sessions were not loaded because the table is full.",
    "sessions cure",
)

# --- users and devices: files of the home folder -------------------------------------------------------------

_event("users.readable", "info", "users.toml is readable again.", "", PER_EVENT)
_event(
    "users.unreadable",
    "error",
    "users.toml cannot be read; the last valid content stays active.",
    "faults",
    PER_EVENT,
)
_event("users.look_failed", "error", "users.toml could not be checked.", "exc_info", PER_EVENT)
_event(
    "users.not_gone",
    "error",
    "Sessions of a removed or changed user could not be revoked.",
    "user exc_info",
    PER_EVENT,
)
_event("devices.readable", "info", "devices.toml is readable again.", "", PER_EVENT)
_event(
    "devices.unreadable",
    "error",
    "devices.toml cannot be read; the last valid content stays active.",
    "faults",
    PER_EVENT,
)
_event("devices.look_failed", "error", "devices.toml could not be checked.", "exc_info", PER_EVENT)
_event(
    "devices.not_gone",
    "error",
    "Sessions of a removed device could not be revoked.",
    "device exc_info",
    PER_EVENT,
)

# --- the store -----------------------------------------------------------------------------------------------

_event(
    "store.degraded",
    "error",
    "The store is unavailable: known sessions stay valid, new ones are refused.",
    "reason sessions pending",
    PER_EVENT,
)
_event(
    "store.grace_over",
    "error",
    "The outage exceeds store.grace: every token is refused.",
    "reason",
    PER_EVENT,
)
_event("store.recovered", "warning", "The store is available again.", "seconds replayed", PER_EVENT)
_event(
    "store.emptied",
    "error",
    "The store lost its data unexpectedly; known sessions are written to it again.",
    "sessions",
    PER_EVENT,
)
_event(
    "store.missing", "error", "The file of the store is missing; a new one was created.", "path", PER_EVENT
)
_event(
    "store.damaged",
    "error",
    "The file of the store is damaged; it was moved aside and a new one created.",
    "path aside reason",
    PER_EVENT,
)
_event("store.close_failed", "error", "The store could not be closed.", "reason", PER_EVENT)
_event(
    "store.uses_not_written",
    "warning",
    "The last use of sessions could not be written at shutdown.",
    "reason",
)
_event("store.probe_failed", "error", "Internal error in a probe of the store.", "exc_info", PER_EVENT)
_peer_event(
    "store.task_failed",
    "error",
    "Internal error in a background operation of the store.",
    "exc_info",
    PER_EVENT,
)
_event(
    "store.upkeep_failed",
    "error",
    "Internal error in periodic maintenance of sessions.",
    "what exc_info",
    PER_EVENT,
)
_event(
    "revocations.damaged",
    "error",
    "Pending revocations could not be read; their file was moved aside.",
    "copy",
    PER_EVENT,
)
_peer_event(
    "revocations.not_kept",
    "error",
    "A revocation is active on this server but could not be written to disk.",
    "reason",
    PER_EVENT,
)
_event(
    "revocations.not_removed",
    "warning",
    "Revocations already in the store could not be removed from the pending ones; they are replayed again.",
    "reason",
    PER_EVENT,
)

# --- alerts ----------------------------------------------------------------------------------------------------

_ALERT: Final = "kind about severity title details count"

_peer_event("alert.began", "warning", "An alert began, see docs/alerts.md.", _ALERT, PER_EVENT)
_peer_event("alert.changed", "warning", "The severity or subject of an alert changed.", _ALERT, PER_EVENT)
_peer_event("alert.reminder", "warning", "An alert is still active.", _ALERT, PER_EVENT)
_peer_event("alert.ended", "info", "An alert ended.", _ALERT, PER_EVENT)
_peer_event(
    "alert.lost",
    "error",
    "A message about an alert could not be delivered to a webhook or command.",
    "sink what reason lost",
    PER_EVENT,
)
_event("alert.sink_failed", "error", "Internal error in a webhook or command.", "sink exc_info", PER_EVENT)
_event(
    "alert.tick_failed",
    "error",
    "Internal error in the evaluation of counters for alerts.",
    "exc_info",
    PER_EVENT,
)

# --- certificates ----------------------------------------------------------------------------------------------

_NOTICE: Final = "file message pins days_left threshold_days"  # all optional

_event("certificate.loaded", "info", "An existing certificate was loaded.", _NOTICE, PER_EVENT)
_event("certificate.renewed", "info", "A certificate was issued or renewed.", _NOTICE, PER_EVENT)
_event("certificate.key_rotated", "info", "A certificate was renewed with a new key.", _NOTICE, PER_EVENT)
_event("certificate.next_pins", "info", "Pins of future keys are announced to clients.", _NOTICE, PER_EVENT)
_event(
    "certificate.renewal_failed",
    "warning",
    "A certificate could not be renewed; the current one stays active.",
    _NOTICE,
    PER_EVENT,
)
_event("certificate.renewal_recovered", "info", "Renewal works again.", _NOTICE, PER_EVENT)
_event(
    "certificate.files_bad",
    "warning",
    "External certificate files are invalid; the last valid ones stay active.",
    _NOTICE,
    PER_EVENT,
)
_event(
    "certificate.files_recovered", "info", "External certificate files are valid again.", _NOTICE, PER_EVENT
)
_event(
    "certificate.client_trust_loaded",
    "info",
    "New client CAs or a new revocation list (CRL) are active.",
    _NOTICE,
    PER_EVENT,
)
_event(
    "certificate.expiry",
    "warning",
    "A certificate or revocation list (CRL) expires soon or has expired.",
    _NOTICE,
    PER_EVENT,
)
_event(
    "certificate.expiry_ended",
    "info",
    "An expiring certificate or revocation list (CRL) was replaced.",
    _NOTICE,
    PER_EVENT,
)
_event(
    "certificate.not_used",
    "warning",
    "New certificates failed a test handshake and are not used.",
    "message",
    PER_EVENT,
)
_event(
    "certificate.look_failed", "error", "Internal error in the check of certificates.", "exc_info", PER_EVENT
)

# --- the log itself ----------------------------------------------------------------------------------------------

_event("log.suppressed", "info", "Lines of an event above its limit were suppressed.", "of count keys")
_event(
    "log.lost", "error", "Lines were lost because the disk is full or the reader of the log is slow.", "lines"
)
_event("log.reopened", "info", "log.file was reopened.", "path", PER_EVENT)
_event(
    "log.not_reopened",
    "error",
    "log.file cannot be reopened; the previous file stays in use.",
    "faults",
    PER_EVENT,
)
_event("log.level_changed", "info", "The log level was changed.", "new_level", PER_EVENT)
_event(
    "log.misnamed",
    "error",
    "Internal error: a text was logged in place of the name of an event.",
    "text",
    PER_EVENT,
)
