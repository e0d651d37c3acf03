"""Checks of a function's parameters against its annotations, before it is called; the types of its results.

    Signature(function).bind({"name": "ada"}) -> keyword arguments, or InvalidArgument with the path of every fault

Rules: parameters are passed by name. An unknown one is refused, unless the function takes `**others`.

It must not know: methods, calls, where the parameters come from.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Set
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar, Union, cast

from zcproto.accelerator import accelerated
from zcproto.common.faults import MAX_FAULTS, Fault, refusal, shown_name
from zcproto.common.value_types import Checker, ValueType, accept_any, describe
from zcproto.errors import InvalidArgument

_MOST_SHOWN: Final = 200
"""Characters of a type in the list of parameters."""

_SENT_ITEMS: Final = (AsyncGenerator, AsyncIterable, AsyncIterator)


Result = TypeVar("Result")


class Ended(Generic[Result]):
    """The result of a stream, which its generator yields last.

    @app.method
    async def words(text: str) -> AsyncIterator[str | Ended[int]]:
        for word in text.split():
            yield word
        yield Ended(len(text))
    """

    __slots__ = ("result",)

    def __init__(self, result: Result) -> None:
        self.result = result

    def __repr__(self) -> str:
        return "Ended()"


class Parameter(NamedTuple):
    """A parameter of the caller's. `name` is `**name` for all further ones; `default` is None without one."""

    name: str
    type: ValueType
    is_required: bool
    default: Any


class Signature:
    """The parameters and results of a function that is called with keyword arguments only.

    A parameter annotated with the `injected` type is not the caller's; the attribute is its name. The same holds
    for one annotated with the generic type `items`; the attribute is its name and the type of its argument.
    `parameters` are the others. `result` is the type of the result, `sends` that of the items of an async
    generator, whose result is in its `Ended`; `is_iterator` is whether it is annotated as one. `is_unchecked` is
    whether the function accepts any mapping unchanged.
    """

    def __init__(
        self, function: Callable[..., Any], injected: type | None = None, items: type | None = None
    ) -> None:
        """Raises TypeError for parameters and results that cannot be used, or not be passed by name."""
        self.injected: str | None = None
        self.items: tuple[str, ValueType] | None = None
        self.parameters: list[Parameter] = []
        self._checkers: dict[str, Checker] = {}
        self._classes: dict[str, type] = {}  # of the parameters that accept one class
        self._check_rest: Checker | None = None  # of a `**name` parameter
        try:
            hints = typing.get_type_hints(_annotated(function), include_extras=True)
        except NameError as error:
            raise TypeError(f"an annotation cannot be resolved: {error}") from error
        for parameter in inspect.signature(function).parameters.values():
            self._add(parameter, hints.get(parameter.name, parameter.annotation), injected, items)
        returns = hints.get("return", Any)
        self.result = self.sends = ValueType(Any)
        self.is_iterator = typing.get_origin(returns) in _SENT_ITEMS or returns in _SENT_ITEMS
        if self.is_iterator:
            item, result = _parts((*typing.get_args(returns), Any)[0])
            self.sends = _value_type("an item", item)
            self.result = _value_type("the result", result)
        else:
            self.result = _value_type("the result", returns)
        self._required = frozenset(each.name for each in self.parameters if each.is_required)
        self._reserved = frozenset({self.injected, self.items and self.items[0]} - {None})
        # The names to check where any other is accepted with any value, as at each login; None: all names.
        self._named = self._reserved.union(self._checkers) if self._check_rest is accept_any else None
        self.is_unchecked = self._named is not None and not self._named

    def _add(
        self, parameter: inspect.Parameter, annotation: Any, injected: type | None, items: type | None
    ) -> None:
        name, is_required = parameter.name, parameter.default is inspect.Parameter.empty
        is_bare = annotation is inspect.Parameter.empty
        if is_bare and is_required and not self.parameters and name in ("self", "cls"):
            raise TypeError(f"{name} would be sent by the caller; register the bound method of an object")
        if is_bare and injected is not None and name in (injected.__name__.lower(), "ctx"):
            raise TypeError(
                f"parameter {name!r} would be sent by the caller; annotate it: {name}: {injected.__name__}"
            )
        bare = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
        if injected is not None and injected in (bare, typing.get_origin(bare)):
            self.injected = name
            return
        if items is not None and items in (bare, typing.get_origin(bare)):
            if self.items is not None:
                raise TypeError(f"parameter {name!r}: a method has one source of items")
            self.items = name, _value_type(f"parameter {name!r}", (*typing.get_args(bare), Any)[0])
            return
        type_ = _value_type(f"parameter {name!r}", annotation)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            name, is_required = "**" + name, False
            self._check_rest = type_.check
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(f"parameter {name!r} must be passable by name")
        else:
            self._checkers[name] = type_.check
            if type_.only_class is not None:
                self._classes[name] = type_.only_class
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        self.parameters.append(Parameter(name, type_, is_required, default))

    @functools.cached_property
    def params(self) -> list[dict[str, Any]]:
        """The parameters as `server.info` lists them."""
        return [
            {"name": each.name, "type": _cut(describe(each.type.annotation)), "required": each.is_required}
            for each in self.parameters
        ]

    def bind(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for `params`. Raises InvalidArgument with all faults and their paths."""
        if fits(params, self._classes, self._named, self._required):
            return params.copy()
        checkers, check_rest = self._checkers, self._check_rest
        arguments = {}
        try:
            for name, value in params.items():
                known = checkers.get(name)
                if known is not None:
                    arguments[name] = known(value, name)
                elif check_rest is None or name in self._reserved:
                    raise InvalidArgument
                else:
                    arguments[name] = check_rest(value, shown_name(name))
        except InvalidArgument:
            raise self._refusal(params) from None
        if not self._required <= arguments.keys():
            raise self._refusal(params)
        return arguments

    def _refusal(self, params: dict[str, Any]) -> InvalidArgument:
        """Return the error with all faults of params that were refused."""
        faults: list[Fault] = [(name, "is missing") for name in sorted(self._required - params.keys())]
        for name, value in params.items():
            if len(faults) > MAX_FAULTS:
                break
            check = self._checkers.get(name, self._check_rest)
            if self.items is not None and name == self.items[0]:
                faults.append((name, "is sent as the items of the stream"))
                continue
            if check is None or name in self._reserved:
                faults.append((shown_name(name), "is unknown"))
                continue
            try:
                check(value, shown_name(name))
            except InvalidArgument as error:
                if "faults" not in error.details:  # raised by a validator of the application
                    return error
                faults += [(each["path"], each["problem"]) for each in error.details["faults"]]
        return refusal(faults)


def _parts(item: Any) -> tuple[Any, Any]:
    """Return the types of the items and of the result that a generator of these items has."""
    if item is Any:
        return Any, Any
    members = typing.get_args(item) if typing.get_origin(item) in (Union, types.UnionType) else (item,)
    items = [each for each in members if Ended not in (each, typing.get_origin(each))]
    results = [(*typing.get_args(each), Any)[0] for each in members if each not in items]
    return (Union[*items] if items else Any), (Union[*results] if results else None)


@accelerated
def fits(
    params: dict[str, Any], classes: dict[str, type], named: Set[str] | None, required: Set[str]
) -> bool:
    """Return whether params can be accepted unchanged: each has its class or is not named, none is missing."""
    for name, value in params.items():
        if type(value) is not classes.get(name) and (named is None or name in named):
            return False
    return required <= params.keys()


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _value_type(what: str, annotation: Any) -> ValueType:
    try:
        return ValueType(annotation)
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from error


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the object that carries the annotations: a partial's function, a callable object's method."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else cast("Any", function).__call__
