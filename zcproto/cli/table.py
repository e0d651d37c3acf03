"""Rows for people: columns of one width each, safe on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from zcproto.common.text import escape_text

MAX_CELL = 128


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their heads. Cells may hold anything."""
    cells = [list(head), *([escape_text(cell, MAX_CELL) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
