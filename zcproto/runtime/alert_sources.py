"""Turn events of a server into alerts, by tables: certificates, the store, sessions and counters.

Events that any peer can cause are not raised one by one: they are counted, and a fast growth is an alert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

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
"""Thresholds of `certificates.alert_days` from which expiry is an error or critical."""

BY_SCANNERS: Final = frozenset(
    {
        *(TlsFailure.NOT_TLS, TlsFailure.PLAINTEXT_HTTP, TlsFailure.MALFORMED_CLIENT_HELLO),
        *(TlsFailure.CLIENT_HELLO_TOO_LARGE, TlsFailure.UNSUPPORTED_VERSION, TlsFailure.NO_SHARED_SUITE),
        *(TlsFailure.NO_APPLICATION_PROTOCOL, TlsFailure.HANDSHAKE_TIMEOUT, TlsFailure.DISCONNECTED),
        *(TlsFailure.CONNECTION_RESET, TlsFailure.TRUNCATED),
    }
)
"""Causes that port scans and bad networks produce: their threshold is SCANNERS_FACTOR times as high."""

SCANNERS_FACTOR: Final = 10

_CERTIFICATE_BEGINS: Final = {
    NoticeKind.RENEWAL_FAILED: AlertKind.CERTIFICATE_RENEWAL,
    NoticeKind.FILES_BAD: AlertKind.CERTIFICATE_FILES,
}
_CERTIFICATE_ENDS: Final = {
    NoticeKind.EXPIRY_ENDED: AlertKind.CERTIFICATE_EXPIRY,
    NoticeKind.RENEWAL_RECOVERED: AlertKind.CERTIFICATE_RENEWAL,
    NoticeKind.FILES_RECOVERED: AlertKind.CERTIFICATE_FILES,
}


class _StoreAlert(NamedTuple):
    """The alert that a store event raises. `title` may use its values; `about` names the value of the subject."""

    kind: AlertKind
    title: str
    about: str = ""


_STORE_BEGINS: Final = {
    "store.degraded": _StoreAlert(AlertKind.STORE_DEGRADED, "the session store is unavailable: {reason}"),
    "store.grace_over": _StoreAlert(
        AlertKind.STORE_GRACE_OVER, "the store outage exceeds store.grace, all tokens are refused: {reason}"
    ),
    "store.emptied": _StoreAlert(AlertKind.STORE_EMPTIED, "the session store lost its data"),
    "store.damaged": _StoreAlert(
        AlertKind.STORE_DAMAGED, "the session file is damaged and was moved aside", "path"
    ),
    "store.missing": _StoreAlert(
        AlertKind.STORE_DAMAGED, "the session file was removed while it was in use", "path"
    ),
    "revocations.damaged": _StoreAlert(
        AlertKind.STORE_DAMAGED, "the file of pending revocations is damaged; a copy is kept", "copy"
    ),
    "revocations.not_kept": _StoreAlert(
        AlertKind.REVOCATIONS_NOT_KEPT, "a revocation could not be written to disk: {reason}"
    ),
}


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
    elif event in _STORE_BEGINS:
        kind, title, about = _STORE_BEGINS[event]
        title = title.format(reason=values.get("reason", ""))
        alerts.raise_(kind, title, about=str(values.get(about, "")), details=values)


def on_refresh_reused(alerts: ServerAlerts, session_id: str, address: str) -> None:
    """Raise an alert for a session that ended because its refresh token was reused."""
    title = f"a refresh token was reused, last from {address}: its session was ended"
    alerts.raise_(AlertKind.REFRESH_REUSED, title, about=session_id, details={"peer": address})


def on_revoked(alerts: ServerAlerts, by: str, sessions: int, by_user: bool) -> None:
    """Raise an alert for revoked sessions. `by` names the revoker for people; `by_user` if they were their own."""
    wanted = alerts.config.revocations
    if sessions and (wanted == "any" or (wanted == "operators" and not by_user)):
        severity = Severity.INFO if by_user else None
        title = f"{sessions} session{'s' if sessions > 1 else ''} revoked: {by}"
        details = {"sessions": sessions}
        alerts.raise_(AlertKind.SESSIONS_REVOKED, title, about=by, severity=severity, details=details)


class _Counter(NamedTuple):
    """A counter whose growth is an alert. `title` gets `count` and `window`."""

    kind: AlertKind
    read: Callable[[], int]
    threshold: int
    title: str
    about: str = ""


def watch_rates(alerts: ServerAlerts, *, state: ServerState, acceptor: TlsAcceptor, login: Login) -> None:
    """Watch the counters whose fast growth is an alert."""
    config = alerts.config
    counters = state.counters

    def tls_failures(cause: TlsFailure) -> _Counter:
        factor = SCANNERS_FACTOR if cause in BY_SCANNERS else 1
        title = f"{{count}} TLS connections failed within {{window}}: {cause.value}"
        threshold = config.tls_failures * factor
        return _Counter(
            AlertKind.TLS_FAILURES, lambda: acceptor.failures[cause], threshold, title, cause.value
        )

    watched = [
        *map(tls_failures, TlsFailure),
        _Counter(
            AlertKind.REPLAYED,
            lambda: counters.errors.get(Code.REPLAYED, 0),
            config.replays,
            "{count} frames were refused as replays within {window}",
        ),
        _Counter(
            AlertKind.STALE_FRAMES,
            lambda: counters.refused.get(("stale", Code.STALE_TIMESTAMP), 0) + counters.dropped_stale,
            config.stale_frames,
            "{count} frames had a timestamp out of tolerance within {window}",
        ),
        _Counter(
            AlertKind.LOGINS_THROTTLED,
            lambda: login.throttled,
            config.throttled_logins,
            "{count} logins were throttled within {window}",
        ),
        _Counter(
            AlertKind.REVOCATION_RATE,
            lambda: state.revoked,
            config.revocation_rate,
            "{count} sessions were revoked within {window}",
        ),
        _Counter(
            AlertKind.SERVER_FULL,
            lambda: counters.refused_full,
            config.refused_connections,
            "{count} connections were refused within {window}: limits.max_connections is reached",
            "max_connections",
        ),
        _Counter(
            AlertKind.SERVER_FULL,
            lambda: counters.accept_failed,
            config.refused_connections,
            "accepting a connection failed {count} times within {window}: no descriptors or memory left",
            "descriptors",
        ),
    ]
    window = f"{config.rate_window:g} s"
    for counter in watched:
        alerts.watch(
            counter.kind,
            counter.read,
            counter.threshold,
            lambda count, title=counter.title: title.format(count=count, window=window),  # type: ignore[misc]
            about=counter.about,
        )
