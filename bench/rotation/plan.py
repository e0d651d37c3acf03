"""What a run of rotations asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from zcproto.config.model import CertificatesConfig

STATED_DELAY: Final = 1.0
"""Seconds within which a running server takes what is new in its folder: it looks once in that time."""

GRACE: Final = 0.25
"""Seconds to read the files, to have the new context prove itself, and to get one's turn on two cores."""

TAIL: Final = 0.5
"""Seconds for which new connections still come when the last certificate should be served."""

LOAD_TAIL: Final = 1.0
"""Seconds of load after that: all of them are gone when the server's connections are counted."""


@dataclass(frozen=True, slots=True)
class RotationPlan:
    """One run. Rates are per second."""

    rotations: int = 100
    interval_s: float = 1.0
    rest_s: float = 30.0
    """For how long all goes as later, but for the rotations, to know what the machine and the load alone cause."""
    new_key_every: int = 10
    """Every so many rotations the ECDSA certificate gets a new key; at all others all are renewed with theirs."""
    connections: int = 1_000
    """Those that are there from before the first rotation to after the last, each with a session."""
    rate: float = 2_000.0
    """Requests over all of them."""
    newcomers: float = 5.0
    """New connections, each of which looks at the certificate and goes."""
    delay_s: float = STATED_DELAY + GRACE
    """After this no new connection may be shown an old certificate."""
    key_types: tuple[str, ...] = CertificatesConfig().key_types
    watch_interval_s: float = STATED_DELAY

    @property
    def newcomers_s(self) -> float:
        """For how long new connections come, from the beginning of the load."""
        return self.rest_s + self.rotations * self.interval_s + self.delay_s + TAIL

    @property
    def load_s(self) -> float:
        return self.newcomers_s + LOAD_TAIL
