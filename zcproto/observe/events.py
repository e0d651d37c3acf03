"""Every event that is logged: its name, its level, what it means, its fields, and how often it may be written.

Rules:
- One name for one fact. A name is a part of the program and what happened, `part.what_happened`.
- What a peer can cause as often as it likes has a limit; `zcproto.observe.log` keeps to it, whoever logs the event.
- docs/reference/log-events.md is generated from this table; a test compares the table with all places that log.

An event is added here first: `_event(...)` below, and each field that is new in FIELDS.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Limit(NamedTuple):
    """So many lines a minute for each key: what the line has in the fields `by`. Further ones are counted."""

    lines: int
    by: tuple[str, ...] = ()
    total: int | None = None
    """Lines a minute of all keys together; None where there is one key, or few."""


PER_ADDRESS: Final = Limit(10, ("peer",), 300)
"""What any stranger can cause. Ten lines show what one does; 300 are what a thousand of them get together, at most
about 100 MB a day of one event."""

PER_USER: Final = Limit(120, ("user",), 60_000)
"""What users can cause who have proved who they are: each line is wanted, unless a client runs wild. 60,000 is
more than a server can open sessions in a minute."""

PER_EVENT: Final = Limit(60)
"""Faults of ours, of a disk, of a store: they may repeat with every try, or with every request."""

FOR_DEBUGGING: Final = Limit(600, ("peer",), 6_000)


class Event(NamedTuple):
    """An event. `by_peer`: whoever can reach the port, or has a session, can cause it at will."""

    name: str
    level: str
    meaning: str
    fields: tuple[str, ...]
    limit: Limit | None
    by_peer: bool


EVENTS: Final[dict[str, Event]] = {}
"""All events by name."""

FIELDS: Final[dict[str, str]] = {
    "about": "what an alert is about, of those of its kind",
    "all": "whether all sessions of the server were meant",
    "aside": "where a damaged file was put",
    "balancer": "the address of the load balancer that forwarded it",
    "changed": "keys of the configuration that have other values now",
    "cause": "why a handshake failed: one word of a fixed list",
    "client": "what a client calls itself, up to 128 printable characters",
    "code": "the code that a connection was ended with, as in the protocol",
    "connection": "the id of a connection, the same in all its lines; another server's may be the same",
    "connections": "how many connections there are",
    "copy": "where a damaged file was put",
    "count": "how many",
    "cure": "what to do about it",
    "cut_off": "connections that had to be cut off at the end of server.drain_timeout",
    "days_left": "days until a certificate expires, rounded down",
    "details": "values of an alert",
    "device": "the name of a device",
    "exc_info": "an exception: its type, and its message if that is ours or the system's",
    "exc_info_at": "the places that the exception passed: file, line, function",
    "faults": "what is wrong, one sentence each",
    "file": "the file name of a certificate, or the names that it is for",
    "host": "the address that is listened on",
    "incident": "the id that the peer was told, to ask about",
    "keys": "how many peers, users or causes the lines would have been of",
    "kind": "a kind of alert: docs/alerts.md",
    "limit": "the limit that was reached",
    "lines": "how many lines",
    "lost": "messages that never arrived at this sink, in all",
    "message": "what happened, in a sentence",
    "new_level": "the level from now on",
    "of": "the name of the event that was left out",
    "operator": "the user who did it",
    "oversize": "characters of a line that was too long, and lost its values",
    "path": "a file",
    "peer": "the address of the other end",
    "pending": "revocations that wait for the store",
    "pid": "the process at the other end of the control socket",
    "pins": "pins of public keys, as clients take them",
    "port": "the TCP port",
    "reason": "why",
    "replayed": "revocations that were made up for",
    "restart": "keys that have changed, and take a restart",
    "retry_after_s": "seconds until it is tried again",
    "scheme": "how a session was to be opened: api_key, device, certificate",
    "seconds": "how long it took",
    "session": "the public id of a session; it opens nothing",
    "sessions": "how many sessions",
    "severity": "info, warning, error or critical",
    "sink": "who takes alerts: webhook or command",
    "suppressed": "lines of this event and key that were left out before this one",
    "text": "what was given instead of a name",
    "threshold_days": "which of certificates.alert_days was reached",
    "title": "an alert in a sentence",
    "uid": "the user of the system at the other end of the control socket",
    "user": "the name of a user",
    "wanted": "what would be needed",
    "what": "which part of the work: a method's name, or a step of our own",
    "which": "the id of the session that was meant, or all",
}
"""What a field means, wherever it appears."""


def _event(
    name: str,
    level: str,
    meaning: str,
    fields: str = "",
    limit: Limit | None = None,
    *,
    by_peer: bool = False,
) -> None:
    EVENTS[name] = Event(name, level, meaning, tuple(fields.split()), limit, by_peer)


# --- the server ----------------------------------------------------------------------------------------

_event("server.listening", "info", "It accepts connections on an address.", "host port")
_event("server.redirecting", "info", "It sends people on to https from a port without TLS.", "host port")
_event(
    "server.file_limit",
    "warning",
    "The limit on open files is below limits.max_connections.",
    "limit wanted cure",
)
_event("server.traceable", "warning", "Other processes of this user can read the memory.", "cure")
_event("server.key_log_ignored", "warning", "SSLKEYLOGFILE is set, and no keys are written.", "cure")
_event("server.runs_as_root", "warning", "It has all rights, and needs none of them.", "cure")
_event("service_manager.unreachable", "warning", "NOTIFY_SOCKET is set, and nobody is there.", "cure")
_event("server.draining", "info", "It accepts nothing more, and finishes what runs.", "connections")
_event("server.methods_stuck", "error", "Methods did not end when they were cancelled.", "count")
_event("server.ended", "info", "All connections are closed.", "cut_off")
_event("server.forced", "warning", "A second signal ended it at once.")
_event(
    "server.fault", "error", "A fault of ours in the event loop.", "what exc_info", PER_EVENT, by_peer=True
)

# --- the configuration, read again -----------------------------------------------------------------------

_event(
    "config.reloaded",
    "info",
    "The configuration was read again: what changed holds now, but for what takes a restart.",
    "changed restart",
    PER_EVENT,
)
_event(
    "config.refused",
    "error",
    "The configuration was read again, and has faults: nothing has changed.",
    "faults",
    PER_EVENT,
)

# --- the control socket ----------------------------------------------------------------------------------

_event(
    "control.refused",
    "warning",
    "Somebody who may not was at the control socket.",
    "uid pid",
    PER_EVENT,
)
_event(
    "control.unavailable",
    "warning",
    "There is no control socket, as the home folder takes none.",
    "path reason",
)
_event(
    "control.asked",
    "info",
    "Somebody had something done by the control socket.",
    "what uid pid user sessions device",
    PER_EVENT,
)

# --- connections -----------------------------------------------------------------------------------------

_event(
    "listener.exhausted",
    "error",
    "The system has no more descriptors or memory for a connection.",
    "reason retry_after_s",
    Limit(10),
    by_peer=True,
)
_event(
    "connection.refused_full",
    "info",
    "A connection was closed at once: limits.max_connections is reached.",
    "limit",
    Limit(10),
    by_peer=True,
)
_event(
    "connection.refused_per_address",
    "info",
    "A connection was closed at once: limits.connections_per_address is reached.",
    "peer balancer limit",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "tls.failed",
    "info",
    "A handshake failed, or TLS did later.",
    "cause peer",
    Limit(10, ("cause", "peer"), 300),
    by_peer=True,
)
_event(
    "connection.opened",
    "debug",
    "A handshake was completed, and the conversation begins.",
    "peer connection",
    FOR_DEBUGGING,
    by_peer=True,
)
_event(
    "connection.ended",
    "debug",
    "A conversation ended.",
    "peer connection reason",
    FOR_DEBUGGING,
    by_peer=True,
)
_event(
    "connection.refused",
    "info",
    "A connection was ended for what its peer sent.",
    "peer connection code reason",
    Limit(10, ("peer", "code"), 300),
    by_peer=True,
)
_event(
    "connection.aborted",
    "info",
    "A connection was reset, as its peer does not read.",
    "peer connection reason",
    Limit(10, ("peer", "reason"), 300),
    by_peer=True,
)
_event(
    "connection.certificate_revoked",
    "warning",
    "A connection was closed, as its client's certificate was revoked.",
    "peer connection",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "request.failed",
    "error",
    "A fault of a method, or of ours. Its caller was told the incident alone.",
    "what incident exc_info peer connection",
    Limit(60, ("what",), 300),
    by_peer=True,
)

# --- sessions ----------------------------------------------------------------------------------------------

_event(
    "session.opened",
    "info",
    "A session was opened.",
    "session user peer connection scheme client",
    PER_USER,
    by_peer=True,
)
_event(
    "session.refreshed",
    "info",
    "A session got a new pair of tokens.",
    "session user peer connection client",
    PER_USER,
    by_peer=True,
)
_event(
    "session.revoked",
    "info",
    "A user ended one of their sessions, or all.",
    "session user peer connection which sessions",
    PER_USER,
    by_peer=True,
)
_event(
    "session.closed",
    "info",
    "A session was ended by whoever used it.",
    "session user peer connection",
    PER_USER,
    by_peer=True,
)
_event(
    "session.not_admitted",
    "info",
    "A session was used from an address that it is not bound to.",
    "peer connection session",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "session.refresh_reused",
    "warning",
    "A spent refresh token was used again: the session has ended, as one of two holders is a thief.",
    "session peer",
    PER_ADDRESS,
    by_peer=True,
)
_event("login.failed", "info", "Nobody was let in.", "peer connection scheme", PER_ADDRESS, by_peer=True)
_event(
    "login.certificate_refused",
    "info",
    "A client certificate names no user, or one who may not log in.",
    "peer reason",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "login.device_refused",
    "info",
    "A device's proof was not taken.",
    "peer reason",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "http.token_refused",
    "info",
    "A token in a request over HTTPS was not taken.",
    "peer",
    PER_ADDRESS,
    by_peer=True,
)
_event(
    "device.enrolled",
    "info",
    "A code of `zcproto pair` was traded for a device.",
    "device user peer connection",
    PER_USER,
    by_peer=True,
)
_event(
    "operator.revoked",
    "warning",
    "An operator ended sessions of others.",
    "operator user all sessions peer",
    Limit(120, ("operator",), 6_000),
    by_peer=True,
)
_event("user.gone", "info", "A user was removed, disabled or given another key.", "user sessions")
_event("device.gone", "info", "A device was removed.", "device user sessions")
_event("sessions.loaded", "info", "Sessions of before were taken in from the store.", "sessions")
_event("sessions.left_out", "error", "Sessions of before found no room.", "sessions cure")

# --- users and devices: the files of the home folder ---------------------------------------------------------

_event("users.readable", "info", "users.toml can be read again.", "", PER_EVENT)
_event(
    "users.unreadable",
    "error",
    "users.toml cannot be read: what was good before is used on.",
    "faults",
    PER_EVENT,
)
_event("users.look_failed", "error", "users.toml could not be looked at.", "exc_info", PER_EVENT)
_event(
    "users.not_gone",
    "error",
    "Sessions of a changed user could not be ended.",
    "user exc_info",
    PER_EVENT,
)
_event("devices.readable", "info", "devices.toml can be read again.", "", PER_EVENT)
_event(
    "devices.unreadable",
    "error",
    "devices.toml cannot be read: the one before is used on.",
    "faults",
    PER_EVENT,
)
_event("devices.look_failed", "error", "devices.toml could not be looked at.", "exc_info", PER_EVENT)
_event(
    "devices.not_gone",
    "error",
    "Sessions of a removed device could not be ended.",
    "device exc_info",
    PER_EVENT,
)

# --- the store -----------------------------------------------------------------------------------------------

_event(
    "store.degraded",
    "error",
    "The store does not answer: known sessions go on, new ones are refused.",
    "reason sessions pending",
    PER_EVENT,
)
_event("store.grace_over", "error", "store.grace is over: every token is refused.", "reason", PER_EVENT)
_event("store.recovered", "warning", "The store answers again.", "seconds replayed", PER_EVENT)
_event(
    "store.emptied", "error", "The store was emptied: it is given back what is known.", "sessions", PER_EVENT
)
_event("store.missing", "error", "The store's file is gone: a new one was made.", "path", PER_EVENT)
_event(
    "store.damaged", "error", "The store's file was damaged, and set aside.", "path aside reason", PER_EVENT
)
_event("store.close_failed", "error", "The store could not be closed.", "reason", PER_EVENT)
_event("store.uses_not_written", "warning", "When sessions were last used was not kept at the end.", "reason")
_event(
    "store.probe_failed", "error", "The store could not be asked whether it is back.", "exc_info", PER_EVENT
)
_event("store.task_failed", "error", "A fault of ours beside a request.", "exc_info", PER_EVENT, by_peer=True)
_event(
    "store.upkeep_failed",
    "error",
    "A fault of ours in what is done at intervals.",
    "what exc_info",
    PER_EVENT,
)
_event("revocations.damaged", "error", "Revocations of before could not be read.", "copy", PER_EVENT)
_event(
    "revocations.not_kept",
    "error",
    "A revocation holds here, but could not be written down.",
    "reason",
    PER_EVENT,
    by_peer=True,
)
_event(
    "revocations.not_removed",
    "warning",
    "Revocations that the store has were not struck out: they are brought again.",
    "reason",
    PER_EVENT,
)

# --- alerts ----------------------------------------------------------------------------------------------------

_ALERT: Final = "kind about severity title details count"

_event(
    "alert.began",
    "warning",
    "Somebody has to know something: docs/alerts.md.",
    _ALERT,
    PER_EVENT,
    by_peer=True,
)
_event(
    "alert.changed",
    "warning",
    "An alert has become graver, or there is news.",
    _ALERT,
    PER_EVENT,
    by_peer=True,
)
_event("alert.reminder", "warning", "An alert goes on.", _ALERT, PER_EVENT, by_peer=True)
_event("alert.ended", "info", "An alert is over.", _ALERT, PER_EVENT, by_peer=True)
_event(
    "alert.lost",
    "error",
    "A message about an alert never reached a webhook or a command.",
    "sink what reason lost",
    PER_EVENT,
    by_peer=True,
)
_event("alert.sink_failed", "error", "A fault of ours in a webhook or a command.", "sink exc_info", PER_EVENT)
_event("alert.tick_failed", "error", "A fault of ours where counters are judged.", "exc_info", PER_EVENT)

# --- certificates ----------------------------------------------------------------------------------------------

_NOTICE: Final = "file message pins days_left threshold_days"  # those of them that there are

_event("certificate.loaded", "info", "A certificate is served that was there.", _NOTICE, PER_EVENT)
_event("certificate.renewed", "info", "A certificate is served that was made just now.", _NOTICE, PER_EVENT)
_event("certificate.key_rotated", "info", "A new certificate has another key.", _NOTICE, PER_EVENT)
_event("certificate.next_pins", "info", "The pins of keys to come are announced.", _NOTICE, PER_EVENT)
_event(
    "certificate.renewal_failed",
    "warning",
    "A certificate could not be renewed: the old one serves on.",
    _NOTICE,
    PER_EVENT,
)
_event("certificate.renewal_recovered", "info", "Renewing works again.", _NOTICE, PER_EVENT)
_event(
    "certificate.files_bad",
    "warning",
    "Files made by others cannot be used: what was good before serves on.",
    _NOTICE,
    PER_EVENT,
)
_event("certificate.files_recovered", "info", "Files made by others can be used again.", _NOTICE, PER_EVENT)
_event(
    "certificate.client_trust_loaded",
    "info",
    "Other authorities for clients, or another list of revoked certificates, hold from now on.",
    _NOTICE,
    PER_EVENT,
)
_event(
    "certificate.expiry",
    "warning",
    "A certificate, or a list of revoked ones, is about to end, or has ended.",
    _NOTICE,
    PER_EVENT,
)
_event("certificate.expiry_ended", "info", "What was about to end was renewed.", _NOTICE, PER_EVENT)
_event(
    "certificate.not_used",
    "warning",
    "New certificates failed in a handshake with ourselves.",
    "message",
    PER_EVENT,
)
_event("certificate.look_failed", "error", "The certificates could not be looked at.", "exc_info", PER_EVENT)

# --- the log itself ----------------------------------------------------------------------------------------------

_event("log.suppressed", "info", "Lines of an event beyond its limit were left out.", "of count keys")
_event("log.lost", "error", "Lines could not be written, as the disk is full or nobody reads.", "lines")
_event("log.reopened", "info", "log.file was opened anew.", "path", PER_EVENT)
_event(
    "log.not_reopened",
    "error",
    "log.file cannot be opened: the old one is used on.",
    "faults",
    PER_EVENT,
)
_event("log.level_changed", "info", "Another level holds from now on.", "new_level", PER_EVENT)
_event(
    "log.misnamed", "error", "A fault of ours: a text was logged that is no event's name.", "text", PER_EVENT
)
