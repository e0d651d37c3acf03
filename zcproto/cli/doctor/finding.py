"""The result of one check, with its fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

OK: Final = "ok"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
FAULT: Final = "fault"

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


def from_message(message: str) -> Result:
    """Return the fault of an error message, whose fix follows the first semicolon."""
    found, _, cure = message.partition("; ")
    return FAULT, found, cure
