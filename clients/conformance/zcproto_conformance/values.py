"""Values as the typed JSON of the vectors: what passes between the kit and a client's program."""

from __future__ import annotations

import struct
from typing import Any, Final

SAFE_INT: Final = 2**53
"""JSON numbers from here on are not exact in every language."""


def typed(value: Any) -> Any:
    """A value as typed JSON. Raises TypeError for what msgpack does not carry."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if abs(value) < SAFE_INT else {"int": str(value)}
        case float():
            return {"float64": struct.pack("!d", value).hex()}
        case bytes():
            return {"bin": value.hex()}
        case list() | tuple():
            return [typed(item) for item in value]
        case dict():
            return {"map": {key: typed(item) for key, item in value.items()}}
    raise TypeError(type(value).__name__)


def untyped(value: Any) -> Any:
    """The value that typed JSON stands for. Raises ValueError for anything else."""
    match value:
        case None | bool() | str() | int():
            return value
        case list():
            return [untyped(item) for item in value]
        case {"int": str() as digits}:
            return int(digits)
        case {"float64": str() as digits}:
            return struct.unpack("!d", bytes.fromhex(digits))[0]
        case {"bin": str() as digits}:
            return bytes.fromhex(digits)
        case {"map": dict() as items}:
            return {key: untyped(item) for key, item in items.items()}
    raise ValueError(f"no typed value: {str(value)[:80]}")
