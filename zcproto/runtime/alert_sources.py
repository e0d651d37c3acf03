"""What of a server's life is an alert: each fact with the kind that it is of, and how grave it is.

Facts come from those who log them too: certificates, the store, sessions. What any peer can cause is not told one
by one, but counted, and an alert if it is much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import ServerAlerts
from zcproto.auth import Login
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.errors import Code
from zcproto.server.state import ServerState
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsAcceptor

ERROR_DAYS: Final = 7
CRITICAL_DAYS: Final = 1
"""The thresholds of `certificates.alert_days` from which on the end of a certificate is graver."""

BY_SCANNERS: Final = frozenset(
    {
        TlsFailure.NOT_TLS,
        TlsFailure.PLAINTEXT_HTTP,
        TlsFailure.MALFORMED_CLIENT_HELLO,
        TlsFailure.CLIENT_HELLO_TOO_LARGE,
        TlsFailure.UNSUPPORTED_VERSION,
        TlsFailure.NO_SHARED_SUITE,
        TlsFailure.NO_APPLICATION_PROTOCOL,
        TlsFailure.HANDSHAKE_TIMEOUT,
        TlsFailure.DISCONNECTED,
        TlsFailure.CONNECTION_RESET,
        TlsFailure.TRUNCATED,
    }
)
"""What anybody causes who tries ports, or whose network is bad: ten times as many are an alert."""

SCANNERS_FACTOR: Final = 10


# --- certificates ------------------------------------------------------------------------------------------


def tell_certificate(alerts: ServerAlerts, notice: Notice) -> None:
    """What a notice about certificates means for the alerts."""
    match notice.kind:
        case NoticeKind.EXPIRY:
            assert notice.days is not None
            assert notice.left is not None
            alerts.raise_(
                AlertKind.CERTIFICATE_EXPIRY,
                notice.message,
                about=notice.path,
                severity=_expiry_severity(notice.days),
                changed=True,
                details={
                    "seconds_left": round(notice.left.total_seconds()),
                    "threshold_days": notice.days,
                },
            )
        case NoticeKind.EXPIRY_ENDED:
            alerts.resolve(AlertKind.CERTIFICATE_EXPIRY, notice.message, about=notice.path)
        case NoticeKind.RENEWAL_FAILED:
            alerts.raise_(AlertKind.CERTIFICATE_RENEWAL, notice.message, about=notice.path)
        case NoticeKind.RENEWAL_RECOVERED:
            alerts.resolve(AlertKind.CERTIFICATE_RENEWAL, notice.message, about=notice.path)
        case NoticeKind.FILES_BAD:
            alerts.raise_(AlertKind.CERTIFICATE_FILES, notice.message, about=notice.path)
        case NoticeKind.FILES_RECOVERED:
            alerts.resolve(AlertKind.CERTIFICATE_FILES, notice.message, about=notice.path)
        case _:
            pass  # nothing is wrong


def _expiry_severity(days: int) -> Severity:
    if days <= CRITICAL_DAYS:
        return Severity.CRITICAL
    return Severity.ERROR if days <= ERROR_DAYS else Severity.WARNING


def tell_certificates_not_used(alerts: ServerAlerts, problem: str) -> None:
    """New certificates did not prove themselves, and why; empty: they did."""
    if problem:
        title = f"new certificates are not used: {problem}"
        alerts.raise_(AlertKind.CERTIFICATE_NOT_USED, title, changed=True)
    else:
        alerts.resolve(AlertKind.CERTIFICATE_NOT_USED, "new certificates are used")


# --- the store ---------------------------------------------------------------------------------------------


def tell_store(alerts: ServerAlerts, event: str, values: Mapping[str, Any]) -> None:
    """What an event of the store of sessions means for the alerts. `event` is its name in the log."""
    reason = values.get("reason", "")
    match event:
        case "store.degraded":
            title = f"the store of sessions does not answer: {reason}"
            alerts.raise_(AlertKind.STORE_DEGRADED, title, details=values)
        case "store.grace_over":
            title = f"the store has been out for too long, all tokens are refused: {reason}"
            alerts.raise_(AlertKind.STORE_GRACE_OVER, title, details=values)
        case "store.recovered":
            title = "the store of sessions answers again"
            alerts.resolve(AlertKind.STORE_GRACE_OVER, title)
            alerts.resolve(AlertKind.STORE_DEGRADED, title, details=values)
        case "store.emptied":
            alerts.raise_(
                AlertKind.STORE_EMPTIED, "the store of sessions has lost what it kept", details=values
            )
        case "store.damaged":
            title = "the file of sessions is damaged, and was set aside"
            alerts.raise_(AlertKind.STORE_DAMAGED, title, about=str(values.get("path", "")), details=values)
        case "store.missing":
            title = "the file of sessions was taken away while it was in use"
            alerts.raise_(AlertKind.STORE_DAMAGED, title, about=str(values.get("path", "")), details=values)
        case "revocations.damaged":
            title = "the file of revocations that wait was damaged; a copy is kept"
            alerts.raise_(AlertKind.STORE_DAMAGED, title, about=str(values.get("copy", "")), details=values)
        case "revocations.not_kept":
            title = f"a revocation could not be written down: {reason}"
            alerts.raise_(AlertKind.REVOCATIONS_NOT_KEPT, title, details=values)
        case _:
            pass  # nothing that somebody has to be told of


# --- sessions ----------------------------------------------------------------------------------------------


def tell_refresh_reused(alerts: ServerAlerts, session_id: str, address: str) -> None:
    """A spent refresh token was shown, and its session has ended."""
    title = f"a refresh token was used twice, at last from {address}: its session was ended"
    alerts.raise_(AlertKind.REFRESH_REUSED, title, about=session_id, details={"peer": address})


def tell_revoked(alerts: ServerAlerts, by: str, sessions: int, by_user: bool) -> None:
    """Somebody has ended sessions. `by` says who, for people; `by_user`: their own."""
    wanted = alerts.config.revocations
    if sessions and (wanted == "any" or (wanted == "operators" and not by_user)):
        severity = Severity.INFO if by_user else None
        title = f"{sessions} session{'s' if sessions > 1 else ''} revoked: {by}"
        details = {"sessions": sessions}
        alerts.raise_(AlertKind.SESSIONS_REVOKED, title, about=by, severity=severity, details=details)


# --- rates -------------------------------------------------------------------------------------------------


def watch_rates(alerts: ServerAlerts, *, state: ServerState, acceptor: TlsAcceptor, login: Login) -> None:
    """Have the counters watched that are an alert if they grow fast."""
    config = alerts.config
    window = f"{config.rate_window:g} s"
    counters = state.counters
    for cause in TlsFailure:
        threshold = config.tls_failures * (SCANNERS_FACTOR if cause in BY_SCANNERS else 1)
        alerts.watch(
            AlertKind.TLS_FAILURES,
            lambda cause=cause: acceptor.failures[cause],  # type: ignore[misc]
            threshold,
            lambda count, cause=cause: f"{count} TLS connections failed within {window}: {cause.value}",  # type: ignore[misc]
            about=cause.value,
        )
    alerts.watch(
        AlertKind.REPLAYED,
        lambda: counters.errors.get(Code.REPLAYED, 0),
        config.replays,
        lambda count: f"{count} frames were refused as replays within {window}",
    )
    alerts.watch(
        AlertKind.STALE_FRAMES,
        lambda: counters.refused.get(("stale", Code.STALE_TIMESTAMP), 0) + counters.dropped_stale,
        config.stale_frames,
        lambda count: f"{count} frames had a timestamp too far off within {window}",
    )
    alerts.watch(
        AlertKind.LOGINS_THROTTLED,
        lambda: login.throttled,
        config.throttled_logins,
        lambda count: f"{count} logins were sent away to wait within {window}",
    )
    alerts.watch(
        AlertKind.REVOCATION_RATE,
        lambda: state.revoked,
        config.revocation_rate,
        lambda count: f"{count} sessions were revoked within {window}",
    )
    alerts.watch(
        AlertKind.SERVER_FULL,
        lambda: counters.refused_full,
        config.refused_connections,
        lambda count: f"{count} connections found no room within {window}: limits.max_connections is reached",
        about="max_connections",
    )
    alerts.watch(
        AlertKind.SERVER_FULL,
        lambda: counters.accept_failed,
        config.refused_connections,
        lambda count: f"accepting a connection failed {count} times within {window}: the system has no room",
        about="descriptors",
    )
