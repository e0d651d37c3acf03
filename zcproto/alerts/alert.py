"""Define an alert and the messages about it, and every kind of alert in one table.

docs/reference/alerts.md is generated from the table: the severity of each kind, how it ends, what it means and
what to do.

Rules: details are masked like values of the log, so no value contains a secret. All text is bounded and on one
line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Final

from zcproto.common.text import escape_text
from zcproto.observe.values import Loggable, loggable

MAX_ABOUT: Final = 200
"""Maximum characters of the subject of an alert."""

MAX_TITLE: Final = 300
MAX_DETAILS: Final = 16
MAX_MESSAGE: Final = 8_192
"""Maximum bytes of a message; a longer one is sent without its details."""

FORMAT: Final = 1
"""Version of the JSON format. Fields may be added to a version; none changes its meaning."""


class Severity(IntEnum):
    """How urgent an alert is; a greater value is more urgent."""

    INFO = 1
    WARNING = 2
    ERROR = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        """The name in messages and logs."""
        return self.name.lower()


class Ending(Enum):
    """How an alert ends."""

    RESOLVED = "resolved"
    """When its condition no longer holds."""
    RATE = "rate"
    """When the rate of its events has been low for a while."""
    QUIET = "quiet"
    """It reports an event, and ends when the event has not recurred for a while."""


class AlertKind(Enum):
    """The kinds. The values are names in messages, logs and metrics, and never change."""

    CERTIFICATE_EXPIRY = "certificate.expiry"
    CERTIFICATE_RENEWAL = "certificate.renewal_failed"
    CERTIFICATE_FILES = "certificate.files_bad"
    CERTIFICATE_NOT_USED = "certificate.not_used"
    CERTIFICATE_KEY_REPLACED = "certificate.key_replaced"
    TLS_FAILURES = "tls.failures"
    SESSIONS_REVOKED = "session.revoked"
    REVOCATION_RATE = "session.revocation_rate"
    REFRESH_REUSED = "session.refresh_reused"
    REPLAYED = "connection.replayed"
    STALE_FRAMES = "connection.stale_frames"
    LOGINS_THROTTLED = "login.throttled"
    ISSUER_KEYS = "oidc.keys_failed"
    MACHINE_EXPIRY = "token.expiry"
    STORE_DEGRADED = "store.degraded"
    STORE_GRACE_OVER = "store.grace_over"
    STORE_DAMAGED = "store.damaged"
    STORE_RECORD_DAMAGED = "store.record_damaged"
    STORE_EMPTIED = "store.emptied"
    STORE_MISCONFIGURED = "store.misconfigured"
    REVOCATIONS_NOT_KEPT = "store.revocations_not_kept"
    TOPICS_AWAY = "topics.away"
    INTERNAL_ERRORS = "request.internal_errors"
    SERVER_FULL = "server.full"
    CONFIG_REFUSED = "config.refused"
    FILE_UNREADABLE = "file.unreadable"
    WORKER_ENDED = "worker.ended"
    AUDIT_NOT_WRITTEN = "audit.not_written"
    UNDELIVERED = "alerts.undelivered"
    TEST = "alerts.test"


@dataclass(frozen=True, slots=True)
class KindEntry:
    """The entry of a kind in the table.

    `about` is what `Alert.about` names; it distinguishes alerts of one kind. Alerts below the severity
    `reminds_from` send no reminders.
    """

    severity: Severity
    ending: Ending
    about: str
    meaning: str
    cure: str
    reminds_from: Severity = Severity.INFO


# KIND: SEVERITY, ends ENDING[, reminds from SEVERITY][; ABOUT]. Before an error, the next threshold of
# certificate.expiry serves as a reminder.
_TABLE: Final = """
certificate.expiry: warning, ends resolved, reminds from error; file
    A certificate, a CA or a CRL expires soon. Sent once for each of `certificates.alert_days`; an error from
    7 days before, critical from 1 day before and after expiry.
    Cure: Renew it. The server renews managed certificates itself: see `certificate.renewal_failed` or
    `zcproto cert show` for the reason why it did not.
certificate.renewal_failed: error, ends resolved; folder
    Managed certificates could not be renewed. The old ones are still served, and renewal is retried.
    Cure: Check that the disk has space and that the server can write to the folder of certificates.
certificate.files_bad: error, ends resolved; file
    The files of an external certificate cannot be used. The previous certificate is still served.
    Cure: `zcproto cert check FILE` lists the faults.
certificate.not_used: error, ends resolved
    New certificates failed the test handshake. The old ones are still served.
    Cure: `zcproto cert check FILE`; the message names the file.
certificate.key_replaced: error, ends quiet; file
    A managed key was damaged or lost and has been replaced, so the pin has changed. Clients that pin the old key
    refuse the server. The message has both pins.
    Cure: Give clients the new pin, or restore the key and its certificate from a backup. `certificates.repair =
    false` refuses to start instead.
tls.failures: warning, ends rate; cause
    Many TLS connections failed for one cause within five minutes: more than `alerts.tls_failures`, or
    ten times as many for causes that any scanner produces.
    Cure: `peer_rejected_certificate`: clients do not trust the certificate. `no_shared_suite`, `no_shared_group`,
    `unsupported_version`: old clients. `certificate_*`, `pin_mismatch`: clients' certificates.
session.revoked: warning, ends quiet; by whom
    Sessions were revoked by an operator, or because a user or a device was removed or changed. With
    `alerts.revocations = "any"` also by users themselves.
    Cure: Nothing, if it was intended. Otherwise an operator's key has been stolen.
session.revocation_rate: error, ends rate
    Many sessions were revoked within five minutes, by anyone: more than `alerts.revocation_rate`.
    Cure: Ask the operators. If none of them did it, disable them with `zcproto user disable NAME`.
session.refresh_reused: error, ends quiet; session
    A spent refresh token was used again: it was stolen, or a client stores its tokens incorrectly. The
    session was ended for both holders.
    Cure: Ask the user, whom the details name; check the address in the log. `zcproto session list --user NAME`
    shows the user's other sessions.
connection.replayed: error, ends rate
    Frames were refused as replays (error 66): they were received before, or belong to another connection.
    Within TLS only the client itself can send them.
    Cure: The client is broken or controlled by an attacker; the log event `connection.refused` has its
    address.
connection.stale_frames: warning, ends rate
    Many requests were refused because their timestamps are off by more than `freshness.tolerance`.
    Cure: Check NTP on the server and on its clients.
login.throttled: warning, ends rate
    Many logins were delayed within five minutes: at least `alerts.throttled_logins`. Keys are being
    guessed, or a program keeps using a wrong one.
    Cure: The log event `login.failed` has the addresses and the names that they sent. Block attackers in the
    firewall.
oidc.keys_failed: warning, ends resolved; issuer
    The keys of an identity provider cannot be fetched. The last ones serve for a day; without any, as
    after a start, it is an error: logins by its tokens get UNAVAILABLE. Logins fetch the keys, so the alert ends
    with the first one after the provider is back.
    Cure: `zcproto doctor` checks the provider, its certificate, its keys and the clock.
token.expiry: warning, ends resolved; token
    A machine token that was used within 7 days expires: a warning from 14 days before, or the last quarter of
    its life if that is shorter; an error once it has expired.
    Cure: `zcproto token create` another one, give it to the machine, then `zcproto token revoke` the old one.
store.degraded: error, ends resolved
    The session store has not answered for five seconds. Known sessions remain valid for `store.grace`, new ones are
    refused, and revocations are queued on disk. The alert ends when the store has answered for five seconds.
    Cure: The message has the reason. Restore the store or the disk; the server recovers without further
    action.
store.grace_over: critical, ends resolved
    The store has been unavailable for longer than `store.grace`: all tokens are refused until it is back.
    Cure: As for `store.degraded`, immediately.
store.damaged: critical, ends quiet; file
    The file of sessions or of pending revocations was damaged or has disappeared. A damaged file was moved
    aside and not deleted; the unreadable part is lost, and its users have to log in again.
    Cure: Check the disk. Keep the copy that the message names until you know the reason.
store.record_damaged: error, ends quiet; key or operation
    A key in a shared store has another type or content than a server wrote. A damaged session counts as missing:
    its user has to log in again. The index of a user (`u:`) is rebuilt. Operations that need another damaged key
    fail; all others continue.
    Cure: Find what else writes to the store. Delete a damaged key. If it is an index (`x:`, `m:`), then run
    `zcproto session revoke --all`: sessions that only the index led to could not be ended otherwise.
store.emptied: error, ends quiet
    A shared store lost its data. The servers write back the sessions that they know; after `FLUSHALL` or
    `FLUSHDB` they do not, and all sessions end.
    Cure: Find the reason: a restart without persistence, a memory limit with eviction, or who sent the command.
store.misconfigured: warning, ends resolved
    The configuration of the servers of a shared store may lose sessions and revocations: persistence is off, keys
    may be evicted, a failover may lose what no replica has, or the clocks differ. Checked at the start, hourly and
    after an outage.
    Cure: The message lists the settings. `zcproto doctor` and `zcproto store check` repeat the check at once.
store.revocations_not_kept: critical, ends quiet
    A revocation could be written neither to the store nor to the disk, because writing failed or too many are
    queued. It applies to this process only, which its caller was informed of.
    Cure: Restore the store before you restart the server, then revoke again.
topics.away: warning, ends resolved
    A process has not reached the others for ten seconds: events of topics with the scope "server" reach its own
    subscribers only, and methods find and call its own clients only.
    Cure: The reason is in the log (`topics.away`). The user of Valkey or Redis needs the commands of topics and
    their channels.
request.internal_errors: error, ends rate
    Requests failed with INTERNAL within five minutes: at least `alerts.internal_errors`. Methods raise exceptions
    that are not for callers, or the server has a fault.
    Cure: The log event `request.failed` has the method, the traceback and the incident that the client got.
server.full: error, ends rate; limit
    Connections were refused: `max_connections` is reached, or the system has no more file descriptors or
    memory (`descriptors`).
    Cure: Raise the limit if the clients are legitimate; the log has their addresses.
config.refused: error, ends resolved
    A reload was refused: a server could not start with the configuration. The running one keeps the old settings,
    and a restart would be an outage.
    Cure: `zcproto config check` lists the faults. Correct them, then `zcproto reload`.
file.unreadable: error, ends resolved; file
    `users.toml`, `devices.toml` or `tokens.toml` cannot be used as it is now: it is damaged or missing, or has
    another owner or mode. The last valid content applies, and a restart would fail.
    Cure: The message has the fault and what corrects it.
worker.ended: error, ends quiet; process
    A process of a server with workers crashed or was killed, and was started again. A worker has lost its
    connections.
    Cure: The log event `worker.ended` has the signal or the error. SIGKILL is often the system, which was short of
    memory.
audit.not_written: error, ends rate
    Lines of the audit trail could not be written to `log.audit_file` within five minutes: its disk is full,
    or the reader of a named pipe is slow. 1 MiB of lines waits in memory; further ones are lost and counted.
    Cure: Make room on the disk, or restart the reader. `audit.lost` says how many lines are missing.
alerts.undelivered: error, ends resolved; sink
    Alerts cannot be delivered to the webhook, or the command fails. They are queued, up to a limit, and
    retried. The other sinks report it, and this one when it works again.
    Cure: `zcproto alert test` shows the problem.
alerts.test: info, ends quiet
    Sent by `zcproto alert test` to verify delivery.
    Cure: Nothing.
"""
_ENTRY: Final = re.compile(
    r"(?P<kind>\S+): (?P<severity>\w+), ends (?P<ending>\w+)(?:, reminds from (?P<reminds>\w+))?"
    r"(?:; (?P<about>.+))?\n"
    r"(?P<meaning>(?:    .*\n)+?)    Cure: (?P<cure>.*\n(?:    .*\n)*)"
)


def _entry(found: re.Match[str]) -> KindEntry:
    severity, reminds = found["severity"].upper(), (found["reminds"] or "info").upper()
    meaning, cure = (" ".join(found[name].split()) for name in ("meaning", "cure"))
    ending, about = Ending(found["ending"]), found["about"] or ""
    return KindEntry(Severity[severity], ending, about, meaning, cure, Severity[reminds])


CATALOGUE: Final[dict[AlertKind, KindEntry]] = {
    AlertKind(found["kind"]): _entry(found) for found in _ENTRY.finditer(_TABLE)
}
assert list(CATALOGUE) == list(AlertKind), "every kind has one entry, in the order of the enumeration"


class Phase(Enum):
    """Phases of an alert."""

    BEGAN = "began"
    CHANGED = "changed"
    """The severity increased, or the subject changed."""
    REMINDER = "reminder"
    """The alert is still open after another `alerts.repeat`."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Alert:
    """A snapshot of an alert.

    `kind` and `about` identify it; raising the same again increments `count`. `about` is empty if the kind needs
    none. Times are milliseconds since the Unix epoch; `ended_at` is None while the alert is open. `is_many`
    marks the summary of all alerts of a kind that were too many to be sent one by one; its `about` is empty.
    """

    kind: AlertKind
    about: str
    severity: Severity
    title: str
    details: Mapping[str, Loggable]
    began_at: int
    last_at: int
    ended_at: int | None
    count: int
    is_many: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON fields of the alert."""
        return {
            "kind": self.kind.value,
            "about": self.about,
            "severity": self.severity.word,
            "title": self.title,
            "details": dict(self.details),
            "began_at": self.began_at,
            "last_at": self.last_at,
            "ended_at": self.ended_at,
            "count": self.count,
            "many": self.is_many,
        }


@dataclass(frozen=True, slots=True)
class Message:
    """A message about an alert. `number` increases by one per message of a process."""

    number: int
    phase: Phase
    alert: Alert

    def as_json(self, origin: str, source: str) -> bytes:
        """Return the message for a webhook or command as one line of ASCII.

        `origin` is random per process: with the number it forms a unique id, which stays the same when a message is
        retried. `source` names the server for people.
        """
        fields: dict[str, Any] = {
            "format": FORMAT,
            "id": f"{origin}-{self.number}",
            "phase": self.phase.value,
            "source": source,
            "alert": self.alert.as_dict(),
        }
        body = _encode(fields)
        if len(body) > MAX_MESSAGE:
            fields["alert"]["details"] = {"oversize": len(body)}
            body = _encode(fields)
        return body


def _encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def clean_text(text: str, limit: int) -> str:
    """Return `text` escaped to one line and cut to `limit`."""
    return escape_text(escape_text(text, limit), limit)


def clean_details(details: Mapping[str, object]) -> dict[str, Loggable]:
    """Return the first details, masked and bounded."""
    return {name: loggable(name, value) for name, value in list(details.items())[:MAX_DETAILS]}
