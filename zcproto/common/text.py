"""Text from outside, made safe to print on one line of a terminal or a log."""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[ -~]*")


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line, with all that does not print escaped, cut to `limit` characters.

    CR, LF, ESC, the other control characters, U+2028, U+2029, the marks that turn the direction of writing
    and lone surrogates become `\\xNN` or `\\uNNNN`: no name can start a new line or move the cursor.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    if _PLAIN.fullmatch(text):
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
