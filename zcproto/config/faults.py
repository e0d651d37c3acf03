"""The words in which a fault of the configuration is told.

Rules: one line for each fault, with the key, what it was, where it came from, and what would be right. Text
of the operator is escaped and cut. A value under a name that speaks of secrets, what follows the scheme of an
address, and PEM text is never shown.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from zcproto.common.text import escape_text
from zcproto.config.model import keys, rules, sections, split_key
from zcproto.config.rules import quoted
from zcproto.config.tables import nearest

MAX_SHOWN = 60
"""Characters of a key or a value that are shown."""

_SECRET = re.compile(r"secret|passw|passphrase|token|credential|private|(^|[._-])keys?$", re.IGNORECASE)
# What stands where the place of a passphrase is named may be the passphrase itself.
_PLACE_OF_SECRET = re.compile(r"passphrase", re.IGNORECASE)
_INDEX = re.compile(r"\[[0-9]+\]")
_PEM = "-----BEGIN"
_ADDRESS = re.compile(r"([A-Za-z0-9+.-]{1,20})://.*", re.DOTALL)
_MAX_BITS = 256
_MAX_NESTING = 2


def fault(key: str, value: object, source: str, sentence: str) -> str:
    """One fault as a line."""
    return f"{escape_text(key, MAX_SHOWN)} = {show(key, value)} ({source}): {sentence}"


def show(key: str, value: object) -> str:
    """The value under `key`, for people."""
    return "(hidden)" if hides(key) else escape_text(_text(value), MAX_SHOWN)


def written(key: str, value: object) -> str:
    """The value under `key`, which its rule has accepted, as TOML for people."""
    return "(hidden)" if hides(key) else _ADDRESS.sub(r'\1://(hidden)"', rules()[key].write(value))


def hides(key: str) -> bool:
    """Whether the value under `key` is not for the eyes of people."""
    # certificates.key holds paths.
    secret = _PLACE_OF_SECRET if _INDEX.sub("", key) in keys() else _SECRET
    return secret.search(key) is not None


def _text(value: object, depth: int = 0) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Path):
        return quoted(str(value))
    if value is None:
        return "(nothing)"
    if isinstance(value, str):
        # An @ may be that of an address written wrong, behind a password.
        if _PEM in value or ("@" in value and not _ADDRESS.match(value)):
            return "(hidden)"
        return quoted(_ADDRESS.sub(r"\1://(hidden)", value[: 2 * MAX_SHOWN]))
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "(a huge number)"  # Python refuses to write out the largest ones
    if isinstance(value, list | tuple):
        if depth == _MAX_NESTING:
            return "[...]"
        return f"[{', '.join(_text(each, depth + 1) for each in value[:MAX_SHOWN])}]"
    if isinstance(value, dict):
        return "(a table)"
    return str(value)


def unknown_key(key: str) -> str:
    """What to say of a key that does not exist in a section that does."""
    section, name = split_key(key[: 2 * MAX_SHOWN])
    known = [split_key(each)[1] for each in rules() if each.startswith(f"{section}.")]
    elsewhere = _keys_named(name)
    if not elsewhere:
        elsewhere = [f"{section}.{near}" for near in nearest(name, known)]
    if not elsewhere:
        elsewhere = _nearest_anywhere(name)
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; [{section}] has {', '.join(known)}"


def unknown_section(section: str, name: str = "") -> str:
    """What to say of a section that does not exist. `name` is the key in it, if one alone is spoken of."""
    near = difflib.get_close_matches(section[: 2 * MAX_SHOWN], sections(), 1)
    if near and not name:
        return f"unknown section; did you mean [{near[0]}]?"
    candidates = [f"{near[0]}.{name}"] if near and f"{near[0]}.{name}" in rules() else _nearest_anywhere(name)
    if candidates:
        return f"unknown section; did you mean {' or '.join(candidates)}?"
    return f"unknown section; there are {', '.join(sections())}"


def outside_section(name: str) -> str:
    """What to say of a key that stands above all sections."""
    candidates = _nearest_anywhere(name[: 2 * MAX_SHOWN])
    if candidates:
        return f"stands in no section; did you mean {' or '.join(candidates)}?"
    return f"stands in no section; the sections are {', '.join(sections())}"


def _keys_named(name: str) -> list[str]:
    return [key for key in rules() if split_key(key)[1] == name]


def _nearest_anywhere(name: str) -> list[str]:
    names = {split_key(key)[1] for key in rules()}
    # Across all sections a match has to be closer than within one: chance finds something among fifty names.
    return [key for near in nearest(name, sorted(names), 0.75) for key in _keys_named(near)]
