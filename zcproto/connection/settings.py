"""Define the limits of a server connection, with the defaults of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zcproto.wire.frame import MIN_LENGTH, VERSION
from zcproto.wire.message import DEFAULT_MAX_DEPTH, encode_body


@dataclass(frozen=True, slots=True)
class TransportSecurityPolicy:
    """Strict transport security for native clients, after RFC 6797: how long to require verified TLS."""

    max_age_s: int = 31_536_000
    include_subdomains: bool = True


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Limits of one server connection. Lengths are in bytes; names give the unit of times."""

    server: str = "zcproto"
    max_frame: int = 1_048_576
    max_frame_before_session: int = 16_384
    max_streams: int = 128
    max_depth: int = DEFAULT_MAX_DEPTH
    tolerance_ms: int = 30_000
    idle_timeout_s: float = 300.0
    open_timeout_s: float = 10.0
    max_stale_in_a_row: int = 10
    retry_busy_ms: int = 100
    retry_draining_ms: int = 1_000
    looks_up: bool = False
    """Unknown tokens may be valid in a shared store and must be looked up."""
    sts: TransportSecurityPolicy = TransportSecurityPolicy()
    welcome_body: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Encoded once, because it is the same on every connection.
        object.__setattr__(self, "welcome_body", encode_body(self._welcome()))

    def _welcome(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "versions": [VERSION],
            "max_frame": self.max_frame,
            "max_streams": self.max_streams,
            "idle_timeout_ms": round(self.idle_timeout_s * 1000),
            "tolerance_ms": self.tolerance_ms,
            "sts": {"max_age": self.sts.max_age_s, "include_subdomains": self.sts.include_subdomains},
        }

    @property
    def max_body(self) -> int:
        """Return the maximum body of an answer, in bytes."""
        return self.max_frame - MIN_LENGTH
