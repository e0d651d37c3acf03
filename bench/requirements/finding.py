"""What was found of a requirement, and what that makes of its row. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from zcproto.common.text import escape_text

SHOWN: Final = 3
"""Facts that are wrong are named up to this number."""


class Fact(NamedTuple):
    """One thing that was looked at."""

    what: str
    right: bool
    seen: str


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, no password
    FAIL = "FAIL"
    NONE = "no figure"
    SMALL = "small"
    """It held, in a run that is smaller than what the requirement asks for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What fills a row."""

    figure: str
    holds: bool
    aim: bool | None = None
    """Whether what is aimed at beyond the target was reached; None if nothing is."""
    small: bool = False
    """Whether less was measured than the requirement is about."""
    values: dict[str, float] = field(default_factory=dict)
    """The figures as numbers, by name with their unit."""
    facts: tuple[Fact, ...] = ()

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
            "facts": [each._asdict() for each in self.facts],
        }


class Facts:
    """Facts that together are one row: it holds if there are some, and all are right."""

    def __init__(self) -> None:
        self._facts: list[Fact] = []

    def note(self, what: str, right: bool, seen: object = "") -> None:
        self._facts.append(Fact(what, bool(right), escape_text(str(seen), 200)))

    def equal(self, what: str, seen: object, wanted: object) -> None:
        self.note(what, seen == wanted, seen if seen == wanted else f"{seen!r} instead of {wanted!r}")

    def finding(self, figure: str, **others: Any) -> Finding:
        """`figure` says in a few words what was seen if all is right; else the wrong facts are named."""
        wrong = [each for each in self._facts if not each.right]
        if wrong:
            named = "; ".join(f"{each.what}: {each.seen or 'no'}" for each in wrong[:SHOWN])
            more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            figure = f"{len(wrong)} of {len(self._facts)} facts wrong: {named}{more}"
        elif not self._facts:
            figure = "nothing was looked at"
        holds = bool(self._facts) and not wrong
        return Finding(figure, holds, facts=tuple(self._facts), **others)
