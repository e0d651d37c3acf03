"""The names of users and devices: what a good one is, and how it is shown and written down."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from zcproto.auth.identity import MAX_USER
from zcproto.common.text import escape_text

_SHOWN: Final = 60
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def name_faults(name: str) -> list[str]:
    """What is wrong with a name. Names that look the same must be the same: so NFC, and no space around."""
    if not 0 < len(name) <= MAX_USER:
        return [f"a name has 1 to {MAX_USER} characters"]
    if not name.isprintable() or name != name.strip() or not unicodedata.is_normalized("NFC", name):
        return ["a name has printable characters, in Unicode's form NFC, and no space at its ends"]
    return []


def quoted(name: str) -> str:
    """Any text in the place of a name, safe to show."""
    return f'"{escape_text(name, _SHOWN)}"'


def toml_string(name: str) -> str:
    """A good name as a string of TOML."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def toml_key(name: str) -> str:
    """A good name as a key of TOML."""
    return name if _BARE_KEY.fullmatch(name) else toml_string(name)
