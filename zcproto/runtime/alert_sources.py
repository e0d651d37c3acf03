"""Turn events of a server into alerts, by tables: certificates, the store, sessions and counters.

Events that any peer can cause are not raised one by one: they are counted, and a fast growth is an alert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import WINDOW_S, ServerAlerts
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.common.text import counted
from zcproto.errors import Code
from zcproto.observe.log import audit_failures
from zcproto.tls.failure import TlsFailure

ERROR_DAYS: Final = 7
CRITICAL_DAYS: Final = 1
"""Thresholds of `certificates.alert_days` from which expiry is an error or critical."""

BY_SCANNERS: Final = frozenset(
    {
        *(TlsFailure.NOT_TLS, TlsFailure.PLAINTEXT_HTTP, TlsFailure.MALFORMED_CLIENT_HELLO),
        *(TlsFailure.CLIENT_HELLO_TOO_LARGE, TlsFailure.UNSUPPORTED_VERSION, TlsFailure.NO_SHARED_SUITE),
        *(TlsFailure.NO_SHARED_GROUP, TlsFailure.NO_SHARED_PARAMETERS),
        *(TlsFailure.NO_APPLICATION_PROTOCOL, TlsFailure.HANDSHAKE_TIMEOUT, TlsFailure.DISCONNECTED),
        *(TlsFailure.CONNECTION_RESET, TlsFailure.TRUNCATED),
    }
)
"""Causes that port scans and bad networks produce: their threshold is SCANNERS_FACTOR times as high."""

SCANNERS_FACTOR: Final = 10

_CERTIFICATE_BEGINS: Final = {
    NoticeKind.RENEWAL_FAILED: AlertKind.CERTIFICATE_RENEWAL,
    NoticeKind.FILES_BAD: AlertKind.CERTIFICATE_FILES,
    NoticeKind.KEY_REPLACED: AlertKind.CERTIFICATE_KEY_REPLACED,
}
_CERTIFICATE_ENDS: Final = {
    NoticeKind.EXPIRY_ENDED: AlertKind.CERTIFICATE_EXPIRY,
    NoticeKind.RENEWAL_RECOVERED: AlertKind.CERTIFICATE_RENEWAL,
    NoticeKind.FILES_RECOVERED: AlertKind.CERTIFICATE_FILES,
}


_STORE_BEGINS: Final = {
    "store.degraded": (AlertKind.STORE_DEGRADED, "the session store is unavailable: {reason}"),
    "store.grace_over": (
        AlertKind.STORE_GRACE_OVER,
        "the store outage exceeds store.grace, all tokens are refused: {reason}",
    ),
    "store.emptied": (AlertKind.STORE_EMPTIED, "the session store lost its data"),
    "store.damaged": (AlertKind.STORE_DAMAGED, "the session file is damaged and was moved aside"),
    "store.flushed": (AlertKind.STORE_EMPTIED, "all keys of the session store were deleted by a command"),
    "store.record_damaged": (
        AlertKind.STORE_RECORD_DAMAGED,
        "a record in the session store is damaged: {reason}",
    ),
    "store.missing": (AlertKind.STORE_DAMAGED, "the session file was removed while it was in use"),
    "revocations.damaged": (
        AlertKind.STORE_DAMAGED,
        "the file of pending revocations is damaged; a copy is kept",
    ),
    "revocations.not_kept": (
        AlertKind.REVOCATIONS_NOT_KEPT,
        "a revocation could not be written to disk: {reason}",
    ),
}
"""The alert of a store event, and its title with values of the event."""


def on_certificate_notice(alerts: ServerAlerts, notice: Notice) -> None:
    """Raise or resolve the alert of a notice about certificates."""
    if notice.kind is NoticeKind.EXPIRY:
        assert notice.days is not None
        assert notice.left is not None
        alerts.raise_(
            AlertKind.CERTIFICATE_EXPIRY,
            notice.message,
            about=notice.path,
            severity=_expiry_severity(notice.days),
            changed=True,
            details={"seconds_left": round(notice.left.total_seconds()), "threshold_days": notice.days},
        )
    elif notice.kind in _CERTIFICATE_BEGINS:
        alerts.raise_(_CERTIFICATE_BEGINS[notice.kind], notice.message, about=notice.path)
    elif notice.kind in _CERTIFICATE_ENDS:
        alerts.resolve(_CERTIFICATE_ENDS[notice.kind], notice.message, about=notice.path)


def _expiry_severity(days: int) -> Severity:
    if days <= CRITICAL_DAYS:
        return Severity.CRITICAL
    return Severity.ERROR if days <= ERROR_DAYS else Severity.WARNING


def on_certificates_checked(alerts: ServerAlerts, problem: str) -> None:
    """Raise an alert if new certificates failed their test handshake; resolve it if `problem` is empty."""
    if problem:
        title = f"new certificates are not used: {problem}"
        alerts.raise_(AlertKind.CERTIFICATE_NOT_USED, title, changed=True)
    else:
        alerts.resolve(AlertKind.CERTIFICATE_NOT_USED, "new certificates are used")


def on_store_event(alerts: ServerAlerts, event: str, values: Mapping[str, Any]) -> None:
    """Raise or resolve the alerts of a store event, given by its name in the log."""
    if event == "store.recovered":
        title = "the session store is available again"
        alerts.resolve(AlertKind.STORE_GRACE_OVER, title)
        alerts.resolve(AlertKind.STORE_DEGRADED, title, details=values)
    elif event == "store.misconfigured":
        faults = values["faults"]
        if faults:
            title = f"the session store is not configured safely: {faults}"
            alerts.raise_(AlertKind.STORE_MISCONFIGURED, title, details=values)
        else:
            alerts.resolve(AlertKind.STORE_MISCONFIGURED, "the session store is configured safely")
    elif event in _STORE_BEGINS:
        kind, title = _STORE_BEGINS[event]
        about = str(values.get("path", values.get("copy", values.get("where", ""))))
        alerts.raise_(kind, title.format_map(values), about=about, details=values)


def on_topics_checked(alerts: ServerAlerts, is_away: bool) -> None:
    """Raise or resolve the alert of a process that cannot reach the others."""
    if is_away:
        alerts.raise_(AlertKind.TOPICS_AWAY, "topics and clients of other processes cannot be reached")
    else:
        alerts.resolve(AlertKind.TOPICS_AWAY, "topics and clients of other processes can be reached again")


def on_file_read(alerts: ServerAlerts, path: Path, faults: Sequence[str]) -> None:
    """Raise the alert of a file that a running server cannot read, or resolve it if there are no `faults`."""
    if faults:
        title = f"the last valid content applies, and a restart would fail: {faults[0]}"
        details = {"faults": list(faults)}
        alerts.raise_(AlertKind.FILE_UNREADABLE, title, about=str(path), changed=True, details=details)
    else:
        alerts.resolve(AlertKind.FILE_UNREADABLE, f"{path} can be read again", about=str(path))


def on_issuer_failed(alerts: ServerAlerts, issuer: str, reason: str, can_serve: bool) -> None:
    """Raise the alert of an identity provider whose keys cannot be fetched; `can_serve`: the last ones still do."""
    what = "the last ones serve" if can_serve else "logins by its tokens are not possible"
    title = f"the keys of {issuer} cannot be fetched, {what}: {reason}"
    severity = Severity.WARNING if can_serve else Severity.ERROR
    alerts.raise_(AlertKind.ISSUER_KEYS, title, about=issuer, severity=severity, changed=True)


def on_issuer_answered(alerts: ServerAlerts, issuer: str) -> None:
    """Resolve the alert of an identity provider."""
    alerts.resolve(AlertKind.ISSUER_KEYS, f"the keys of {issuer} were fetched", about=issuer)


def on_refresh_reused(alerts: ServerAlerts, session_id: str, user: str, address: str) -> None:
    """Raise an alert for a session that ended because its refresh token was reused."""
    title = f"a refresh token{user and f' of {user}'} was reused, last from {address}: its session was ended"
    details = {**({"user": user} if user else {}), "peer": address}
    alerts.raise_(AlertKind.REFRESH_REUSED, title, about=session_id, details=details)


def on_revoked(alerts: ServerAlerts, by: str, sessions: int, by_user: bool) -> None:
    """Raise an alert for revoked sessions. `by` names the revoker for people; `by_user` if they were their own."""
    wanted = alerts.config.revocations
    if sessions and (wanted == "any" or (wanted == "operators" and not by_user)):
        severity = Severity.INFO if by_user else None
        title = f"{counted(sessions, 'session')} revoked: {by}"
        details = {"sessions": sessions}
        alerts.raise_(AlertKind.SESSIONS_REVOKED, title, about=by, severity=severity, details=details)


def watch_rates(parts: Parts) -> None:
    """Watch the counters whose fast growth is an alert."""
    alerts, state, acceptor, login = parts.alerts, parts.state, parts.acceptor, parts.login
    config, counters = alerts.config, state.counters
    window = f"{WINDOW_S:g} s"

    def watch(kind: AlertKind, threshold: int, read: Callable[[], int], title: str, about: str = "") -> None:
        alerts.watch(kind, read, threshold, lambda count: title.format(count=count, window=window), about)

    for cause in TlsFailure:
        watch(
            AlertKind.TLS_FAILURES,
            config.tls_failures * (SCANNERS_FACTOR if cause in BY_SCANNERS else 1),
            partial(acceptor.failures.__getitem__, cause),
            f"{{count}} TLS connections failed within {{window}}: {cause.value}",
            cause.value,
        )
    watch(
        AlertKind.REPLAYED,
        1,  # replays have no innocent cause
        lambda: counters.errors[Code.REPLAYED],
        "{count} frames were refused as replays within {window}",
    )
    watch(
        AlertKind.INTERNAL_ERRORS,
        config.internal_errors,
        lambda: counters.incidents,
        "{count} requests failed with INTERNAL within {window}",
    )
    watch(
        AlertKind.STALE_FRAMES,
        config.stale_frames,
        lambda: counters.refused.get(("stale", Code.STALE_TIMESTAMP), 0) + counters.dropped_stale,
        "{count} frames had a timestamp out of tolerance within {window}",
    )
    watch(
        AlertKind.LOGINS_THROTTLED,
        config.throttled_logins,
        lambda: login.throttled,
        "{count} logins were throttled within {window}",
    )
    watch(
        AlertKind.REVOCATION_RATE,
        config.revocation_rate,
        lambda: state.registry.revoked,
        "{count} sessions were revoked within {window}",
    )
    watch(
        AlertKind.SERVER_FULL,
        config.refused_connections,
        lambda: counters.refused_full,
        "{count} connections were refused within {window}: limits.max_connections is reached",
        "max_connections",
    )
    watch(
        AlertKind.SERVER_FULL,
        config.refused_connections,
        lambda: counters.accept_failed,
        "accepting a connection failed {count} times within {window}: no descriptors or memory left",
        "descriptors",
    )
    watch(
        AlertKind.AUDIT_NOT_WRITTEN,
        1,
        audit_failures,
        "lines of the audit trail could not be written {count} times within {window}",
    )
