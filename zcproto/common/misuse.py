"""Errors with a cure for mistakes that Python reports without one, and checks of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def wrong_use(cure: str) -> Callable[..., Any]:
    """Return a special method that raises TypeError, as for `with` in place of `async with`.

    Define it unless TYPE_CHECKING: a type checker finds such a mistake if the method does not exist.
    """

    def refused(self: object, *_: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: {cure}")

    return refused


def no_such_method(write: str) -> Callable[..., Any]:
    """Return a `__getattr__` for clients, which raises AttributeError with the call to write for a server's method.

    Define it unless TYPE_CHECKING, as above.
    """

    def refused(self: object, name: str) -> NoReturn:
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if not name.startswith("_"):
            message += f'; call a method of the server by {write}("{name}", ...)'
        raise AttributeError(message, name=name, obj=self)

    return refused


def check_seconds(name: str, value: object) -> None:
    """Raise TypeError unless an argument is a number of seconds, or None."""
    if value is not None and not isinstance(value, int | float):
        raise TypeError(
            f"{name} is a number of seconds, such as {name}=5.0, or None, not {type(value).__name__}"
        )
