"""The typed JSON of the vectors, in which the kit and a client's program exchange values."""

from __future__ import annotations

import struct
from typing import Any, Final

SAFE_INT: Final = 2**53
"""From here on, not every language represents JSON numbers exactly."""


def typed(value: Any) -> Any:
    """Encode a value as typed JSON. Raises TypeError for a type that msgpack does not have."""
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
    """Decode a value from typed JSON. Raises ValueError for anything else."""
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
    raise ValueError(f"not a typed value: {str(value)[:80]}")
