"""Typed clients in Python, and the methods of a server as text in its notation."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

import click

from zcproto.cli.stub_types import Alias, Class, Language, StubMethod, Stubs, identifier, unique
from zcproto.errors import ZcprotoError

_IMPORTS: Final = (
    ("collections.abc", ("AsyncIterable", "Iterable", "Mapping", "Sequence")),
    ("decimal", ("Decimal",)),
    ("typing", ("Any", "Literal", "TypeAlias")),
    ("uuid", ("UUID",)),
    ("", ()),
    ("pydantic", ("TypeAdapter",)),
    ("typing_extensions", ("NotRequired", "ReadOnly", "TypedDict")),
    ("", ()),
    (
        "zcproto.client.typed",
        ("UNSET", "BlockingTypedClient", "BlockingTypedStream", "TypedClient", "TypedStream"),
    ),
)
"""Modules and the names that are imported from them if they are used; a blank line between the groups."""

_TYPES: Final = frozenset({"int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "datetime"})
"""Names that no method may have: the annotations of the others would mean the method."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_ENDING_QUOTE: Final = re.compile(r'"(?="|\Z)')
"""Quotes that could end a docstring: one before another, and the last character."""


class Python(Language):
    """Classes are `TypedDict`, as values are maps on the wire. A blocking client is for programs without an event
    loop."""

    def __init__(self, *, is_blocking: bool = False) -> None:
        self._is_blocking = is_blocking

    anything = "Any"
    simple: ClassVar = {
        **{"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"},
        **{"binary": "bytes", "uuid": "UUID", "decimal": "Decimal", "duration": "datetime.timedelta"},
        **{"date-time": "datetime.datetime", "date": "datetime.date", "time": "datetime.time"},
    }
    reserved = frozenset(
        {
            *("Any", "Literal", "TypeAlias", "UUID", "Decimal", "TypeAdapter", "TypedDict", "NotRequired"),
            *(
                "ReadOnly",
                "TypedStream",
                "TypedClient",
                "BlockingTypedStream",
                "BlockingTypedClient",
                "UNSET",
            ),
            *("AsyncIterable", "Iterable", "Mapping", "Sequence", "Api"),
            *dir(builtins),
        }
    )

    def literal(self, values: list[Any]) -> str:
        if not values or not all(value is None or isinstance(value, str | int) for value in values):
            return "Any"
        return f"Literal[{', '.join(map(_constant, values))}]"

    def array(self, item: str) -> str:
        return f"list[{item}]"

    def tuple_of(self, items: list[str]) -> str:
        return f"tuple[{', '.join(items) or '()'}]"

    def map_of(self, value: str) -> str:
        return f"dict[str, {value}]"

    def signature(self, method: StubMethod) -> str:
        """Return a method as one line for people."""
        params = [
            f"{each.name}: {each.type}{each.default and f' = {each.default}'}" for each in method.params
        ]
        params += [f"**others: {method.others}"] if method.others else []
        params += [f"items: stream of {method.takes}"] if method.takes else []
        result = f"stream of {method.sends}" if method.sends else method.result
        return f"{method.name}({', '.join(params)}) -> {result}"

    def write(self, stubs: Stubs, source: str) -> str:
        parts = [_class(each) for each in stubs.types if isinstance(each, Class)]
        parts += [
            "\n".join(
                f"{each.name}: TypeAlias = {each.type}" for each in stubs.types if isinstance(each, Alias)
            )
        ]
        used = {"_call", "_client", "_send", "_stream", *_TYPES}
        methods = [
            _method(each, unique(identifier(each.name), used), is_blocking=self._is_blocking)
            for each in stubs.methods
        ]
        parts += ["\n".join(adapters for adapters, _ in methods)]
        base = "BlockingTypedClient" if self._is_blocking else "TypedClient"
        head = f'class Api({base}):\n    """The methods of an application, called by a client."""'
        parts.append("\n\n".join([head, *(code for _, code in methods)]))
        body = "\n\n\n".join(filter(None, parts))
        about = _docstring(f"Typed client of {source}, written by `zcproto stubs`: do not edit.", 0)
        text = f"{about}\n\nfrom __future__ import annotations\n\n{_imports(body)}\n\n\n{body}\n"
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise ZcprotoError(
                f"the methods of {source} cannot be written as Python: {error.msg}; report this with the answer of"
                " server.info, or use another language"
            ) from error
        return text


def _imports(body: str) -> str:
    lines = ["import datetime"] if "datetime." in body else []
    words = set(re.findall(r"\w+", body))
    for module, names in _IMPORTS:
        used = [name for name in names if name in words]
        if used:
            lines.append(f"from {module} import {', '.join(used)}")
        elif not module and lines and lines[-1]:
            lines.append("")
    return "\n".join(lines)


def _is_name(name: str) -> bool:
    return _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def _constant(value: str | int | None) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable() and not set('"\\') & set(value):
        return f'"{value}"'
    return ascii(value)


def _docstring(text: str, indent: int) -> str:
    escaped = _ENDING_QUOTE.sub(r"\"", text.replace("\\", "\\\\"))
    lines = [f"{indent * ' '}{line.strip()}".rstrip() for line in escaped.splitlines()]
    return '"""' + "\n".join(lines).lstrip() + '"""'


def _received(kind: str) -> str:
    """Return a type for values that are only read, so that those of its parts may be more specific."""
    return kind.replace("list[", "Sequence[").replace("dict[", "Mapping[")


def _class(each: Class) -> str:
    types = {
        one.name: f"ReadOnly[{_received(one.type)}]" if each.is_param else one.type for one in each.fields
    }
    fields = [
        (one.name, types[one.name] if one.is_required else f"NotRequired[{types[one.name]}]")
        for one in each.fields
    ]
    if all(_is_name(name) for name, _ in fields):
        lines = [f"    {name}: {kind}" for name, kind in fields] or ["    pass"]
        return "\n".join([f"class {each.name}(TypedDict):", *lines])
    pairs = [f"        {name!a}: {kind!a}," for name, kind in fields]
    return "\n".join([f"{each.name} = TypedDict(", f"    {each.name!a},", "    {", *pairs, "    },", ")"])


def _method(method: StubMethod, name: str, *, is_blocking: bool) -> tuple[str, str]:
    """Return the adapters of the types that a method returns, and the method of the class."""
    names = {each.name for each in method.params}
    items, timeout, key, durable = (
        unique(f"call_{each}", names) if each in names else each
        for each in ("items", "timeout", "idempotency_key", "durable")
    )
    others = unique("others", names)
    arguments, sent = _arguments(method, others)
    wait, asynchronous, stream = ("", "", "Blocking") if is_blocking else ("await ", "async ", "")
    adapter, head, result = f"_{name}", f"{asynchronous}def {name}", method.result
    adapters = [_adapter(adapter, result)]
    call, values = f"{wait}self._call", [adapter, _constant(method.name), sent]
    if method.takes:
        kind = f"Iterable[{method.takes}]"
        arguments.insert(0, f"{items}: {kind if is_blocking else f'Async{kind} | {kind}'}")
        call, values = f"{wait}self._send", [*values, items]
    if method.sends:
        adapters.append(_adapter(f"{adapter}_items", method.sends))
        head, result = f"def {name}", f"{stream}TypedStream[{method.sends}, {method.result}]"
        call, values = "self._stream", [f"{adapter}_items", *values]
    if method.sends or method.takes:
        arguments.append(f"{timeout}: float | None = None")
        values.append(f"timeout={timeout}")
        if not method.takes:
            arguments.append(f"{durable}: bool = False")
            values.append(f"durable={durable}")
    else:
        arguments += [f"{timeout}: float | None = UNSET", f"{key}: str | None = None"]
        values += [f"timeout={timeout}", f"idempotency_key={key}"]
    if method.others and sent != "params":
        arguments.append(f"**{others}: {method.others}")
    body = [f"return {call}(", *(f"    {each}," for each in values), ")"]
    lines = [f"    {head}(", "        self,", "        *,", *(f"        {each}," for each in arguments)]
    lines.append(f"    ) -> {result}:")
    if method.doc:
        lines.append(8 * " " + _docstring(method.doc, 8))
    return "\n".join(adapters), "\n".join([*lines, *(f"        {each}" for each in body)])


def _adapter(name: str, kind: str) -> str:
    return f"{name}: TypeAdapter[{kind}] = TypeAdapter({kind})"


def _arguments(method: StubMethod, others: str) -> tuple[list[str], str]:
    """Return the parameters of a method, and the expression for the params that are sent, with `others`."""
    if not all(_is_name(each.name) and each.name != "self" for each in method.params):
        return ["params: dict[str, Any]"], "params"
    arguments = [
        f"{each.name}: {_received(each.type)}{'' if each.is_required else ' = UNSET'}"
        for each in method.params
    ]
    pairs = [f"{_constant(each.name)}: {each.name}" for each in method.params]
    return arguments, f"{{{', '.join([*pairs, *([f'**{others}'] if method.others else [])])}}}"


def listed_methods(info: Any) -> list[Mapping[str, Any]]:
    """Return the methods in an answer of `server.info`. Raises click.ClickException for another answer."""
    methods = info.get("methods") if isinstance(info, dict) else None
    if not isinstance(methods, list) or not all(isinstance(each, dict) for each in methods):
        raise click.ClickException("the answer of server.info has no list of methods")
    return methods


def signatures(methods: Iterable[Mapping[str, Any]]) -> str:
    """Return the methods of an application as text: their signatures, what they do, and the types in them."""
    language = Python()
    found = Stubs(methods, language)
    lines = []
    for method in found.methods:
        lines.append(language.signature(method))
        lines += [f"    {line}" for line in method.doc.splitlines()[:1]]
    lines += [f"{name}(...)" for name in found.without_schema]
    for each in found.types:
        if isinstance(each, Alias):
            lines += ["", f"{each.name} = {each.type}"]
            continue
        fields = [f"{one.name}: {one.type}{one.default and f' = {one.default}'}" for one in each.fields]
        lines += ["", f"{each.name}:", *(f"    {one}" for one in fields)]
    return "\n".join(lines)
