"""What is sent for values that msgpack has no type for, and which part of a value cannot be sent.

    dataclass, pydantic model                            -> map
    set, frozenset                                       -> array
    Enum                                                 -> its value
    datetime, date, time, timedelta, UUID, Decimal, path -> str, as pydantic writes them into JSON

Rules:
- Messages contain paths and types, never a value.
- pydantic is imported with the first such value: clients that send none do not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import msgpack

_TEXT_MODULES: Final = frozenset(
    {"datetime", "decimal", "uuid", "pathlib", "pathlib._local", "ipaddress", "pydantic.networks"}
)
"""Modules of the types that are sent as text; their subclasses are too."""

_DEEPEST: Final = 64
_MAX_KEY: Final = 64
_DUMPERS: Final = 1_024
_PARTS: Final = 100_000
"""Parts of a value that are looked at for the one that cannot be sent; takes under 0.1 s."""

_SIMPLE: Final = frozenset({type(None), bool, int, float, str, bytes, bytearray, memoryview})
_pack: Final = msgpack.Packer(autoreset=True).pack


def to_sendable(value: Any) -> Any:
    """Return what is sent for a value that is not of msgpack's types. Raises an exception for others."""
    kind = value.__class__
    if hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__pydantic_serializer__"):
        return _dumper(kind)(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return list(value)
    if _TEXT_MODULES.isdisjoint(base.__module__ for base in kind.__mro__):
        raise TypeError(kind.__name__)
    from pydantic_core import to_jsonable_python  # noqa: PLC0415

    return to_jsonable_python(value)


@lru_cache(_DUMPERS)
def _dumper(kind: type) -> Callable[[Any], dict[str, Any]]:
    """Return the function that turns instances of a dataclass or of a pydantic model into maps."""
    from pydantic import TypeAdapter  # noqa: PLC0415

    dump: Callable[..., dict[str, Any]] = TypeAdapter(kind).dump_python
    return lambda value: dump(value, by_alias=True, warnings=False)


def find_unsendable(value: Any) -> str:
    """Return the path and the type of the first part of a value that cannot be sent, for the log."""
    for path, part in islice(_parts(value, "value", 0), _PARTS):
        if part.__class__ is _Fault:
            return f"{path} {part}"
        try:
            _pack(part)
        except OverflowError:
            return f"{path} is an int of more than 64 bits"
        except UnicodeEncodeError:
            return f"{path} is a str with a lone surrogate"
        except (TypeError, ValueError):
            return f"{path} is of type {part.__class__.__module__}.{part.__class__.__qualname__}"
    return "value has a part that is of no type of msgpack"


class _Fault(str):
    """What is wrong with a part, where its type does not say it."""

    __slots__ = ()


def _parts(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what a value contains, with paths: values that msgpack has types for, faults, and the others."""
    if depth > _DEEPEST:
        yield path, _Fault("is nested too deep")
    elif isinstance(value, dict):
        for key, each in value.items():
            if isinstance(key, str):
                name = f".{key}" if key.isidentifier() and len(key) <= _MAX_KEY else "[...]"
                yield from _parts(each, path + name, depth + 1)
            else:
                yield path, _Fault(f"has a key of type {type(key).__name__}, not str,")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _parts(each, f"{path}[{index}]", depth + 1)
    elif value.__class__ in _SIMPLE:
        yield path, value
    else:
        try:
            value = to_sendable(value)
        except Exception:  # of a serializer of the application
            yield path, value
        else:
            yield from _parts(value, path, depth + 1)
