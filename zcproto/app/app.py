"""Applications: methods by name, each with its access and its parameters.

    app = App()

    @app.method("greet")
    def greet(name: str, times: int = 1) -> str:
        "Say hello."
        return " ".join(["hello", name] * times)

Parameters are passed by name and checked against the annotations. A parameter annotated `Context` receives the
context of the call. A plain function runs in the event loop and must not wait; an `async` one may.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from zcproto.app.context import Context
from zcproto.app.parameters import Signature
from zcproto.errors import InvalidArgument
from zcproto.observe.histogram import QUICK_S, WAITED_S, Histogram
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH

Handler = TypeVar("Handler", bound=Callable[..., Any])

RESERVED_PREFIXES: Final = ("session.", "server.", "device.")

_MAX_SLEEP_MS: Final = 3_600_000


class Method:
    """One method. `function` is called with keyword arguments only.

    `may_wait` is whether a plain function may return a coroutine instead of its result. `bind` checks the
    parameters of a call and returns the arguments.
    `calls` counts calls, `durations` are the seconds that sampled calls occupied the loop, `waits` the seconds
    until asynchronous calls were answered; servers in one process share them.
    """

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
            raise ValueError(f"method {name}: choose public or operator, not both")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"method {name}: must return its result, not yield it")
        try:
            signature = Signature(function, injected=Context)
        except TypeError as error:
            raise TypeError(f"method {name}: {error}") from error
        self.name = name
        self.function = function
        self.public = public
        self.operator = operator
        self.unrestricted = not operator
        self.doc = inspect.getdoc(function) or ""
        self.is_async = _is_async(function)
        self.may_wait = may_wait
        self.calls = 0
        self.durations = Histogram(QUICK_S)
        self.waits = Histogram(WAITED_S)
        self.params = signature.params
        self.bind = signature.bind
        self.context_name = signature.injected
        self.is_unchecked = signature.is_unchecked and not may_wait


class App:
    """A set of methods. Several servers may serve one application."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def method(
        self, name: str, *, public: bool = False, operator: bool = False
    ) -> Callable[[Handler], Handler]:
        """Register a function under `name`.

        A `public` method may be called without a session, an `operator` method by operators only. Raises ValueError
        for a name that is malformed, registered or reserved, and for both flags at once; TypeError for parameters
        that cannot be checked.
        """

        def register(function: Handler) -> Handler:
            self.add(Method(name, function, public=public, operator=operator))
            return function

        return register

    def add(self, method: Method) -> None:
        """Add a method. Raises ValueError if the name is registered or reserved."""
        if method.name.startswith(RESERVED_PREFIXES):
            raise ValueError(
                f"method name {method.name!r}: {', '.join(RESERVED_PREFIXES)} are reserved for the protocol"
            )
        if method.name in self._methods:
            raise ValueError(f"method {method.name!r} is registered twice")
        self._methods[method.name] = method

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __len__(self) -> int:
        return len(self._methods)


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling a function or a callable object returns a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - its kind matters, not whether it exists
    )


def default_app() -> App:
    """Return the application that `zcproto serve` runs if it is given none."""
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        """Return the params."""
        return params

    @app.method("sleep")
    async def sleep(ms: int) -> dict[str, Any]:
        """Wait for `ms` milliseconds, at most an hour."""
        if not 0 <= ms <= _MAX_SLEEP_MS:
            raise InvalidArgument(f"ms must be from 0 to {_MAX_SLEEP_MS}")
        await asyncio.sleep(ms / 1000)
        return {}

    @app.method("time")
    def time(context: Context) -> int:
        """The server's clock, milliseconds since the Unix epoch."""
        return context.wall()

    return app
