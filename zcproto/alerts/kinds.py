"""Every kind of alert, in one table: how grave it is, how it ends, what it means and what to do about it.

docs/reference/alerts.md is generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


class Severity(IntEnum):
    """How soon somebody has to look; a greater one is graver."""

    INFO = 1
    WARNING = 2
    ERROR = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        """The name in messages and logs."""
        return self.name.lower()


class Ending(Enum):
    """When an alert is over."""

    RESOLVED = "resolved"
    """When what it tells of is over."""
    RATE = "rate"
    """When there were few such events for a while."""
    QUIET = "quiet"
    """It tells of an event, which does not last: it is over when it has not come again for a while."""


class AlertKind(Enum):
    """The kinds. The value is the name in messages, logs and metrics: it stays."""

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
    """What is known of a kind.

    `about` is what `Alert.about` names: alerts of one kind are told apart by it. What is less grave than
    `reminds_from` is not told again while it lasts.
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
        "A certificate, an authority or a list of revoked certificates comes to its end. Told once for each of"
        " `certificates.alert_days`; an error from 7 days on, critical from 1 day on and when it has expired.",
        "Renew it. An own certificate renews itself: then see why it did not, by the alert"
        " `certificate.renewal_failed` or `zcproto cert show`.",
        reminds_from=Severity.ERROR,  # before that the next threshold comes soon enough
    ),
    AlertKind.CERTIFICATE_RENEWAL: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "folder",
        "Own certificates could not be renewed. What is served goes on, and it is tried again.",
        "See that the disk has room and that the server may write to the folder of certificates.",
    ),
    AlertKind.CERTIFICATE_FILES: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "file",
        "Files of a certificate that others make cannot be used. What was good before is served on.",
        "`zcproto cert check FILE` tells what is wrong with them.",
    ),
    AlertKind.CERTIFICATE_NOT_USED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "",
        "New certificates failed the handshake by which they prove themselves. The old ones are served on.",
        "`zcproto cert check FILE`; the message says which file.",
    ),
    AlertKind.TLS_FAILURES: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "cause",
        "Many TLS connections failed for one cause within `alerts.rate_window`: `alerts.tls_failures`, and ten"
        " times as many for the causes that any scanner makes.",
        "`peer_rejected_certificate`: clients do not trust the certificate. `no_shared_suite`,"
        " `unsupported_version`: old clients. `certificate_*`, `pin_mismatch`: clients' certificates.",
    ),
    AlertKind.SESSIONS_REVOKED: KindEntry(
        Severity.WARNING,
        Ending.QUIET,
        "by whom",
        "Sessions were revoked by an operator, or because a user or a device was removed or changed. With"
        ' `alerts.revocations = "any"` also by users themselves.',
        "Nothing, if you know of it. If not: somebody has an operator's key.",
    ),
    AlertKind.REVOCATION_RATE: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "",
        "Many sessions were revoked within `alerts.rate_window`, whoever did it: `alerts.revocation_rate`.",
        "Ask the operators. If nobody did it, take away the keys of operators by `zcproto user disable`.",
    ),
    AlertKind.REFRESH_REUSED: KindEntry(
        Severity.ERROR,
        Ending.QUIET,
        "session",
        "A refresh token was shown that had been spent before: it was stolen, or a client keeps its tokens badly."
        " The session has been ended, for both who had it.",
        "Ask the user; look for the address in the log. `zcproto session list USER` shows what else is open.",
    ),
    AlertKind.REPLAYED: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "",
        "Frames were refused as replays (error 66): they were seen before, or belong to another connection."
        " Within TLS nobody can do that but the client itself.",
        "A client with a fault, or one that somebody else directs: the log names its address at"
        " `connection.refused`.",
    ),
    AlertKind.STALE_FRAMES: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "",
        "Many requests were refused for their timestamps, which are further off than `freshness.tolerance`.",
        "See that the clocks of the server and of its clients are set, by NTP.",
    ),
    AlertKind.LOGINS_THROTTLED: KindEntry(
        Severity.WARNING,
        Ending.RATE,
        "",
        "Many logins were sent away to wait, within `alerts.rate_window`: `alerts.throttled_logins`. Somebody"
        " guesses keys, or a program tries a wrong one for ever.",
        "The log names the addresses at `login.failed`. Shut out what guesses, by the firewall.",
    ),
    AlertKind.STORE_DEGRADED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "",
        "The store of sessions does not answer. Known sessions go on for `store.grace`, new ones are refused, and"
        " revocations are written down for later.",
        "The message gives the reason. Bring the store back, or the disk; the rest is by itself.",
    ),
    AlertKind.STORE_GRACE_OVER: KindEntry(
        Severity.CRITICAL,
        Ending.RESOLVED,
        "",
        "The store has been out for longer than `store.grace`: all tokens are refused until it is back.",
        "As for `store.degraded`, with haste.",
    ),
    AlertKind.STORE_DAMAGED: KindEntry(
        Severity.CRITICAL,
        Ending.QUIET,
        "file",
        "The file of sessions, or that of revocations that wait, was found damaged, or was taken away. It was"
        " set aside, never deleted, and what could not be read of it is lost: users have to log in again.",
        "Look after the disk. Keep the copy that the message names until you know why.",
    ),
    AlertKind.STORE_EMPTIED: KindEntry(
        Severity.ERROR,
        Ending.QUIET,
        "",
        "A shared store has lost what it kept. The servers bring back the sessions that they know.",
        "See why: a restart without persistence, `FLUSHALL`, or a limit of memory with eviction.",
    ),
    AlertKind.REVOCATIONS_NOT_KEPT: KindEntry(
        Severity.CRITICAL,
        Ending.QUIET,
        "",
        "A revocation could be written neither to the store nor to the disk, as that fails or too many wait. It"
        " holds while this process runs, and its caller was told that it is not kept.",
        "Bring back the store before you restart the server, then revoke again.",
    ),
    AlertKind.SERVER_FULL: KindEntry(
        Severity.ERROR,
        Ending.RATE,
        "limit",
        "Connections were not accepted: `max_connections` is reached, or the system has no more descriptors or"
        " memory (`descriptors`).",
        "Raise the limit if they are good clients; the log has their addresses.",
    ),
    AlertKind.UNDELIVERED: KindEntry(
        Severity.ERROR,
        Ending.RESOLVED,
        "sink",
        "Alerts do not reach the webhook, or the command fails. They wait, within bounds, and are tried again."
        " It is told by the sinks that work, and by this one when it is back.",
        "`zcproto alert test` tells what happens.",
    ),
    AlertKind.TEST: KindEntry(
        Severity.INFO,
        Ending.QUIET,
        "",
        "Sent by `zcproto alert test`, to see that messages arrive.",
        "Nothing.",
    ),
}
