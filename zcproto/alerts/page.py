"""The table of all alerts in spec/alerts.md: `python -m zcproto.alerts.page` prints it.

A test compares it with the page.
"""

from __future__ import annotations

import sys
from typing import Final

from zcproto.alerts.kinds import CATALOGUE, Ending

_ENDS: Final = {
    Ending.RESOLVED: "when it is over",
    Ending.RATE: "when it is rare again",
    Ending.QUIET: "by itself",
}


def table() -> str:
    """The table, one row for each kind."""
    rows = ["| kind | severity | about | ends | what it means | what to do |", "|---|---|---|---|---|---|"]
    for kind, entry in CATALOGUE.items():
        rows.append(
            f"| `{kind.value}` | {entry.severity.word} | {entry.about} | {_ENDS[entry.ending]} | {entry.meaning}"
            f" | {entry.cure} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
