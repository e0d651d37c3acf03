"""Decides what of a value may be written to a log.

Rules: a secret is masked, by its type and again by the name it is logged under; so is text that has the form of a
token, as a peer may have sent one in the wrong place. Bytes of any kind are only
counted: they may be a token, a key or a payload. Text is cut to 256 characters, lists and maps are bounded in
length and depth. Of an exception there are the type and the places it passed; its message only where this
package made it or the system did, as any other may quote what a peer sent.
"""

from __future__ import annotations

import enum
import re
import traceback
from functools import lru_cache
from pathlib import PurePath
from typing import TypeAlias

from zcproto.common.secret import Secret, SecretBytes, SecretText
from zcproto.errors import ZcprotoError

MAX_TEXT = 256
MAX_ITEMS = 16
MAX_DEPTH = 2
MAX_FRAMES = 16

Loggable: TypeAlias = "bool | int | float | str | list[Loggable] | dict[str, Loggable] | None"

_SECRET_NAME = re.compile(
    r"(.*_)?(token|key|secret|password|passphrase|signature|authorization|cookie|credentials?)", re.IGNORECASE
)
# 32 bytes as base64url, which may be a token that somebody sent in the wrong place. Before a pin there is sha256/.
_TOKEN = re.compile(r"(?<![A-Za-z0-9_+/-])[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048](?![A-Za-z0-9_+/=-])")
TOKEN_LENGTH = 43
"""A shorter text cannot have a token in it."""

_MASK = "(hidden)"
_MAX_INTEGER = 2**64


def loggable(name: str, value: object) -> Loggable:
    """`value`, logged under `name`, as what may be written."""
    if is_secret_name(name):
        return _MASK
    if value.__class__ is str:  # most values are, and short ones have nothing that must be cut
        return value if len(value) < TOKEN_LENGTH and value.isascii() else cut(value)
    return _loggable(value, 0)


@lru_cache(maxsize=256)
def is_secret_name(name: str) -> bool:
    return _SECRET_NAME.fullmatch(name) is not None


def _loggable(value: object, depth: int) -> Loggable:
    match value:
        case None | bool():
            return value
        case enum.Enum():
            return value.name
        case int():
            return int(value) if abs(value) < _MAX_INTEGER else "(a huge number)"
        case float():
            # Infinity and NaN are no JSON.
            return float(value) if abs(value) < float("inf") else str(float(value))
        case Secret() | SecretBytes() | SecretText():
            return _MASK
        case str():
            return cut(value)
        case bytes() | bytearray() | memoryview():
            return f"({len(value)} bytes)"
        case PurePath():
            return cut(str(value))
        case BaseException():
            return describe(value)
        case list() | tuple() | set() | frozenset() | dict() if depth == MAX_DEPTH:
            return f"({len(value)} items)"
        case list() | tuple() | set() | frozenset():
            items = [each for _, each in zip(range(MAX_ITEMS), value, strict=False)]
            return [_loggable(each, depth + 1) for each in items]
        case dict():
            pairs = [pair for _, pair in zip(range(MAX_ITEMS), value.items(), strict=False)]
            return dict(_loggable_pair(key, each, depth + 1) for key, each in pairs)
    return f"({type(value).__name__})"


def _loggable_pair(key: object, value: object, depth: int) -> tuple[str, Loggable]:
    name = str(_loggable(key, MAX_DEPTH))
    return name, _MASK if is_secret_name(name) else _loggable(value, depth)


def cut(text: str) -> str:
    """`text` in at most 256 characters, none of them half a pair of surrogates, and without tokens."""
    if len(text) >= TOKEN_LENGTH:
        text = _TOKEN.sub(_MASK, text[: 2 * MAX_TEXT])
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 3] + "..."
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def describe(error: BaseException) -> str:
    """An exception in a few words: its type, and its message if that is known to be harmless."""
    name = type(error).__name__
    if isinstance(error, ZcprotoError):
        return cut(f"{name}: {error}")
    if isinstance(error, OSError) and error.strerror:
        return cut(f"{name}: {error.strerror}")
    return name


def places(error: BaseException) -> list[Loggable]:
    """Where an exception passed, the innermost place last: file, line and function, no source and no values."""
    frames = traceback.extract_tb(error.__traceback__, limit=-MAX_FRAMES)
    return [
        cut(f"{'/'.join(PurePath(each.filename).parts[-2:])}:{each.lineno} {each.name}") for each in frames
    ]
