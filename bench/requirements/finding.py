"""What was found for a requirement, and the verdict on its row. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, no password
    FAIL = "FAIL"
    NONE = "no figure"
    SMALL = "small"
    """It held, in a run that is smaller than the requirement asks for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What fills a row."""

    figure: str
    holds: bool
    aim: bool | None = None
    """Whether the aim beyond the target was reached; None if there is no aim."""
    small: bool = False
    """Whether less was measured than the requirement is about."""
    values: dict[str, float] = field(default_factory=dict)
    """The figures as numbers, by name with their unit."""
    tests: tuple[str, ...] = ()
    """Tests that showed it."""

    @property
    def verdict(self) -> Verdict:
        if not self.holds:
            return Verdict.FAIL
        return Verdict.SMALL if self.small else Verdict.PASS

    def as_json(self) -> dict[str, Any]:
        return {
            "figure": self.figure,
            "holds": self.holds,
            "aim_reached": self.aim,
            "small": self.small,
            "values": {name: round(value, 6) for name, value in self.values.items()},
            "tests": list(self.tests),
        }


class Scale(NamedTuple):
    """How times and rates on this machine compare with bars and loads that were set on the reference machine."""

    slowdown: float = 1.0
    """How many times slower than the reference machine this one is; at least 1."""

    def time(self, measured: float) -> float:
        """Return what a measured time counts as."""
        return measured / self.slowdown

    def rate(self, measured: float) -> float:
        """Return what a measured rate counts as."""
        return measured * self.slowdown

    def offered(self, rate: float) -> float:
        """Return the rate to offer in place of one that the reference machine can serve."""
        return rate / self.slowdown

    def note(self, counted: str) -> str:
        """Return what to add to a figure on a slower machine."""
        if self.slowdown == 1:
            return ""
        return f"; this machine is {self.slowdown:.2f} times slower than the reference, so it counts as {counted}"
