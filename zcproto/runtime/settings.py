"""What connections and sessions are allowed, by the configuration of a server."""

from __future__ import annotations

from zcproto.common.clock import MS_PER_SECOND
from zcproto.config import Config
from zcproto.connection.settings import ConnectionSettings, TransportSecurityPolicy
from zcproto.sessions import SessionSettings


def connection_settings(config: Config) -> ConnectionSettings:
    """Limits of a connection that begins now."""
    limits = config.limits
    return ConnectionSettings(
        max_frame=limits.max_frame_bytes,
        max_frame_before_session=limits.max_frame_bytes_before_session,
        max_streams=limits.max_streams,
        max_depth=limits.max_depth,
        tolerance_ms=to_ms(config.freshness.tolerance),
        idle_timeout_s=limits.idle_timeout,
        open_timeout_s=config.sessions.open_timeout,
        # Whether browsers are told is not asked: this one is for clients that speak nothing but TLS anyway.
        sts=TransportSecurityPolicy(config.http.hsts_max_age_seconds, config.http.hsts_include_subdomains),
    )


def session_settings(config: Config) -> SessionSettings:
    """How long sessions live, and how many there may be."""
    sessions = config.sessions
    return SessionSettings(
        lifetime_ms=to_ms(sessions.lifetime),
        idle_timeout_ms=None if sessions.idle_timeout is None else to_ms(sessions.idle_timeout),
        per_user=sessions.per_user,
        when_full="evict_oldest" if sessions.when_full == "evict_oldest" else "refuse",
        refresh=sessions.refresh,
        refresh_lifetime_ms=to_ms(sessions.refresh_lifetime),
        refresh_grace_ms=to_ms(sessions.refresh_grace),
    )


def to_ms(seconds: float) -> int:
    """Seconds as whole milliseconds."""
    return round(seconds * MS_PER_SECOND)
