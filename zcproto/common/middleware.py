"""Middleware: functions around each call, of a server's methods or of a client's calls.

    async def timed(context, call_next):
        began = context.now()
        try:
            return await call_next(context)
        finally:
            print(context.method, context.now() - began)

It must not know: what is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

Called = TypeVar("Called")
Called_contra = TypeVar("Called_contra", contravariant=True)


class CallNext(Protocol[Called_contra]):
    """What a middleware gets to run the next one, or at last the method: `CallNext[Context]` for methods."""

    def __call__(self, called: Called_contra, /) -> Awaitable[Any]:
        """Return its result."""


Middleware: TypeAlias = Callable[[Called, CallNext[Called]], Awaitable[Any]]


def check_middleware(function: Callable[..., Any], called: str) -> None:
    """Raise TypeError for a function that is not `async def` or does not take two arguments.

    `called` is the name of the first one, for the message.
    """
    code = function if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004 - its kind
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        fits = False
    else:
        fits = inspect.iscoroutinefunction(code)
    if not fits:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"middleware {name}: write async def {name}({called}, call_next)")


def around(middleware: Sequence[Middleware[Called]], last: CallNext[Called]) -> CallNext[Called]:
    """Return a function that runs `middleware`, the first one outermost, around `last`."""
    for each in reversed(middleware):
        last = _before(each, last)
    return last


def _before(middleware: Middleware[Called], call_next: CallNext[Called]) -> CallNext[Called]:
    return lambda called: middleware(called, call_next)
