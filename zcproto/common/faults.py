"""What is wrong with a value, by its path, and the error that has all of it."""

from __future__ import annotations

from typing import Final

from zcproto.errors import InvalidArgument

Fault = tuple[str, str]
"""A path, and what is wrong there."""

MAX_FAULTS: Final = 16
"""Faults in one answer."""

_MAX_NAME: Final = 64
_MAX_PATH: Final = 256
_IN_MESSAGE: Final = 4


def refusal(faults: list[Fault]) -> InvalidArgument:
    """Return the error for wrong values: its message has the first faults, its details those up to `MAX_FAULTS`."""
    listed = [
        {"path": path[:_MAX_PATH], "problem": problem[:_MAX_PATH]} for path, problem in faults[:MAX_FAULTS]
    ]
    shown = [f"{each['path']} {each['problem']}" for each in listed[:_IN_MESSAGE]]
    if len(faults) > _IN_MESSAGE:
        shown.append("and more")
    return InvalidArgument("; ".join(shown), {"faults": listed})


def path_of(parent: str, key: str | int) -> str:
    """Return the path of a part of a value."""
    return f"{parent}[{key}]" if isinstance(key, int) else f"{parent}.{shown_name(key)}"


def shown_name(name: str) -> str:
    """Return a peer's name for a message: an identifier, of bounded length."""
    return name[:_MAX_NAME] if name[:_MAX_NAME].isidentifier() else "(not an identifier)"
