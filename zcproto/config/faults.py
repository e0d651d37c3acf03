"""Word the faults of a configuration.

Rules: one line for each fault, with the key, its value, where the value came from, and what would be right. Text
of the operator is escaped and truncated. Values of keys named like secrets, what follows the scheme of an address,
and PEM text are never shown.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final

from zcproto.common.text import escape_text
from zcproto.config.checks import split_key
from zcproto.config.model import keys, sections, settings
from zcproto.config.types import nearest, quoted

MAX_SHOWN: Final = 60
"""Characters of a key or a value that are shown."""

_SECRET: Final = re.compile(
    r"secret|passw|passphrase|token|credential|private|(^|[._-])keys?$", re.IGNORECASE
)
# An operator may put the passphrase itself where its file or variable is expected.
_PLACE_OF_SECRET: Final = re.compile(r"passphrase", re.IGNORECASE)
_INDEX: Final = re.compile(r"\[[0-9]+\]")
_PEM: Final = "-----BEGIN"
_ADDRESS: Final = re.compile(r"([A-Za-z0-9+.-]{1,20})://.*", re.DOTALL)
_MAX_BITS: Final = 256
_MAX_NESTING: Final = 2


def fault(key: str, value: object, source: str, sentence: str) -> str:
    """Return one fault as a line."""
    return f"{escape_text(key, MAX_SHOWN)} = {show(key, value)} ({source}): {sentence}"


def show(key: str, value: object) -> str:
    """Return the value of `key` for people."""
    return "(hidden)" if is_hidden(key) else escape_text(_text(value), MAX_SHOWN)


def written(key: str, value: object) -> str:
    """Return the valid value of `key` as TOML for people."""
    return "(hidden)" if is_hidden(key) else _ADDRESS.sub(r'\1://(hidden)"', settings()[key].write(value))


def is_hidden(key: str) -> bool:
    """Return whether the value of `key` may be a secret."""
    # A known key is safe unless it locates a passphrase: certificates.key holds paths.
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
        # An @ may belong to a malformed address, behind a password.
        if _PEM in value or ("@" in value and not _ADDRESS.match(value)):
            return "(hidden)"
        return quoted(_ADDRESS.sub(r"\1://(hidden)", value[: 2 * MAX_SHOWN]))
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "(a huge number)"  # Python refuses to convert the largest ones to text
    if isinstance(value, list | tuple):
        if depth == _MAX_NESTING:
            return "[...]"
        return f"[{', '.join(_text(each, depth + 1) for each in value[:MAX_SHOWN])}]"
    if isinstance(value, dict):
        return "(a table)"
    return str(value)


def unknown_key(key: str) -> str:
    """Return the sentence for an unknown key of a known section."""
    section, name = split_key(key[: 2 * MAX_SHOWN])
    known = list(sections()[section].model_fields)
    candidates = _keys_named(name)
    if not candidates:
        candidates = [f"{section}.{near}" for near in nearest(name, known)]
    if not candidates:
        candidates = _nearest_anywhere(name)
    if candidates:
        return f"unknown key; did you mean {' or '.join(candidates)}?"
    return f"unknown key; [{section}] has {', '.join(known)}"


def unknown_section(section: str, name: str = "") -> str:
    """Return the sentence for an unknown section. `name` is the key in it, if the fault is about one key."""
    near = difflib.get_close_matches(section[: 2 * MAX_SHOWN], sections(), 1)
    if near and not name:
        return f"unknown section; did you mean [{near[0]}]?"
    is_key = near and f"{near[0]}.{name}" in settings()
    candidates = [f"{near[0]}.{name}"] if is_key else _nearest_anywhere(name)
    if candidates:
        return f"unknown section; did you mean {' or '.join(candidates)}?"
    return f"unknown section; there are {', '.join(sections())}"


def outside_section(name: str) -> str:
    """Return the sentence for a key above all sections."""
    candidates = _nearest_anywhere(name[: 2 * MAX_SHOWN])
    if candidates:
        return f"must be in a section; did you mean {' or '.join(candidates)}?"
    return f"must be in a section; the sections are {', '.join(sections())}"


def _keys_named(name: str) -> list[str]:
    return [key for key in settings() if split_key(key)[1] == name]


def _nearest_anywhere(name: str) -> list[str]:
    names = {split_key(key)[1] for key in settings()}
    # Among all names a match by chance is likelier than within one section, so it has to be closer.
    return [key for near in nearest(name, sorted(names), 0.75) for key in _keys_named(near)]
