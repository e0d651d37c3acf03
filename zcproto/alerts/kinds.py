"""Every kind of alert in one table: its severity, how it ends, what it means and what to do.

docs/reference/alerts.md is generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


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
    TLS_FAILURES = "tls.failures"
    SESSIONS_REVOKED = "session.revoked"
    REVOCATION_RATE = "session.revocation_rate"
    REFRESH_REUSED = "session.refresh_reused"
    REPLAYED = "connection.replayed"
    STALE_FRAMES = "connection.stale_frames"
    LOGINS_THROTTLED = "login.throttled"
    STORE_DEGRADED = "store.degraded"
    STORE_GRACE_OVER = "store.grace_over"
    STORE_DAMAGED = "store.damaged"
    STORE_EMPTIED = "store.emptied"
    REVOCATIONS_NOT_KEPT = "store.revocations_not_kept"
    SERVER_FULL = "server.full"
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


CATALOGUE: Final[dict[AlertKind, KindEntry]] = {
    AlertKind.CERTIFICATE_EXPIRY: KindEntry(
        Severity.WARNING,
        Ending.RESOLVED,
        "file",
        "A certificate, a CA or a CRL expires soon. Sent once for each of `certificates.alert_days`; an"
        " error from 7 days before, critical from 1 day before and after expiry.",
        "Renew it. The server renews managed certificates itself: see `certificate.renewal_failed` or"
        " `zcproto cert show` for the reason why it did not.",
        reminds_from=Severity.ERROR,  # before that, the next threshold serves as a reminder
    ),
    AlertKind.CERTIFICATE_RENEWAL: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "folder",
        "Managed certificates could not be renewed. The old ones are still served, and renewal is retried.",
        "Check that the disk has space and that the server can write to the folder of certificates.",
    ),
    AlertKind.CERTIFICATE_FILES: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "file",
        "The files of an external certificate cannot be used. The previous certificate is still served.",
        "`zcproto cert check FILE` lists the faults.",
    ),
    AlertKind.CERTIFICATE_NOT_USED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "",
        "New certificates failed the test handshake. The old ones are still served.",
        "`zcproto cert check FILE`; the message names the file.",
    ),
    AlertKind.TLS_FAILURES: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "cause",
        "Many TLS connections failed for one cause within `alerts.rate_window`: more than"
        " `alerts.tls_failures`, or ten times as many for causes that any scanner produces.",
        "`peer_rejected_certificate`: clients do not trust the certificate. `no_shared_suite`,"
        " `unsupported_version`: old clients. `certificate_*`, `pin_mismatch`: clients' certificates.",
    ),
    AlertKind.SESSIONS_REVOKED: KindEntry(
        Severity.WARNING,
        Ending.QUIET,
        "by whom",
        "Sessions were revoked by an operator, or because a user or a device was removed or changed. With"
        ' `alerts.revocations = "any"` also by users themselves.',
        "Nothing, if it was intended. Otherwise an operator's key has been stolen.",
    ),
    AlertKind.REVOCATION_RATE: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "",
        "Many sessions were revoked within `alerts.rate_window`, by anyone: more than"
        " `alerts.revocation_rate`.",
        "Ask the operators. If none of them did it, disable them with `zcproto user disable NAME`.",
    ),
    AlertKind.REFRESH_REUSED: KindEntry(
        Severity.ERROR,
        Ending.QUIET,
        "session",
        "A spent refresh token was used again: it was stolen, or a client stores its tokens incorrectly."
        " The session was ended for both holders.",
        "Ask the user; check the address in the log. `zcproto session list --user NAME` shows the user's"
        " other sessions.",
    ),
    AlertKind.REPLAYED: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "",
        "Frames were refused as replays (error 66): they were received before, or belong to another"
        " connection. Within TLS only the client itself can send them.",
        "The client is broken or controlled by an attacker; the log event `connection.refused` has its"
        " address.",
    ),
    AlertKind.STALE_FRAMES: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "",
        "Many requests were refused because their timestamps are off by more than `freshness.tolerance`.",
        "Check NTP on the server and on its clients.",
    ),
    AlertKind.LOGINS_THROTTLED: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "",
        "Many logins were delayed within `alerts.rate_window`: at least `alerts.throttled_logins`. Keys"
        " are being guessed, or a program keeps using a wrong one.",
        "The log event `login.failed` has the addresses. Block attackers in the firewall.",
    ),
    AlertKind.STORE_DEGRADED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "",
        "The session store does not answer. Known sessions remain valid for `store.grace`, new ones are"
        " refused, and revocations are queued on disk.",
        "The message has the reason. Restore the store or the disk; the server recovers without further"
        " action.",
    ),
    AlertKind.STORE_GRACE_OVER: KindEntry(
        Severity.CRITICAL,
        Ending.RESOLVED,
        "",
        "The store has been unavailable for longer than `store.grace`: all tokens are refused until it is"
        " back.",
        "As for `store.degraded`, immediately.",
    ),
    AlertKind.STORE_DAMAGED: KindEntry(
        Severity.CRITICAL,
        Ending.QUIET,
        "file",
        "The file of sessions or of pending revocations was damaged or has disappeared. A damaged file was"
        " moved aside and not deleted; the unreadable part is lost, and its users have to log in again.",
        "Check the disk. Keep the copy that the message names until you know the reason.",
    ),
    AlertKind.STORE_EMPTIED: KindEntry(
        Severity.ERROR,
        Ending.QUIET,
        "",
        "A shared store lost its data. The servers write back the sessions that they know.",
        "Find the reason: a restart without persistence, `FLUSHALL`, or a memory limit with eviction.",
    ),
    AlertKind.REVOCATIONS_NOT_KEPT: KindEntry(
        Severity.CRITICAL,
        Ending.QUIET,
        "",
        "A revocation could be written neither to the store nor to the disk, because writing failed or too"
        " many are queued. It applies to this process only, which its caller was informed of.",
        "Restore the store before you restart the server, then revoke again.",
    ),
    AlertKind.SERVER_FULL: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "limit",
        "Connections were refused: `max_connections` is reached, or the system has no more file descriptors"
        " or memory (`descriptors`).",
        "Raise the limit if the clients are legitimate; the log has their addresses.",
    ),
    AlertKind.UNDELIVERED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "sink",
        "Alerts cannot be delivered to the webhook, or the command fails. They are queued, up to a limit,"
        " and retried. The other sinks report it, and this one when it works again.",
        "`zcproto alert test` shows the problem.",
    ),
    AlertKind.TEST: KindEntry(
        Severity.INFO,
        Ending.QUIET,
        "",
        "Sent by `zcproto alert test` to verify delivery.",
        "Nothing.",
    ),
}
