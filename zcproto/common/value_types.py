"""One annotation: which values it accepts, how they are sent, and how they are described to callers.

    ValueType(Order).check({"item": "tea"}, "order") -> Order("tea"), or InvalidArgument with every fault
    ValueType(list[Order]).dump(orders)              -> maps

Decides: which annotations can be used. Those of msgpack's types have checkers of their own, as most parameters are
of them; all others are pydantic's (zcproto/common/adapters.py).

Rules:
- msgpack's types are not converted, except int to float.
- Messages contain paths and types, never a value.

It must not know: methods, calls, where the values come from.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Never, NoReturn, Union

from zcproto.common.faults import refusal
from zcproto.errors import InvalidArgument

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from typing_extensions import TypeVar

    from zcproto.common.adapters import Adapter

    Returned = TypeVar("Returned", default=Any)
else:
    Returned = typing.TypeVar("Returned")

RETURNS_ANY: Final[Any] = Any
"""The type of a result that is not checked."""

Checker = Callable[[Any, str], Any]
"""Maps a decoded value and its path to the argument. Raises InvalidArgument with all faults."""

_ADAPTERS: Final = 1_024
"""Adapters that are kept for the next method with the same annotation: each takes half a millisecond to make."""

_MSGPACK_TYPES: Final[dict[Any, tuple[str, dict[str, Any]]]] = {
    int: ("an int", {"type": "integer"}),
    float: ("a float", {"type": "number"}),
    str: ("a str", {"type": "string"}),
    bytes: ("bytes", {"type": "string", "format": "binary"}),
    bool: ("a bool", {"type": "boolean"}),
    list: ("a list", {"type": "array"}),
    dict: ("a map", {"type": "object"}),
    type(None): ("nil", {"type": "null"}),
}


class ValueType:
    """The type of a parameter, a result or an item.

    `check` accepts a received value. `dump` makes a value sendable; None if its type is one of msgpack's, with or
    without containers. `adapter` is pydantic's part; None for the types that need none.
    `only_class` is the class whose instances `check` accepts unchanged; None if that is not enough to accept one.
    """

    __slots__ = ("adapter", "annotation", "check", "dump", "only_class")

    check: Checker
    dump: Callable[[Any], Any] | None

    def __init__(self, annotation: Any) -> None:
        """Raises TypeError for an annotation that cannot be used."""
        if annotation in (inspect.Parameter.empty, object, NoReturn, Never):
            annotation = Any
        elif annotation is None:
            annotation = type(None)
        elif typing.get_origin(annotation) in (list, dict) and not typing.get_args(annotation):
            annotation = typing.get_origin(annotation)  # typing.List
        self.annotation = annotation
        self.adapter: Adapter | None = None
        self.dump = None
        self.only_class: type | None = None
        if annotation is Any:
            self.check = accept_any
        elif isinstance(annotation, type) and annotation in _MSGPACK_TYPES:
            self.check = _check_class(annotation)
            self.only_class = annotation
        else:
            self.adapter = (_adapter if _is_hashable(annotation) else _adapter.__wrapped__)(annotation)
            self.check = self.adapter.check
            if not _is_msgpack(annotation):
                self.dump = self.adapter.dump

    def check_sent(self, value: Any, what: str) -> None:
        """Raise TypeError if a value, which `dump` would send unchecked, is not of this type."""
        try:
            if self.dump is None:
                self.check(list(value) if value.__class__ is tuple else value, what)
            elif self.adapter is not None:
                self.adapter.of.dump_python(value, by_alias=True, warnings="error")
        except Exception as error:  # a serializer of the application may raise anything
            reason = error.message if isinstance(error, InvalidArgument) else str(error)
            raise TypeError(
                f"the {what} is not {describe(self.annotation)}, as annotated: {reason}"
            ) from None

    @property
    def simple_schema(self) -> dict[str, Any]:
        """The JSON Schema of a type without an adapter."""
        return {} if self.annotation is Any else dict(_MSGPACK_TYPES[self.annotation][1])


@functools.lru_cache(_ADAPTERS)
def _adapter(annotation: Any) -> Adapter:
    from zcproto.common.adapters import Adapter  # noqa: PLC0415  pydantic is large

    return Adapter(annotation, describe(annotation))


@functools.lru_cache(_ADAPTERS)
def _result_adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # noqa: PLC0415  as above

    return TypeAdapter(annotation)


def checked_result(annotation: type[Returned], value: Any) -> Returned:
    """Return what a received result stands for. Raises pydantic.ValidationError."""
    adapter: TypeAdapter[Returned] = _result_adapter(annotation)  # type: ignore[arg-type]  # types are hashable
    return adapter.validate_python(value)


def _is_hashable(annotation: Any) -> bool:
    try:
        hash(annotation)
    except TypeError:  # Annotated with metadata such as a dict
        return False
    return True


def accept_any(value: Any, path: str) -> Any:
    """Check nothing, for parameters without annotation."""
    return value


def _check_class(expected: type) -> Checker:
    name = _MSGPACK_TYPES[expected][0]

    def check(value: Any, path: str) -> Any:
        if value.__class__ is expected:  # a bool is not an int here
            return value
        if expected is float and value.__class__ is int:
            return float(value)
        raise refusal([(path, f"must be {name}")])

    return check


def _is_msgpack(annotation: Any) -> bool:
    """Return whether msgpack has types for all values of an annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return all(value.__class__ in _MSGPACK_TYPES for value in arguments)
    if origin in (list, dict, Union, types.UnionType):
        return all(map(_is_msgpack, arguments))
    return annotation is Any or (isinstance(annotation, type) and annotation in _MSGPACK_TYPES)


def describe(annotation: Any) -> str:
    """Return an annotation as it is written in source."""
    if annotation is inspect.Parameter.empty:
        return "Any"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return describe(typing.get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        return " | ".join(describe(argument) for argument in typing.get_args(annotation))
    if isinstance(origin, type) and typing.get_args(annotation):  # omits the modules of the arguments
        return f"{origin.__name__}[{', '.join(map(describe, typing.get_args(annotation)))}]"
    return "..." if annotation is ... else str(annotation).replace("typing.", "")
