"""The result of one check, with its fix."""

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

Result = tuple[str, ...]
"""The fields of a Finding except its check."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `cure` is empty if nothing has to be done."""

    check: str
    state: str
    found: str
    cure: str = ""

    @property
    def data(self) -> dict[str, Any]:
        return {"check": self.check, "state": self.state, "found": self.found, "cure": self.cure or None}


def named(check: str, results: Iterable[Result]) -> list[Finding]:
    """Return the results of one check as findings."""
    return [Finding(check, *result) for result in results]


def from_message(message: str, state: str = FAULT) -> Result:
    """Return the result for an error message, whose fix follows the first semicolon."""
    found, _, cure = message.partition("; ")
    return state, found, cure


def as_text(findings: Iterable[Finding]) -> str:
    """Return lines with state, check and result, and the fix below."""
    lines = []
    for each in findings:
        colour = {OK: "green", WARNING: "yellow", FAULT: "red"}.get(each.state)
        state = click.style(f"{each.state:<8}", fg=colour)
        lines.append(f"{state}  {each.check:<12}  {escape_text(each.found, _MAX_SHOWN)}")
        if each.cure:
            lines.append(f"{'':<24}{escape_text(each.cure, _MAX_SHOWN)}")
    return "\n".join(lines)
