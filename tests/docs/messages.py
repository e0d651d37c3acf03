"""The messages that users can see, read from the sources of the package, with `…` for their variable parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

ROOT = Path(__file__).parents[2]

ROOTS: Final = {"ZcprotoError", "ClickException", "UsageError", "BadParameter", "RefusedError"}
MAKERS: Final = {"_fault", "_bad", "refuse", "_unusable", "_refusal"}
"""Functions that turn a text into an error, or into a fault of one."""

RETURNERS: Final = {
    "zcproto/config/load.py": {"_from_file", "_unknown_key", "_unknown_section", "_outside_section"},
    "zcproto/cli/__init__.py": {"_explain"},
    "zcproto/certs/examine.py": {"_key_problem"},
}
"""Functions, by file, that return or yield a message or its beginning."""

PEERS_ALONE: Final = {"MessageError", "FrameError"}
"""Errors that only a broken peer gets, always after the code PROTOCOL_ERROR."""


class Message(NamedTuple):
    """A message, and the place that creates it."""

    text: str
    place: str


def text_of(node: ast.expr) -> str | None:
    """Return a literal or an f-string, with `…` for variable parts. Return None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = text_of(node.left), text_of(node.right)
        return None if parts == (None, None) else "".join(part or "…" for part in parts)
    return None


def texts_in(node: ast.expr) -> Iterator[str]:
    """Yield the outermost texts of an expression, except the keys of maps."""
    text = text_of(node)
    if text is not None:
        yield text
        return
    if isinstance(node, ast.Dict | ast.Call) and not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "escape_text"
    ):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from texts_in(child)


def aliases_in(tree: ast.AST) -> dict[str, set[str]]:
    """Return what other names of a module stand for: `import A as B`, `b = A`, `b = A if condition else C`."""
    found: dict[str, set[str]] = {}

    def names(value: ast.expr) -> set[str]:
        if isinstance(value, ast.IfExp):
            return names(value.body) | names(value.orelse)
        name = _last_name(value)
        return {name, *found.get(name, ())} - {""}

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                if each.asname:
                    found.setdefault(each.asname, set()).add(each.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found.setdefault(_last_name(target), set()).update(names(node.value))
    return found


class Sources:
    """The parsed sources of the package."""

    def __init__(self) -> None:
        self.trees = {
            path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted((ROOT / "zcproto").rglob("*.py"))
            if path.parts[len(ROOT.parts) + 1] != "load"  # its messages name their cure where they are raised
        }
        self.bases: dict[str, list[str]] = {}
        self.codes: dict[str, str] = {}
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.bases[node.name] = [_last_name(base) for base in node.bases]
                    code = _code_of(node)
                    if code:
                        self.codes[node.name] = code

    def is_ours(self, name: str) -> bool:
        return name in ROOTS or any(map(self.is_ours, self.bases.get(name, [])))

    def messages(self) -> Iterator[Message]:
        for path, tree in self.trees.items():
            aliases = aliases_in(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = _last_name(node.func)
                    for each in {name} | aliases.get(name, set()):
                        for text in self._raised(each, node):
                            yield Message(text, f"{path}:{node.lineno}")
                elif isinstance(node, ast.FunctionDef) and node.name in RETURNERS.get(path, ()):
                    for each in ast.walk(node):
                        if isinstance(each, ast.Return | ast.Yield) and each.value is not None:
                            for text in texts_in(each.value):
                                yield Message(text, f"{path}:{each.lineno}")

    def _raised(self, name: str, call: ast.Call) -> Iterator[str]:
        if name in PEERS_ALONE or not (name in MAKERS or self.is_ours(name)):
            return
        found = [text for argument in call.args for text in texts_in(argument)]
        if name == "TlsError":
            yield ": ".join(text for text in found if text)
        elif name == "ProtocolError":
            yield from (f"PROTOCOL_ERROR: {text}" for text in found)
        elif name in self.codes:
            yield from (f"{self.codes[name]}: {text}" for text in found)
        else:
            yield from (text for text in found if " " in text)


def _code_of(node: ast.ClassDef) -> str:
    """Return the name of the code of a CallError, or an empty text for another class."""
    for each in node.body:
        if (
            isinstance(each, ast.Assign)
            and _last_name(each.targets[0]) == "code"
            and isinstance(each.value, ast.Attribute)
        ):
            return each.value.attr
    return ""


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


@cache
def sources() -> Sources:
    """Parse the package once for all tests."""
    return Sources()


@cache
def all_messages() -> tuple[Message, ...]:
    return tuple(sources().messages())
