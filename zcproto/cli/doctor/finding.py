"""The result of one check, with its fix."""

from __future__ import annotations

from typing import Final, NamedTuple

OK: Final = "ok"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
FAULT: Final = "fault"

Result = tuple[str, ...]
"""The fields of a Finding except its check."""


class Finding(NamedTuple):
    """One line of the report. `cure` is empty if nothing has to be done."""

    check: str
    state: str
    found: str
    cure: str = ""


def from_message(message: str) -> Result:
    """Return the fault of an error message, whose fix follows the first semicolon."""
    found, _, cure = message.partition("; ")
    return FAULT, found, cure
