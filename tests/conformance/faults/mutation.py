"""Putting a fault into a function of the client while it runs: a mutant, in the terms of mutation testing.

A fault names the function and a piece of its source with what takes its place. The function keeps its identity:
only its code object is exchanged, so whoever has imported it has the mutant. When the source is rewritten and the
piece is no longer there, applying the fault fails and says so; a fault that is not applied would prove nothing.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any


class Unmatched(Exception):
    """The piece of source that a fault replaces is not in its function just once."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One function, `module:Class.function`, and what is replaced in its source: each `old` must be there once."""

    target: str
    changes: tuple[tuple[str, str], ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, the function is the mutant. Raises Unmatched."""
        found = find(self.target)
        function = plain_function(found)
        usual, mutated = function.__code__, self._code(function)
        function.__code__ = mutated
        forget(found)
        try:
            yield
        finally:
            function.__code__ = usual
            forget(found)

    def _code(self, function: FunctionType) -> Any:
        source = inspect.getsource(function)
        for old, new in self.changes:
            if source.count(old) != 1:
                raise Unmatched(f"{self.target}: {old!r} is there {source.count(old)} times")
            source = source.replace(old, new)
        source = textwrap.dedent(source)
        while source.startswith("@"):
            source = source.partition("\n")[2]
        flags = __future__.annotations.compiler_flag
        made: dict[str, Any] = {}
        code = compile(source, f"<{self.target} with a fault>", "exec", flags=flags, dont_inherit=True)
        exec(code, function.__globals__, made)
        return made[function.__name__].__code__


def find(target: str) -> Any:
    """What `module:Class.function` names."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    return found


def plain_function(found: Any) -> FunctionType:
    """The function below properties, class methods and caches."""
    for inner in ("__func__", "fget", "__wrapped__"):
        found = getattr(found, inner, None) or found
    if isinstance(found, MethodType):
        found = found.__func__
    assert isinstance(found, FunctionType), found
    return found


def forget(found: Any) -> None:
    """A cache must not hold what the function gave before."""
    if hasattr(found, "cache_clear"):
        found.cache_clear()


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a client, in words, and the mutants that make it so."""

    what: str
    mutants: tuple[Mutant, ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, the client has the fault."""
        if not self.mutants:
            yield
            return
        first, *rest = self.mutants
        with first.applied(), Fault(self.what, tuple(rest)).applied():
            yield


def fault(what: str, *mutants: tuple[str, str, str]) -> Fault:
    """A fault of `(target, old, new)`; those of one target are put together."""
    changes: dict[str, list[tuple[str, str]]] = {}
    for target, old, new in mutants:
        changes.setdefault(target, []).append((old, new))
    return Fault(what, tuple(Mutant(target, tuple(pieces)) for target, pieces in changes.items()))
