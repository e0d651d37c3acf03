"""Define every log event: name, level, meaning, fields and rate limit.

Rules:
- One name for one fact: the part of the program and what happened, `part.what_happened`.
- Events that a peer can cause at will have a limit, which `zcproto.observe.log` enforces for all callers.
- docs/reference/log-events.md is generated from this table; a test compares the table with all places that log.

Add an event to the table below first, and each new field to FIELDS.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class Limit(NamedTuple):
    """Lines per minute for each key, the values of the fields `by`. Further lines are only counted."""

    lines: int
    by: tuple[str, ...] = ()
    total: int | None = None
    """Lines per minute for all keys together; None if there are few keys."""


LIMITS: Final[dict[str, Limit | None]] = {
    "none": None,
    # What any stranger can cause. Ten lines show what one address does; 300 for all addresses are at most about
    # 100 MB a day per event.
    "per address": Limit(10, ("peer",), 300),
    "per cause": Limit(10, ("cause", "peer"), 300),
    "per code": Limit(10, ("peer", "code"), 300),
    "per reason": Limit(10, ("peer", "reason"), 300),
    "rare": Limit(10),
    # What authenticated users cause: every line is wanted unless a client misbehaves. 60,000 is more than the
    # sessions that a server can open in a minute.
    "per user": Limit(120, ("user",), 60_000),
    "per operator": Limit(120, ("operator",), 6_000),
    # Internal errors and failures of a disk or store, which may repeat with every attempt or request.
    "per event": Limit(60),
    "per method": Limit(60, ("what",), 300),
    "debugging": Limit(600, ("peer",), 6_000),
}


class LogEvent(NamedTuple):
    """An event. `by_peer`: anyone who can reach the port, or has a session, can cause it at will.

    `audit` is the outcome that an event of the audit trail states, success or failure; empty for all others.
    """

    name: str
    level: str
    meaning: str
    fields: tuple[str, ...]
    limit: Limit | None
    by_peer: bool
    audit: str = ""


FIELDS: Final[dict[str, str]] = {
    "about": "subject of an alert, unique among those of its kind",
    "all": "true if all sessions of the server were meant",
    "added": "names that are new in a file, the first 16",
    "aside": "path to which a damaged file was moved",
    "at": "place in the program: file, line, function",
    "balancer": "address of the load balancer that forwarded the connection",
    "call": "id of a pending call",
    "can_serve": "whether the last keys of an identity provider still verify tokens",
    "changed": "configuration keys with new values; names that have changed in a file, the first 16",
    "setting": "key of the configuration, such as limits.max_streams",
    "old": "value of a setting before a reload, as in the file; empty if it may be a secret",
    "new": "value of a setting in the new configuration; empty if it may be a secret",
    "effect": "when a change takes effect: live, new connections, new sessions, restart",
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
    "denied": "roles of a session by which a method is denied",
    "details": "values of an alert",
    "device": "name of a device",
    "exc_info": "exception: its type, and the first line of its message",
    "exc_info_at": "stack of the exception, if the line has no traceback: file, line, function",
    "faults": "list of problems, one sentence each",
    "file": "file name of a certificate, or the names that it is valid for",
    "group": "group of the TLS key exchange, such as X25519MLKEM768",
    "host": "listening address",
    "issuer": "address of an identity provider",
    "ids": "ids of the sessions that were meant, the first 16",
    "incident": "id returned to the caller, to find this line",
    "keys": "number of peers, users or causes of the suppressed lines",
    "kind": "kind of an alert, see docs/alerts.md",
    "left": "sessions that are still to be loaded",
    "limit": "value of the limit",
    "lines": "number of lines",
    "lost": "total of messages lost by this sink",
    "machine": "name of a machine token",
    "message": "description in a sentence",
    "missing": "roles of which one is needed",
    "new_level": "new log level",
    "of": "name of the suppressed event",
    "operator": "user who did it",
    "oversize": "characters of a line that was too long and was written without its longest values",
    "path": "path of a file",
    "peer": "address of the peer",
    "pending": "revocations not yet written to the store",
    "pid": "process id: of the peer of the control socket, of a command or of a worker",
    "pins": "pins of public keys, in the form that clients accept",
    "port": "TCP port",
    "reason": "reason",
    "removed": "names that are no longer in a file, the first 16",
    "where": "key in the store, or operation that met it",
    "replayed": "pending revocations written to the store",
    "restart": "changed keys that require a restart",
    "retry_after_s": "seconds until the next attempt",
    "roles": "new roles of a user or device",
    "run": "id of a durable run, chosen by its client",
    "scheme": "login scheme: api_key, device, certificate",
    "seconds": "duration",
    "session": "public id of a session; not a credential",
    "sessions": "number of sessions",
    "severity": "info, warning, error or critical",
    "signal": "what was to be sent: traces, metrics or logs",
    "sink": "receiver of alerts: webhook or command",
    "span_id": "id of the span that was current, with `telemetry.traces`; in any line",
    "suppressed": "lines of this event and key suppressed before this one",
    "text": "text logged instead of a name, or what a library reports",
    "topic": "name of a topic",
    "trace_id": "id of the trace that was current, or through which an exception has passed; in any line",
    "traceback": "lines of the traceback, with causes, notes and the members of groups, see `log.exceptions`",
    "threshold_days": "reached threshold of certificates.alert_days",
    "title": "alert in a sentence",
    "uid": "system user id of the peer of the control socket, or of a command",
    "user": "name of a user",
    "wanted": "required value",
    "what": "name of a method, operation, worker or internal step",
    "worker": "process of a server with several workers: its number, or coordinator; in every line that it writes",
    "workers": "number of workers",
    "which": "id of the session that was meant, or all",
}
"""Meaning of each field, in every event."""

_TABLE: Final = """
# NAME LEVEL (FIELDS) [by peer][, limit LIMIT][, audit OUTCOME]
#     MEANING

# The server
server.listening info (host port), audit success
    The server listens on an address.
server.redirecting info (host port)
    The server redirects from a plaintext port to https.
server.file_limit warning (limit wanted cure)
    The limit on open files is below limits.max_connections.
server.traceable warning (cure)
    Other processes of this user can read the server's memory.
server.key_log_ignored warning (cure)
    SSLKEYLOGFILE is set; it is ignored and no keys are written.
server.runs_as_root warning (cure)
    The server runs as root, which it does not need.
server.start_waits warning (what seconds)
    A port or the file of sessions is still in use, as after a server was killed; the start waits so long for it.
server.socket_renewed warning (path)
    A socket of the running server was removed from the home folder; it is made again.
server.socket_missing error (path reason), limit per event
    Such a socket cannot be made again; that is repeated.
service_manager.unreachable warning (cure)
    NOTIFY_SOCKET is set, but the service manager does not answer there.
worker.ready info (worker pid)
    A process of a server with several workers has started.
worker.ended error (worker pid reason retry_after_s)
    A process ended unexpectedly and is started again. Its connections are lost, those of other workers are not.
worker.hangs error (worker pid seconds)
    The event loop of a process did not run within server.hang_timeout, or WatchdogSec=; it is aborted, and writes
    its stacks to stderr.
worker.not_ready error (worker pid seconds)
    A process was not ready within server.lifespan_timeout and server.hang_timeout together; it is aborted, writes
    its stacks to stderr, and is started again.
worker.killed error (worker pid)
    A process did not end within its time and is killed.
worker.silent warning (what pid cause), limit per event
    A worker did not answer in time. Its figures are missing in status and metrics; those of the others are shown.
workers.threads warning (cure)
    The program started threads before the fork of the workers: a lock that one holds then stays locked in them.
workers.reload_slow warning (count seconds)
    Processes have not applied a new configuration in time; they still apply it when they can.
workers.gave_up error (seconds)
    No worker could be started for this long: the server ends.
upgrade.started info (pid), audit success
    A new server was started beside this one, to replace it.
upgrade.done info (pid), audit success
    The new server serves. This one drains its workers and ends.
upgrade.slow error (pid seconds), audit failure
    The new server did not serve within server.upgrade_timeout; it is ended.
upgrade.failed error (reason cure), audit failure
    The new server has ended before it served. This one serves on; the output of the new one has the reason.
server.draining info (connections), audit success
    The server drains: it accepts nothing new and finishes requests in flight.
server.methods_stuck error (count)
    Methods did not end after they were cancelled.
lifespan.failed error (what exc_info)
    The lifespan of the application failed at its start or end, or ended while the server ran, which then drains.
lifespan.stuck error (what seconds)
    The lifespan of the application did not start or end within server.lifespan_timeout, and was cancelled.
server.runs_go_on info (count seconds)
    The connections of a server that drains have ended. Methods of durable streams may go on for `seconds`
    (`streams.durable_drain`), while their clients read them at other processes.
server.ended info (cut_off), audit success
    The server has ended; all connections are closed.
server.start_stopped info ()
    A signal ended the server before it listened. The next start creates what is missing.
server.forced warning ()
    A second signal ended the server at once.
loop.held warning (what at seconds) by peer, limit per method
    A method, or a middleware, held the event loop for longer than 100 ms: nothing else ran meanwhile.
server.fault error (what exc_info) by peer, limit per event
    Internal error in the event loop.

# The configuration, read again
config.reloaded info (changed restart), limit per event, audit success
    The configuration was reloaded. Changes are active, except those that require a restart.
config.changed info (setting old new effect), audit success
    One changed setting of a reload, with its values unless they may be secrets; `effect` says when it applies.
config.overridden warning (restart cure), limit per event
    A reload did not apply keys of the file: options of `zcproto serve` have other values for them.
config.refused error (faults), limit per event, audit failure
    The reloaded configuration is invalid; the previous one stays active.

# The control socket
control.refused warning (uid pid), limit per event, audit failure
    Another user tried to use the control socket.
control.unavailable warning (path reason)
    The control socket cannot be created in the home folder.
control.asked info (what uid pid user device roles ids call all sessions), limit per event, audit success
    An operation was requested by the control socket.
control.failed info (what uid pid user device reason), limit per event, audit failure
    An operation was requested by the control socket, and failed.
command.done info (what uid pid user device machine roles ids all sessions), audit success
    A command made a change itself: no server ran, or the change needs none.
command.failed info (what uid pid user device machine reason), audit failure
    Such a command failed.

# Connections
listener.exhausted error (reason retry_after_s) by peer, limit rare
    A connection cannot be accepted: the system has no descriptors or memory left.
connection.refused_full info (limit) by peer, limit rare
    A connection was refused: limits.max_connections is reached.
connection.refused_per_address info (peer balancer limit) by peer, limit per address
    A connection was refused: limits.connections_per_address is reached.
connection.refused_per_network info (peer balancer limit) by peer, limit per address
    A connection was refused: the share of its network in tls.max_pending waits for handshakes.
connection.refused_flooding info (peer balancer limit) by peer, limit per address
    A connection was refused: limits.failed_handshakes_per_network is reached.
tls.failed info (cause peer) by peer, limit per cause
    A TLS handshake or connection failed.
tls.challenge_answered info (peer) by peer, limit per address
    A CA, or a peer that poses as one, got the answer to a challenge by TLS.
connection.opened debug (peer connection group) by peer, limit debugging
    A connection was opened after its handshake. `group` is that of the key exchange.
connection.ended debug (peer connection reason) by peer, limit debugging
    A connection ended.
connection.refused info (peer connection code reason) by peer, limit per code
    A connection was ended because of invalid input.
connection.aborted info (peer connection reason) by peer, limit per reason
    A connection was reset because its peer does not read.
request.limited info (peer user what) by peer, limit per address
    A request was refused: a limit of requests a second or in progress of `limits` is reached.
request.denied info (peer user what missing denied) by peer, limit per user, audit failure
    A session called a method that its roles do not allow: it has none of the missing roles, or one that denies it.
stream.cut info (peer user what reason) by peer, limit per user
    A stream was cancelled because of its client or network: an item waited too long for credit (slow), a frame was
    delayed for too long (stale), or had another token than the stream (wrong_token), or the session was refreshed
    elsewhere and its new token not shown on this connection (token_rotated): an old client, or a stolen token. Or
    too many items of its user waited for their methods (memory), or a reload has denied its method to the session
    (denied).
run.cancelled info (user run what reason session) by peer, limit per user
    The method of a durable stream was cancelled: by its client (caller), at the deadline of its first OPEN,
    without a reader (abandoned), with the session that opened it (token_revoked), by a reload of `auth.role`
    (denied), or at the end of the server (draining).
connection.certificate_revoked warning (peer connection) by peer, limit per address, audit failure
    A connection was closed because its client certificate was revoked.
request.failed error (what incident exc_info peer connection) by peer, limit per method
    A method or the server raised an unexpected exception. The caller got only the incident id.

# Sessions
session.opened info (session user peer connection scheme client) by peer, limit per user, audit success
    A session was opened.
session.refreshed info (session user peer connection client) by peer, limit per user, audit success
    A session was refreshed.
session.revoked info (session user peer connection which sessions) by peer, limit per user, audit success
    A user revoked one of their sessions, or all.
session.closed info (session user peer connection) by peer, limit per user, audit success
    A session was closed by its client.
session.evicted info (session) by peer, limit per event, audit success
    A session that no connection used ended, because its user had reached sessions.per_user and logged in again.
call.asked info (call user what session peer) by peer, limit per user, audit success
    A pending call was asked of a user: by a method for the session and peer of its caller, or by the application.
call.answered info (call user what session peer operator code) by peer, limit per user, audit success
    A pending call was answered by a session of the user, or by an operator. `code`: the answer was this error.
call.expired info (call user what) by peer, limit per user, audit failure
    A pending call was not answered in time.
call.withdrawn info (call user what reason) by peer, limit per user, audit failure
    A pending call ended without an answer, with the method that waited for it or the session of its caller.
session.not_admitted info (peer connection session) by peer, limit per address, audit failure
    A token was refused from an address that its session is not bound to.
session.refresh_reused warning (session user peer) by peer, limit per address, audit failure
    A spent refresh token was reused, so it may be stolen; the session was ended.
oidc.keys_loaded info (issuer count)
    The keys of an identity provider were fetched: for the first time, after a failure, or others than before.
oidc.keys_failed warning (issuer reason can_serve)
    The keys of an identity provider cannot be fetched. `can_serve`: the last ones serve, for a day.
login.failed info (user peer connection scheme) by peer, limit per address, audit failure
    A login failed. `user` is the name for which it counts, as sent: not proved, `device:NAME` for a device.
login.certificate_refused info (peer reason) by peer, limit per address, audit failure
    A login by client certificate was refused: it names no user who may log in.
login.device_refused info (peer reason) by peer, limit per address, audit failure
    A login by device key was refused.
login.refused info (scheme peer reason) by peer, limit per address, audit failure
    An authenticator of the application refused a login, by an error with this reason.
login.timed_out warning (scheme peer) by peer, limit per address, audit failure
    An authenticator of the application took longer than `limits.login_timeout`, and was cancelled.
http.token_refused info (peer machine reason) by peer, limit per address, audit failure
    The token of an HTTPS request was refused; with the name of the machine, if it is one of `zcproto token`.
device.enrolled info (device user peer connection) by peer, limit per user, audit success
    A device was enrolled with a code of `zcproto pair`.
device.not_enrolled info (device peer connection) by peer, limit per address, audit failure
    A device was not enrolled: its code is wrong, used or expired.
operator.revoked warning (operator user ids all sessions peer) by peer, limit per operator, audit success
    An operator revoked sessions of other users.
user.gone info (user sessions), audit success
    A user was removed, disabled or given another key.
device.gone info (device user sessions), audit success
    A device was removed or changed.
sessions.loading info (sessions left)
    The server begins to work, and loads the rest of the sessions from the store meanwhile.
sessions.loaded info (sessions)
    Sessions were loaded from the store.
sessions.left_out error (sessions cure)
    Stored sessions were not loaded because the table is full.

# OpenTelemetry
telemetry.sdk warning (text), limit rare
    OpenTelemetry's SDK reported a problem, such as a collector that does not answer.
telemetry.lost warning (signal count)
    The server has ended before all spans, log records or metrics were sent: five seconds were over.

# Users, devices and machine tokens: files of the home folder
users.changed info (count added changed removed), limit per event, audit success
    users.toml has changed: by a command, a program or an editor.
users.readable info (), limit per event
    users.toml is readable again.
users.unreadable error (faults), limit per event, audit failure
    users.toml cannot be read; the last valid content stays active.
users.look_failed error (exc_info), limit per event
    users.toml could not be checked.
users.not_gone error (user exc_info), limit per event
    Sessions of a removed or changed user could not be revoked.
devices.changed info (count added changed removed), limit per event, audit success
    devices.toml has changed: by an enrollment, a command or an editor.
devices.readable info (), limit per event
    devices.toml is readable again.
devices.unreadable error (faults), limit per event, audit failure
    devices.toml cannot be read; the last valid content stays active.
devices.look_failed error (exc_info), limit per event
    devices.toml could not be checked.
devices.not_gone error (device exc_info), limit per event
    Sessions of a removed device could not be revoked.

tokens.changed info (count added changed removed), limit per event, audit success
    tokens.toml has changed: a machine token was created or revoked.
tokens.readable info (), limit per event
    tokens.toml is readable again.
tokens.unreadable error (faults), limit per event, audit failure
    tokens.toml cannot be read; the last valid content stays active.
tokens.uses_not_stored warning (faults), limit per event
    The last use of tokens could not be written to tokens.toml. They are valid all the same.

# The store
store.slow warning (reason sessions pending), limit per event
    The store did not answer in time: known sessions stay valid, new ones are refused until it does. If that takes
    longer than five seconds, `store.degraded` follows.
store.degraded error (reason sessions pending), limit per event
    The store is unavailable: known sessions stay valid, new ones are refused.
store.grace_over error (reason), limit per event
    The outage exceeds store.grace: every token is refused.
store.stalled warning (seconds), limit per event
    The server did not run for a while: no token is accepted until the store has answered.
store.recovered warning (seconds replayed), limit per event
    The store is available again.
store.moved info (seconds)
    Another process has opened the store, by order, as in an upgrade. Logins had to wait for so long.
store.emptied error (sessions), limit per event
    The store lost its data unexpectedly; known sessions are written to it again.
store.missing error (path), limit per event
    The file of the store is missing; a new one was created.
store.damaged error (path aside reason), limit per event
    The file of the store is damaged; it was moved aside and a new one created.
store.flushed error (sessions), limit per event
    All keys of the store were deleted by FLUSHALL or FLUSHDB, which ends all sessions.
store.misconfigured warning (faults), limit per event
    The configuration of the store's servers may lose sessions and revocations. Logged at the start and every hour.
store.record_damaged error (where reason), limit per event
    A key in the store has another type or content than a server wrote.
store.close_failed error (reason), limit per event
    The store could not be closed.
store.uses_not_written warning (reason)
    The last use of sessions could not be written at shutdown.
store.probe_failed error (exc_info), limit per event
    Internal error in a probe of the store.
store.task_failed error (exc_info) by peer, limit per event
    Internal error in a background operation of the store.
store.upkeep_failed error (what exc_info), limit per event
    Internal error in periodic maintenance of sessions.
revocations.damaged error (copy), limit per event
    Pending revocations could not be read; their file was moved aside.
revocations.not_kept error (reason) by peer, limit per event
    A revocation is active on this server but could not be written to disk.
revocations.not_removed warning (reason), limit per event
    Revocations already in the store could not be removed from the pending ones; they are replayed again.

# Topics of all processes
topics.away warning (reason), limit per event
    Events of topics with the scope "server" reach the subscribers of their own process alone, and clients of other
    processes are neither found nor called.
topics.back info (), limit per event
    Events reach all processes again. Subscribers of others have missed those published meanwhile.
topics.refused warning (topic reason), limit per event
    The store has refused events of a topic; subscribers of other processes have missed them.
topics.split warning (topic workers)
    A topic with the scope "process" has subscribers in several workers: each gets the events of its own worker.

# Durable runs of all processes
runs.away warning (reason), limit per event
    The store of durable runs cannot be reached: their methods and readers wait.
runs.back info (), limit per event
    The store of durable runs is there again. What it had lost of the runs of this process is written back.
runs.owner_lost warning (user run count), limit per event
    The process that ran the method of a durable stream was lost after `count` items. The run has ended with
    UNKNOWN, and is not run again.
runs.refused warning (reason), limit per event
    The store has refused an operation of a durable run. It is repeated.

# Alerts
alert.began warning (kind about severity title details count) by peer, limit per event
    An alert began, see docs/alerts.md. The level is that of its severity; error for critical.
alert.changed warning (kind about severity title details count) by peer, limit per event
    The severity or subject of an alert changed.
alert.reminder warning (kind about severity title details count) by peer, limit per event
    An alert is still active.
alert.ended info (kind about severity title details count) by peer, limit per event
    An alert ended.
alert.lost error (sink what reason lost) by peer, limit per event
    A message about an alert could not be delivered to a webhook or command.
alert.sink_failed error (sink exc_info), limit per event
    Internal error in a webhook or command.
alert.tick_failed error (exc_info), limit per event
    Internal error in the evaluation of counters for alerts.

# Certificates (all fields are optional)
certificate.loaded info (file message pins days_left threshold_days), limit per event, audit success
    An existing certificate was loaded.
certificate.renewed info (file message pins days_left threshold_days), limit per event, audit success
    A certificate was issued or renewed.
certificate.key_rotated info (file message pins days_left threshold_days), limit per event, audit success
    A certificate was renewed with a new key.
certificate.key_replaced warning (file message pins days_left threshold_days), limit per event, audit success
    A managed key was damaged or lost and has been replaced; the message has the old and the new pin.
certificate.next_pins info (file message pins days_left threshold_days), limit per event, audit success
    Pins of future keys are announced to clients.
certificate.renewal_failed warning (file message pins days_left threshold_days), limit per event, audit failure
    A certificate could not be renewed; the current one stays active.
certificate.renewal_recovered info (file message pins days_left threshold_days), limit per event
    Renewal works again.
certificate.files_bad warning (file message pins days_left threshold_days), limit per event
    External certificate files are invalid; the last valid ones stay active.
certificate.files_recovered info (file message pins days_left threshold_days), limit per event
    External certificate files are valid again.
certificate.client_trust_loaded info (file message pins days_left threshold_days), limit per event, audit success
    New client CAs or a new revocation list (CRL) are active.
certificate.expiry warning (file message pins days_left threshold_days), limit per event
    A certificate or revocation list (CRL) expires soon or has expired.
certificate.expiry_ended info (file message pins days_left threshold_days), limit per event
    An expiring certificate or revocation list (CRL) was replaced.
certificate.progress info (message)
    What happens to the server's certificates and keys; printed instead if standard error is a terminal.
certificate.attention warning (message)
    As certificate.progress, and clients are affected: they need another CA file, or cannot verify a certificate.
certificate.not_used warning (message), limit per event, audit failure
    New certificates failed a test handshake and are not used.
certificate.look_failed error (exc_info), limit per event
    Internal error in the check of certificates.

# The log itself
log.suppressed info (of count keys)
    Lines of an event above its limit were suppressed.
log.lost error (lines)
    Lines were lost because the disk is full or the reader of the log is slow.
log.reopened info (path), limit per event
    log.file or log.audit_file was reopened.
log.not_reopened error (faults), limit per event
    log.file or log.audit_file cannot be reopened; the previous file stays in use.
log.level_changed info (new_level), limit per event, audit success
    The log level was changed.
audit.lost error (lines), audit failure
    Lines of the audit trail were lost because the disk is full or its reader is slow. The trail has this line too.
log.misnamed error (text), limit per event
    Internal error: a text was logged in place of the name of an event.
"""
_HEAD: Final = re.compile(
    r"(\S+) (\w+) \(([^)]*)\)( by peer)?(?:, limit ([a-z ]+))?(?:, audit (success|failure))?"
)


def _event(entry: str) -> LogEvent:
    head, *meaning = entry.split("\n    ")
    match = _HEAD.fullmatch(head)
    assert match is not None, (
        f"{head!r} is not: NAME LEVEL (FIELDS) [by peer][, limit LIMIT][, audit OUTCOME]"
    )
    name, level, fields, by_peer, limit, audit = match.groups(default="")
    return LogEvent(
        name, level, " ".join(meaning), tuple(fields.split()), LIMITS[limit or "none"], bool(by_peer), audit
    )


EVENTS: Final[dict[str, LogEvent]] = {
    event.name: event for event in map(_event, re.findall(r"^[^#\s].*(?:\n .+)*", _TABLE, re.MULTILINE))
}
"""All events by name."""
