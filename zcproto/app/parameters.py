"""Parameters of a method: what its annotations promise, checked before it runs.

`checker_for(annotation)` gives a function that takes a decoded value and the path to it, and returns the value for
the method or raises InvalidArgument naming the path. Supported: int, float, str, bytes, bool, None, Any, list,
dict (keys are str), Optional and other unions, Literal, and dataclasses, nested as they like. Nothing is
coerced but int to float: a wrong type is an error, never a guess.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Union

from zcproto.errors import InvalidArgument

Checker = Callable[[Any, str], Any]

_NAME_SHOWN: Final = 64
_TYPE_NAMES: Final = {
    int: "an int",
    float: "a float",
    str: "a str",
    bytes: "bytes",
    bool: "a bool",
    list: "a list",
    dict: "a map",
    type(None): "nil",
}


class ParamInfo(NamedTuple):
    """One parameter as `server.info` lists it."""

    name: str
    type: str
    required: bool


def checker_for(annotation: Any, within: dict[type, Checker] | None = None) -> Checker:
    """The check for one annotation. Raises TypeError for one that cannot be checked.

    `within` are the dataclasses around it, so that one of them may contain itself.
    """
    within = {} if within is None else within
    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return take_anything
    if annotation is None:
        annotation = type(None)
    if annotation is float:
        return _check_float
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Union or origin is types.UnionType:
        return _check_union([checker_for(argument, within) for argument in arguments], describe(annotation))
    if origin is Literal:
        return _check_literal(arguments, describe(annotation))
    if origin is list and arguments:
        return _check_list(checker_for(arguments[0], within))
    if origin is dict and arguments:
        if arguments[0] is not str:
            raise TypeError(f"{describe(annotation)}: keys of a dict parameter must be str")
        return _check_dict(checker_for(arguments[1], within))
    annotation = origin or annotation  # typing.List is list
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return within.get(annotation) or _check_dataclass(annotation, within)
    if annotation in _TYPE_NAMES:
        return _check_class(annotation, f"must be {_TYPE_NAMES[annotation]}")
    raise TypeError(f"{describe(annotation)} cannot be the type of a parameter")


def describe(annotation: Any) -> str:
    """An annotation as people write it."""
    if annotation is inspect.Parameter.empty:
        return "Any"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    origin = typing.get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return " | ".join(describe(argument) for argument in typing.get_args(annotation))
    if isinstance(origin, type) and typing.get_args(annotation):  # without the modules of what is inside
        return f"{origin.__name__}[{', '.join(map(describe, typing.get_args(annotation)))}]"
    return str(annotation).replace("typing.", "")


def shown(name: str) -> str:
    """A name that a peer sent, fit to be sent back: identifiers only, bounded."""
    return f"'{name[:_NAME_SHOWN]}'" if name[:_NAME_SHOWN].isidentifier() else "(not an identifier)"


def take_anything(value: Any, path: str) -> Any:
    """The check of what is not annotated."""
    return value


def _check_class(wanted: type, complaint: str) -> Checker:
    def check(value: Any, path: str) -> Any:
        if value.__class__ is wanted:  # bool is no int here
            return value
        raise InvalidArgument(f"{path} {complaint}")

    return check


def _check_float(value: Any, path: str) -> float:
    if value.__class__ is float:
        return value
    if value.__class__ is int:
        return float(value)
    raise InvalidArgument(f"{path} must be a float")


def _check_union(checkers: list[Checker], described: str) -> Checker:
    def check(value: Any, path: str) -> Any:
        deeper: InvalidArgument | None = None
        for checker in checkers:
            try:
                return checker(value, path)
            except InvalidArgument as error:
                if not error.message.startswith(f"{path} "):
                    deeper = error  # a container that fits but for something inside says more
        raise deeper or InvalidArgument(f"{path} must be {described}")

    return check


def _check_literal(choices: tuple[Any, ...], described: str) -> Checker:
    def check(value: Any, path: str) -> Any:
        if any(value == choice and value.__class__ is choice.__class__ for choice in choices):
            return value
        raise InvalidArgument(f"{path} must be {described}")

    return check


def _check_list(item: Checker) -> Checker:
    def check(value: Any, path: str) -> Any:
        if value.__class__ is not list:
            raise InvalidArgument(f"{path} must be a list")
        return [item(element, f"{path}[{index}]") for index, element in enumerate(value)]

    return check


def _check_dict(item: Checker) -> Checker:
    def check(value: Any, path: str) -> Any:
        if value.__class__ is not dict:
            raise InvalidArgument(f"{path} must be a map")
        return {key: item(element, f"{path}[{shown(key)}]") for key, element in value.items()}

    return check


def _check_dataclass(cls: type, within: dict[type, Checker]) -> Checker:
    fields: dict[str, Checker] = {}
    required: list[str] = []

    def check(value: Any, path: str) -> Any:
        if value.__class__ is not dict:
            raise InvalidArgument(f"{path} must be a map")
        arguments = {}
        for key, element in value.items():
            checker = fields.get(key)
            if checker is None:
                raise InvalidArgument(f"{path}.{shown(key)} is unknown")
            arguments[key] = checker(element, f"{path}.{key}")
        for name in required:
            if name not in arguments:
                raise InvalidArgument(f"{path}.{name} is missing")
        try:
            return cls(**arguments)
        except ValueError as error:  # __post_init__ of the application refuses the values
            raise InvalidArgument(f"{path} is not acceptable") from error

    within = {**within, cls: check}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        fields[field.name] = checker_for(hints[field.name], within)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    if inspect.signature(cls).parameters.keys() != fields.keys():
        raise TypeError(f"{cls.__name__}: only fields can be given to a dataclass of a parameter, no InitVar")
    return check
