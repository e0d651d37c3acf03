"""Checks of a function's parameters against its annotations, before it is called.

    Signature(function).bind({"name": "ada"}) -> keyword arguments, or InvalidArgument with the path of the fault

Decides: the types that parameters may have. They are int, float, str, bytes, bool, None, Any, list,
dict (keys are str), Optional and other unions, Literal, and dataclasses, nested to any depth. Only int is
converted, to float: any other type is an error.

It must not know: methods, calls, where the parameters come from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Final, Literal, Union, cast

from zcproto.errors import InvalidArgument

Checker = Callable[[Any, str], Any]

_MAX_NAME: Final = 64
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


class Signature:
    """The parameters of a function that is called with keyword arguments only.

    A parameter annotated with the `injected` type is not the caller's; the attribute is its name. The same holds
    for one annotated with the generic type `items`; the attribute is its name and the checker of its argument.
    `params` are the others as `server.info` lists them. `is_unchecked` is whether the function accepts any mapping
    unchanged.
    """

    def __init__(
        self, function: Callable[..., Any], injected: type | None = None, items: type | None = None
    ) -> None:
        """Raises TypeError for parameters that cannot be checked or passed by name."""
        self.injected: str | None = None
        self.items: tuple[str, Checker] | None = None
        self.params: list[dict[str, Any]] = []
        self._checkers: dict[str, Checker] = {}
        self._check_rest: Checker | None = None  # of a `**name` parameter
        try:
            hints = typing.get_type_hints(_annotated(function))
        except NameError as error:
            raise TypeError(f"an annotation cannot be resolved: {error}") from error
        required = set()
        for parameter in inspect.signature(function).parameters.values():
            name, annotation = parameter.name, hints.get(parameter.name, parameter.annotation)
            is_required = parameter.default is inspect.Parameter.empty
            if injected is not None and annotation is injected:
                self.injected = name
                continue
            if items is not None and items in (annotation, typing.get_origin(annotation)):
                if self.items is not None:
                    raise TypeError(f"parameter {name!r}: a method has one source of items")
                self.items = name, checker_for((*typing.get_args(annotation), Any)[0])
                continue
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                name, is_required = "**" + name, False
                self._check_rest = checker_for(annotation)
            elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise TypeError(f"parameter {name!r} must be passable by name")
            else:
                self._checkers[name] = checker_for(annotation)
                if is_required:
                    required.add(name)
            self.params.append({"name": name, "type": describe(annotation), "required": is_required})
        self._required = frozenset(required)
        self._reserved = frozenset({self.injected, self.items and self.items[0]} - {None})
        self.is_unchecked = self._check_rest is accept_any and not self._checkers and not self._reserved

    def bind(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for `params`. Raises InvalidArgument naming the parameter."""
        checkers, check_rest = self._checkers, self._check_rest
        if check_rest is accept_any and self._reserved.isdisjoint(params):
            arguments = params.copy()  # every login passes here
            for name, checker in checkers.items():
                if name in params:
                    arguments[name] = checker(params[name], name)
        else:
            arguments = {}
            for name, value in params.items():
                known = checkers.get(name)
                if known is not None:
                    arguments[name] = known(value, name)
                elif check_rest is None or name in self._reserved:
                    raise InvalidArgument(f"unknown parameter {quoted(name)}")
                else:
                    arguments[name] = check_rest(value, f"parameter {quoted(name)}")
        if not self._required <= arguments.keys():
            raise InvalidArgument(f"missing parameter '{min(self._required - arguments.keys())}'")
        return arguments


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the object that carries the annotations: a partial's function, a callable object's method."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else cast("Any", function).__call__


def checker_for(annotation: Any, within: dict[type, Checker] | None = None) -> Checker:
    """Return the checker of an annotation: it maps a decoded value and its path to the argument.

    `within` maps the enclosing dataclasses to their checkers, so that one may contain itself. The checker raises
    InvalidArgument naming the path. Raises TypeError for an annotation that cannot be checked.
    """
    within = {} if within is None else within
    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return accept_any
    if annotation is None:
        annotation = type(None)
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
    """Return an annotation as it is written in source."""
    if annotation is inspect.Parameter.empty:
        return "Any"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    origin = typing.get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return " | ".join(describe(argument) for argument in typing.get_args(annotation))
    if isinstance(origin, type) and typing.get_args(annotation):  # omits the modules of the arguments
        return f"{origin.__name__}[{', '.join(map(describe, typing.get_args(annotation)))}]"
    return str(annotation).replace("typing.", "")


def quoted(name: str) -> str:
    """Return a peer's name quoted for a message: an identifier, of bounded length."""
    return f"'{name[:_MAX_NAME]}'" if name[:_MAX_NAME].isidentifier() else "(not an identifier)"


def accept_any(value: Any, path: str) -> Any:
    """Check nothing, for parameters without annotation."""
    return value


def _check_class(expected: type, message: str) -> Checker:
    def check(value: Any, path: str) -> Any:
        if value.__class__ is expected:  # a bool is not an int here
            return value
        if expected is float and value.__class__ is int:
            return float(value)
        raise InvalidArgument(f"{path} {message}")

    return check


def _check_union(checkers: list[Checker], described: str) -> Checker:
    def check(value: Any, path: str) -> Any:
        deeper: InvalidArgument | None = None
        for checker in checkers:
            try:
                return checker(value, path)
            except InvalidArgument as error:
                if not error.message.startswith(f"{path} "):
                    deeper = error  # a fault inside a container is more specific
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
        return {key: item(element, f"{path}[{quoted(key)}]") for key, element in value.items()}

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
                raise InvalidArgument(f"{path}.{quoted(key)} is unknown")
            arguments[key] = checker(element, f"{path}.{key}")
        for name in required:
            if name not in arguments:
                raise InvalidArgument(f"{path}.{name} is missing")
        try:
            return cls(**arguments)
        except ValueError as error:  # raised by the application's __post_init__
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
        raise TypeError(f"{cls.__name__}: a dataclass of a parameter may have no InitVar")
    return check
