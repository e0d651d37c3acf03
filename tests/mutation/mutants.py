"""Make small faults in Python source: swapped operators and arguments, other constants, removed statements.

A mutant replaces one piece of text, so that the rest of the module and its line numbers stay the same. Asserts, log
entries, annotations, decorators and docstrings are not mutated: no test should depend on them.
"""

from __future__ import annotations

import ast
import bisect
from collections import Counter
from typing import NamedTuple

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
    ast.Div: "*",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
_SWAPPED_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOGS = {"debug", "info", "warning", "error", "exception"}


class Mutant(NamedTuple):
    """One change of a module. `start` and `end` are offsets in its bytes."""

    module: str
    line: int
    place: str
    """The function, or what is assigned outside of one: `Class.method`, `Class.field`, `CONSTANT`."""
    change: str
    number: int
    """1, 2, ...: this change, counted within its place. The three identify a mutant while code moves."""
    text: str
    start: int
    end: int
    replacement: bytes

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement + source[self.end :]

    def compiles(self, source: bytes) -> bool:
        try:
            compile(self.apply(source), "mutant", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
        return True

    def __str__(self) -> str:
        number = f" ({self.number})" if self.number > 1 else ""
        return f"{self.module}:{self.line}: {self.place}: {self.change}{number}   in: {self.text}"


def mutants_of(module: str, source: bytes) -> list[Mutant]:
    """Return all mutants of a module in the order of their position. A few do not compile."""
    finder = _Finder(module, source)
    finder.visit(ast.parse(source))
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for each in sorted(set(finder.found), key=lambda each: (each.start, each.end, each.change)):
        seen[each.place, each.change] += 1
        found.append(each._replace(number=seen[each.place, each.change]))
    return found


class _Finder(ast.NodeVisitor):
    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.places: list[str] = []
        self.is_in_function = False

    def add(self, start: int, end: int, replacement: bytes) -> None:
        line = bisect.bisect_right(self.starts, start)
        old = " ".join(self.source[start:end].decode().split())
        change = f"{old} -> {' '.join(replacement.decode().split())}"
        text = self.lines[line - 1].decode().strip()
        place = ".".join(self.places)
        self.found.append(Mutant(self.module, line, place, change, 0, text, start, end, replacement))

    def visit_in(self, place: str, *nodes: ast.AST) -> None:
        """Visit what belongs to a name of a module or a class."""
        self.places.append(place)
        for node in nodes:
            self.visit(node)
        self.places.pop()

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        self.add(*self.span(node), text.encode())

    def replace_operator(self, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace an operator between two operands; parentheses and line breaks may surround it."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = self.source.find(old.encode(), start, end)
        if found >= 0:
            self.add(found, found + len(old), new.encode())

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, node.comparators, strict=False):
            old = ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
            self.replace_operator(left, right, old, _COMPARE[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.replace_operator(left, right, old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        is_text = any(
            isinstance(each, ast.JoinedStr | ast.Constant) and not isinstance(getattr(each, "value", 0), int)
            for each in (node.left, node.right)
        )
        if type(node.op) in _ARITHMETIC and not is_text:
            old = ast.unparse(ast.BinOp(ast.Name("a"), node.op, ast.Name("b")))[2:-2]
            self.replace_operator(node.left, node.right, old, _ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.add(self.span(node)[0], self.span(node.operand)[0], b"")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            self.replace_operator(node.target, node.value, "=", f"{_ARITHMETIC[type(node.op)]}=")
            *_, start, end, new = self.found.pop()
            self.add(self.source.rfind(b" ", 0, start) + 1, end, new)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace(node, str(not node.value))
        elif isinstance(node.value, int | float):
            self.replace(node, str(node.value + 1))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace(node.test, "True")
        self.replace(node.test, "False")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.replace(node.test, "True")
        self.replace(node.test, "False")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _SWAPPED_CALLS:
            self.replace(node.func, _SWAPPED_CALLS[node.func.id])
        elif len(node.args) > 1 and not any(isinstance(each, ast.Starred) for each in node.args):
            for left, right in zip(node.args, node.args[1:], strict=False):
                (start, left_end), (right_start, end) = self.span(left), self.span(right)
                between = self.source[left_end:right_start]
                swapped = self.source[right_start:end] + between + self.source[start:left_end]
                if swapped != self.source[start:end]:
                    self.add(start, end, swapped)
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self.replace(bound, "")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        is_inverted = isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool | None)
        if node.value is not None and not is_inverted:
            self.replace(node.value, "None")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        is_log = isinstance(called, ast.Attribute) and called.attr in _LOGS
        if not (is_log or isinstance(node.value, ast.Constant)):
            self.replace(node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Attribute | ast.Subscript):
            self.replace(node, "pass")
        if self.is_in_function:
            self.generic_visit(node)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=True):
                self.visit_in(ast.unparse(name), part)
        else:
            self.visit_in(ast.unparse(target), value)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace(node, "break")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            if self.is_in_function:
                self.visit(node.value)
            else:
                self.visit_in(ast.unparse(node.target), node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                self.visit(default)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "init":  # of a field: it would only add a parameter to the constructor
            self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_in(node.name, *node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name == "__repr__":
            return
        outer, self.is_in_function = self.is_in_function, True
        if outer:  # a function inside a function has the place of the outer one
            self.visit(node.args)
            for statement in node.body:
                self.visit(statement)
        else:
            self.visit_in(node.name, node.args, *node.body)
        self.is_in_function = outer

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Do not mutate what guards internal invariants."""

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace(node, "pass")
        self.generic_visit(node)
