"""Convert values for the log, without secrets and within bounds.

Rules:
- A secret is masked by its type and again by the name it is logged under. So is text in the form of a token,
  which a peer may have sent in the wrong place.
- Bytes are only counted: they may be a token, a key or a payload.
- Text is cut to 256 characters; lists and maps are bounded in length and depth.
- An exception is written with its type. Its message is written only if this package or the system made it; others
  may quote input of a peer (but see `exceptions`).
"""

from __future__ import annotations

import enum
import json
import re
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePath
from typing import TypeAlias

from zcproto.common.exceptions import MASK, MAX_FRAMES
from zcproto.common.secret import Secret, SecretBytes, SecretText
from zcproto.errors import ZcprotoError

MAX_TEXT = 256
MAX_ITEMS = 16
MAX_DEPTH = 2

HEAD = 3
"""Fields at the beginning of each line, such as timestamp, level and event."""

Loggable: TypeAlias = "bool | int | float | str | list[Loggable] | dict[str, Loggable] | None"

_SECRET_NAME = re.compile(
    r"(.*_)?(token|key|secret|password|passphrase|signature|authorization|cookie|credentials?)", re.IGNORECASE
)
# 32 bytes as base64url, possibly a token sent in the wrong place. Pins do not match: they follow sha256/.
_TOKEN = re.compile(r"(?<![A-Za-z0-9_+/-])[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048](?![A-Za-z0-9_+/=-])")
TOKEN_LENGTH = 43
"""A shorter text cannot contain a token."""

_MAX_INTEGER = 2**64


def loggable(name: str, value: object) -> Loggable:
    """Return the loggable form of `value`, logged under `name`."""
    if is_secret_name(name):
        return MASK
    if value.__class__ is str:  # the usual case; short strings need no cut
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
            # JSON has no infinity or NaN.
            return float(value) if abs(value) < float("inf") else str(float(value))
        case Secret() | SecretBytes() | SecretText():
            return MASK
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
    return name, MASK if is_secret_name(name) else _loggable(value, depth)


def cut(text: str) -> str:
    """Return `text` cut to 256 characters, without lone surrogates and tokens."""
    if len(text) >= TOKEN_LENGTH:
        read = text[: 2 * MAX_TEXT]
        shown = _TOKEN.sub(MASK, read)
        # A token that is cut at the end of what was read has no form.
        text = shown if len(read) == len(text) else shown[: 1 - TOKEN_LENGTH] + "..."
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 3] + "..."
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def line_within(most: int, fields: dict[str, Loggable], form: Callable[[dict[str, Loggable]], str]) -> str:
    """Return a line of at most `most` characters: without its longest values if need be. Its head stays.

    A peer that chooses a long value must not remove its address, its name and what it has done from a line.
    """
    line = form(fields)
    if len(line) <= most:
        return line
    left = fields | {"oversize": len(line)}
    for name in sorted([*fields][HEAD:], key=lambda name: len(json.dumps(fields[name])), reverse=True):
        del left[name]
        line = form(left)
        if len(line) <= most:
            break
    return line


def describe(error: BaseException) -> str:
    """Return the type of an exception, and its message if that is known to be safe."""
    name = type(error).__name__
    if isinstance(error, ZcprotoError):
        return cut(f"{name}: {error}")
    if isinstance(error, OSError) and error.strerror:
        return cut(f"{name}: {error.strerror}")
    return name


def places(error: BaseException) -> list[Loggable]:
    """Return the stack of an exception, innermost last: file, line and function, without source and values."""
    frames = traceback.extract_tb(error.__traceback__, limit=-MAX_FRAMES)
    return [
        cut(f"{'/'.join(PurePath(each.filename).parts[-2:])}:{each.lineno} {each.name}") for each in frames
    ]
