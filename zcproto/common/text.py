"""Write text that is safe on one line of a terminal or a log, or in a TOML file, and parts of messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PLAIN = re.compile(r"[ -~]*")


def escape_text(text: str, limit: int | None = None) -> str:
    """Return `text` as one line with unprintable characters escaped, truncated to `limit` characters first.

    CR, LF, ESC and other control characters, U+2028, U+2029, bidirectional marks and lone surrogates become
    `\\xNN` or `\\uNNNN`, so that text from outside cannot start a new line or move the cursor.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    if _PLAIN.fullmatch(text):
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, as in "1 session" and "2,000 sessions"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return aligned columns, those in `right` aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def extra_cure(extra: str) -> str:
    """Return how to install an extra: from a clone, since `zcproto` on PyPI is another project's package."""
    return f'run in a clone of zcproto: pip install ".[{extra}]"'


def toml_string(text: str) -> str:
    """Return printable text as a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
