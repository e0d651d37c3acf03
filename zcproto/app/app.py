"""An application: methods by name, each with what it needs and what it takes.

    app = App()

    @app.method("greet")
    def greet(name: str, times: int = 1) -> str:
        "Say hello."
        return " ".join(["hello", name] * times)

Parameters come by name and are checked against the annotations. A parameter annotated `Context` is not the
caller's: it gets the call's context. A plain function answers in the same turn of the loop and must not wait; an
`async` one may.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast

from zcproto.app.context import Context
from zcproto.app.parameters import Checker, ParamInfo, checker_for, describe, shown, take_anything
from zcproto.errors import InvalidArgument
from zcproto.observe.histogram import QUICK_S, WAITED_S, Histogram
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH

Handler = TypeVar("Handler", bound=Callable[..., Any])

RESERVED_PREFIXES: Final = ("session.", "server.", "device.")


class Method:
    """One method. `function` is called with keyword arguments only. `may_wait` says of a plain one that it may
    return a coroutine in place of its result.

    `calls` counts them; `durations` are how long the loop was at some of them, to their answer or first wait, and
    `waits` how long those took that waited, in seconds. Servers of one process with the same method count together.
    """

    __slots__ = (
        "_check_rest",
        "_checkers",
        "_required",
        "_takes_rest_as_it_is",
        "calls",
        "context_name",
        "doc",
        "durations",
        "function",
        "is_async",
        "may_wait",
        "name",
        "operator",
        "params",
        "public",
        "takes_any",
        "takes_params_as_they_are",
        "unrestricted",
        "waits",
    )

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        public: bool = False,
        operator: bool = False,
        may_wait: bool = False,
    ) -> None:
        if not 1 <= len(name) <= METHOD_MAX_LENGTH or not METHOD_ALPHABET.issuperset(name):
            raise ValueError(
                f"method name {name!r} must be 1 to {METHOD_MAX_LENGTH} characters of a-z 0-9 _ ."
            )
        if public and operator:
            raise ValueError(f"method {name}: it is for everyone or for operators, not both")
        self.name = name
        self.function = function
        self.public = public
        self.operator = operator
        self.doc = inspect.getdoc(function) or ""
        self.is_async = _is_async(function)
        self.may_wait = may_wait
        self.calls = 0
        self.durations = Histogram(QUICK_S)
        self.waits = Histogram(WAITED_S)
        self.context_name: str | None = None
        self.takes_any = False
        self.params: list[ParamInfo] = []
        self._checkers: dict[str, Checker] = {}
        self._check_rest: Checker = take_anything
        self._required: frozenset[str] = frozenset()
        self._read_signature()
        # Decided once, so that the usual call asks two questions.
        self._takes_rest_as_it_is = self.takes_any and self._check_rest is take_anything
        self.takes_params_as_they_are = (
            self._takes_rest_as_it_is and not self._checkers and self.context_name is None and not may_wait
        )
        self.unrestricted = not operator

    def _read_signature(self) -> None:
        function = self.function
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"method {self.name}: a method returns its result, it does not yield")
        try:
            hints = typing.get_type_hints(_annotated(function))
        except NameError as error:
            raise TypeError(f"method {self.name}: an annotation cannot be resolved: {error}") from error
        required = set()
        for parameter in inspect.signature(self.function).parameters.values():
            annotation = hints.get(parameter.name, parameter.annotation)
            if annotation is Context:
                self.context_name = parameter.name
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                self.takes_any = True
                self._check_rest = checker_for(annotation)
                self.params.append(ParamInfo("**" + parameter.name, describe(annotation), required=False))
            elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise TypeError(f"method {self.name}: parameter {parameter.name!r} must be passable by name")
            else:
                needed = parameter.default is inspect.Parameter.empty
                self._checkers[parameter.name] = checker_for(annotation)
                self.params.append(ParamInfo(parameter.name, describe(annotation), needed))
                if needed:
                    required.add(parameter.name)
        self._required = frozenset(required)

    def bind(self, params: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for a call's params. Raises InvalidArgument naming the parameter."""
        checkers = self._checkers
        if self._takes_rest_as_it_is and self.context_name not in params:
            arguments = params.copy()
            for name, check in checkers.items():
                if name in params:
                    arguments[name] = check(params[name], name)
                elif name in self._required:
                    raise InvalidArgument(f"missing parameter '{name}'")
            return arguments
        arguments = {}
        for name, value in params.items():
            checker = checkers.get(name)
            if checker is not None:
                arguments[name] = checker(value, name)
            elif self.takes_any and name != self.context_name:
                arguments[name] = self._check_rest(value, f"parameter {shown(name)}")
            else:
                raise InvalidArgument(f"unknown parameter {shown(name)}")
        if len(arguments) < len(checkers) or self.takes_any:
            for name in sorted(self._required - arguments.keys()):
                raise InvalidArgument(f"missing parameter '{name}'")
        return arguments


class App:
    """A set of methods. One application may be served by several servers."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def method(
        self, name: str, *, public: bool = False, operator: bool = False
    ) -> Callable[[Handler], Handler]:
        """Register a function under `name`.

        `public`: may be called without a session. `operator`: by operators only. Raises ValueError for a name
        that is malformed, taken or reserved, and for both flags at once; TypeError for parameters that cannot be
        checked.
        """

        def register(function: Handler) -> Handler:
            self.add(Method(name, function, public=public, operator=operator))
            return function

        return register

    def add(self, method: Method) -> None:
        """Add a method as it is. Raises ValueError if the name is taken or reserved."""
        if method.name.startswith(RESERVED_PREFIXES):
            raise ValueError(
                f"method name {method.name!r}: {', '.join(RESERVED_PREFIXES)} are the protocol's own"
            )
        if method.name in self._methods:
            raise ValueError(f"method {method.name!r} is registered twice")
        self._methods[method.name] = method

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __len__(self) -> int:
        return len(self._methods)


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives a coroutine; also for objects that can be called."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - asked for what it is, not whether it is there
    )


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """What carries the annotations: of a partial its function, of an object that can be called its method."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else cast("Any", function).__call__
