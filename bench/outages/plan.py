"""What a run of outages asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutagePlan:
    """One run. Rates are per second."""

    seconds: float = 10.0
    """How long each outage lasts; what is before and after it takes half as long, or until all is well again."""
    sessions: int = 500
    """Those that are known before the outage, each on a connection of its own."""
    shared: int = 50
    """Of these, how many are used on the second server as well."""
    rate: float = 1_000.0
    """Requests over all connections."""
    openings: float = 10.0
    refreshes: float = 5.0
    revocations: float = 8.0
    only: tuple[str, ...] = ()
    """Names of outages; all if there is none."""

    @property
    def quiet_s(self) -> float:
        """How long the load runs before the outage, and after it is over."""
        return self.seconds / 2
