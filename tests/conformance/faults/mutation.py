"""Mutate functions of the client at run time, as in mutation testing.

A fault has the name of a function, a part of its code and the replacement. The function may be in any module.
Function and part are parsed before they are compared: line breaks, parentheses, quotes and comments do not matter.
The function object stays the same and only its code object is replaced, so modules that imported it see the
mutant, too. If the part is not in the function, applying the fault fails: it would prove nothing.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Final

import zcproto


class Unmatched(Exception):
    """The source to replace is not in the function exactly once."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A function, `Class.function`, and replacements in its source. Each `old` must occur once."""

    target: str
    changes: tuple[tuple[str, str], ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the function by its mutant for the duration of the context. Raises Unmatched."""
        found = find(self.target)
        function = plain_function(found)
        original, mutated = function.__code__, self._code(function)
        function.__code__ = mutated
        clear_cache(found)
        try:
            yield
        finally:
            function.__code__ = original
            clear_cache(found)

    def _code(self, function: FunctionType) -> Any:
        written = inspect.getsource(function)
        tree = ast.parse(textwrap.dedent(written))
        tree.body[0].decorator_list = []  # type: ignore[attr-defined]
        source = ast.unparse(tree)
        for old, new in self.changes:
            found = max(([*re.finditer(each, source)] for each in _patterns(old)), key=len)
            if len(found) != 1:
                raise Unmatched(f"{self.target}: {old!r} occurs {len(found)} times in the source")
            start, end = found[0].span()
            indented = new.replace("\n    ", "\n") if written.startswith(" ") else new  # as in a class
            source = source[:start] + indented.strip(" ") + source[end:]
        flags = __future__.annotations.compiler_flag
        namespace: dict[str, Any] = {}
        code = compile(source, f"<{self.target} with a fault>", "exec", flags=flags, dont_inherit=True)
        exec(code, function.__globals__, namespace)
        return namespace[function.__name__].__code__


def _patterns(part: str) -> list[str]:
    """Return what a part of a function may look like: statements, an expression, or the beginning of either."""
    first, _, rest = textwrap.dedent(part.lstrip("\n")).strip().partition("\n")
    plain = f"{first}\n{textwrap.dedent(rest)}" if rest else first
    is_elif = plain.startswith("elif ")
    found = [plain if "'" in plain else plain.replace('"', "'")]
    for text, left_out in ((plain, ""), (f"{plain.removeprefix('el' * is_elif)}\n    pass", "\n    pass")):
        with suppress(SyntaxError):
            normal = ast.unparse(ast.parse(text)).removesuffix(left_out)
            found.append("el" * is_elif + normal)
            if normal.startswith("(") and not plain.startswith("("):  # of a tuple
                found.append(normal[1:-1])
    return [r"\s+".join(map(re.escape, each.split())) for each in found]


@cache
def definitions() -> dict[str, list[str]]:
    """Return the modules of the package that define each class and function."""
    package, found = Path(zcproto.__file__).parent, defaultdict[str, list[str]](list)
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for name in re.findall(r"^(?:class|def) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name].append(module)
    return found


def find(target: str) -> Any:
    """Return what is named `Class.function` in the only module that defines it. Raises Unmatched."""
    first, *rest = target.split(".")
    found = []
    for module in definitions()[first]:
        each: Any = getattr(importlib.import_module(module), first)
        with suppress(AttributeError):
            for name in rest:
                each = inspect.getattr_static(each, name)
            found.append(each)
    if len(found) != 1:
        raise Unmatched(f"{target} is defined {len(found)} times")
    return found[0]


def plain_function(found: Any) -> FunctionType:
    """Return the function inside a property, a class method or a cache."""
    for inner in ("__func__", "fget", "__wrapped__"):
        found = getattr(found, inner, None) or found
    if isinstance(found, MethodType):
        found = found.__func__
    assert isinstance(found, FunctionType), found
    return found


def clear_cache(found: Any) -> None:
    """Drop results that a cached function returned before."""
    if hasattr(found, "cache_clear"):
        found.cache_clear()


@dataclass(frozen=True, slots=True)
class Fault:
    """A description of what the faulty client does, and the mutants that make it do so."""

    what: str
    mutants: tuple[Mutant, ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the fault for the duration of the context."""
        if not self.mutants:
            yield
            return
        first, *rest = self.mutants
        with first.applied(), Fault(self.what, tuple(rest)).applied():
            yield


_GENERAL_WAY: Final = {
    "ClientConnection.receive_data",
    "ClientConnection._receive",
    "ClientConnection._received_response",
    "decode_body",
}


def fault(what: str, *mutants: tuple[str, str, str]) -> Fault:
    """Make a fault from tuples of `(target, old, new)`, which are grouped by target."""
    changes: dict[str, list[tuple[str, str]]] = {}
    if any(target in _GENERAL_WAY for target, _, _ in mutants):
        changes["ClientConnection.receive_answers"] = [
            ("token not in self._tokens", "True")
        ]  # usual answers would avoid the fault
    for target, old, new in mutants:
        changes.setdefault(target, []).append((old, new))
    return Fault(what, tuple(Mutant(target, tuple(pieces)) for target, pieces in changes.items()))
