"""What a soak asks for."""

from __future__ import annotations

from dataclasses import dataclass

from zcproto.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """Sessions live for a short time, so that they end by themselves, too, and what has ended is forgotten."""

    minutes: float
    seed: int = 1
    churning: int = 24
    """Clients that come and go."""
    steady: int = 12
    """Clients whose connection stays from the first moment to the last."""
    pause_s: float = 0.05
    """Between two acts of a client that comes and goes, on average; of a steady one twice as long."""
    lifetime_s: float = 60.0
    refresh_lifetime_s: float = 180.0
    outage_s: float = 1.5
    """How long the disk is full, at most."""
    cycle_s: float | None = None
    """From one rest to the next. None: a tenth of all, but no longer than half a minute."""

    @property
    def seconds(self) -> float:
        return self.minutes * 60

    @property
    def cycle(self) -> float:
        return min(max(self.seconds / 10, 1.0), 30.0) if self.cycle_s is None else self.cycle_s


def check_plan(plan: SoakPlan) -> None:
    """Raises ConfigError for what would prove nothing."""
    if plan.seconds < 6 * plan.cycle:
        raise ConfigError(
            [f"--soak {plan.minutes:g}: at least 0.1: growth is judged over several cycles, a second each"]
        )
