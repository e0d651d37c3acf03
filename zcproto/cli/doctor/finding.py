"""What a check has found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import click

from zcproto.common.text import escape_text

OK: Final = "ok"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
FAULT: Final = "fault"

_MAX_SHOWN: Final = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `cure` is empty where there is nothing to do."""

    check: str
    state: str
    found: str
    cure: str = ""

    @property
    def data(self) -> dict[str, Any]:
        return {"check": self.check, "state": self.state, "found": self.found, "cure": self.cure or None}


def told(check: str, sentence: str, state: str = FAULT) -> Finding:
    """A fault in the words of whoever found it: the cure follows the first semicolon."""
    found, _, cure = sentence.partition("; ")
    return Finding(check, state, found, cure)


def as_text(findings: Iterable[Finding]) -> str:
    """Lines for people: state, check, what was found, and below it what to do."""
    lines = []
    for each in findings:
        colour = {OK: "green", WARNING: "yellow", FAULT: "red"}.get(each.state)
        state = click.style(f"{each.state:<8}", fg=colour)
        lines.append(f"{state}  {each.check:<12}  {escape_text(each.found, _MAX_SHOWN)}")
        if each.cure:
            lines.append(f"{'':<24}{escape_text(each.cure, _MAX_SHOWN)}")
    return "\n".join(lines)
