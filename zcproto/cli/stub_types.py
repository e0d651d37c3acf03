"""Methods and their types from the answer of `server.info`, ready to be written in a programming language.

Rules:
- All text comes from a server, which may be hostile: names become identifiers, and the languages write everything
  else as literals or escaped comments.
- Classes of several methods that are the same have one name.
"""

from __future__ import annotations

import json
import keyword
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from zcproto.app.app import RESERVED_PREFIXES

_REFERENCE: Final = "#/$defs/"
_MOST_TEXT: Final = 2_000
_MAX_NAME: Final = 80
_DEEPEST: Final = 64
"""Classes within classes; deeper ones have any value."""

_CONTROL: Final = re.compile(r"[^\n -~\u00a1-\u1fff\u2c00-\ud7ff]")


@dataclass
class Field:
    """A parameter of a method or a field of a class."""

    name: str
    type: str
    is_required: bool
    default: str = ""
    """The default as text, if the schema has it."""


@dataclass
class Class:
    """A map with known keys."""

    name: str
    fields: list[Field] = field(default_factory=list)
    is_param: bool = False
    """Whether it only stands for values of parameters, beside a class of the same values in results."""


@dataclass
class Alias:
    """A name for another type."""

    name: str
    type: str


@dataclass
class StubMethod:
    """A method.

    `others` is the type of further parameters, "" if it takes only those in `params`. `sends` and `takes` are the
    types of its items, "" without items.
    """

    name: str
    doc: str
    params: list[Field]
    others: str
    result: str
    sends: str = ""
    takes: str = ""


class Language(ABC):
    """How a programming language writes types. `simple` are its types by JSON Schema's type or format."""

    anything: ClassVar[str]
    simple: ClassVar[Mapping[str, str]]
    reserved: ClassVar[frozenset[str]]
    """Names that no class may have."""

    @abstractmethod
    def literal(self, values: list[Any]) -> str: ...

    @abstractmethod
    def array(self, item: str) -> str: ...

    @abstractmethod
    def tuple_of(self, items: list[str]) -> str: ...

    @abstractmethod
    def map_of(self, value: str) -> str: ...

    def union(self, members: Iterable[str]) -> str:
        different = dict.fromkeys(members)
        return self.anything if self.anything in different else " | ".join(different)

    @abstractmethod
    def write(self, stubs: Stubs, source: str) -> str:
        """Return a module with a typed client. `source` is where the methods were found."""


class Stubs:
    """The methods of an application, in one language."""

    def __init__(self, listed: Iterable[Mapping[str, Any]], language: Language) -> None:
        """`listed` are methods as `server.info` lists them; those of the protocol are left out."""
        self.types: list[Class | Alias] = []
        self.methods: list[StubMethod] = []
        self.without_schema: list[str] = []
        self._language = language
        self._names: dict[str, str] = {}  # by the definition and what it refers to
        self._used = set(language.reserved)
        self._open: set[str] = set()  # aliases that are being made
        self._keys: dict[str, str] = {}  # of the definitions of one method
        self._depth = 0
        for method in listed:
            name = method.get("name")
            if not isinstance(name, str) or name.startswith(RESERVED_PREFIXES):
                continue
            schema = method.get("schema")
            if isinstance(schema, dict):
                self._add(name, method, schema)
            else:
                self.without_schema.append(name)

    def _add(self, name: str, method: Mapping[str, Any], schema: dict[str, Any]) -> None:
        definitions = _map(schema.get("$defs"))
        self._keys = {}
        params = _map(schema.get("params"))
        others = params.get("additionalProperties", False)
        items = {key: self._type(schema[key], definitions) for key in ("sends", "takes") if key in schema}
        self.methods.append(
            StubMethod(
                name,
                clean_text(str(method.get("doc", ""))),
                self._fields(params, definitions),
                "" if others is False else self._type(others, definitions),
                self._type(schema.get("result"), definitions),
                **items,
            )
        )

    def _fields(self, schema: Mapping[str, Any], definitions: dict[str, Any]) -> list[Field]:
        required = schema.get("required", ())
        fields = [
            Field(name, self._type(each, definitions), name in required, _default(each))
            for name, each in _map(schema.get("properties")).items()
            if isinstance(name, str)
        ]
        return sorted(fields, key=lambda each: not each.is_required)

    def _type(self, schema: Any, definitions: dict[str, Any]) -> str:
        """Return the type of a schema; `anything` for what is not known."""
        language = self._language
        if not isinstance(schema, dict):
            return language.anything
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self._named(reference.removeprefix(_REFERENCE), definitions)
        if "const" in schema:
            return language.literal([schema["const"]])
        if isinstance(schema.get("enum"), list):
            return language.literal(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                return language.union(self._type(each, definitions) for each in schema[key])
        kind = schema.get("type")
        if kind == "array":
            items = schema.get("prefixItems")
            if isinstance(items, list):
                return language.tuple_of([self._type(each, definitions) for each in items])
            return language.array(self._type(schema.get("items"), definitions))
        if kind == "object":
            return language.map_of(self._type(schema.get("additionalProperties"), definitions))
        form = schema.get("format")
        if kind == "string" and isinstance(form, str) and form in language.simple:
            return language.simple[form]
        return language.simple.get(kind, language.anything) if isinstance(kind, str) else language.anything

    def _named(self, name: str, definitions: dict[str, Any]) -> str:
        """Return the name of a class or alias, which is made at its first use."""
        definition = definitions.get(name)
        if not isinstance(definition, dict) or self._depth > _DEEPEST:
            return self._language.anything
        key = self._keys.get(name) or self._keys.setdefault(name, _closure(name, definitions))
        if key in self._open:  # an alias of itself
            return self._language.anything
        known = self._names.get(key)
        if known is not None:
            return known
        own = self._names[key] = unique(identifier(name, capital=True), self._used)
        self._depth += 1
        if definition.get("type") == "object" and isinstance(definition.get("properties"), dict):
            made = Class(own, is_param=name.endswith("-Input"))
            self.types.append(made)
            made.fields = self._fields(definition, definitions)
        else:
            self._open.add(key)
            alias = Alias(own, self._type(definition, definitions))
            self._open.remove(key)
            self.types.append(alias)
        self._depth -= 1
        return own


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _default(schema: Any) -> str:
    return (
        clean_text(json.dumps(schema["default"])) if isinstance(schema, dict) and "default" in schema else ""
    )


def _closure(name: str, definitions: dict[str, Any]) -> str:
    """Return a key that two definitions share if they, and all they refer to, are the same."""
    found = {name: definitions[name]}
    waiting: list[Any] = [definitions[name]]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, list):
            waiting += schema
        elif isinstance(schema, dict):
            waiting += schema.values()
            other = str(schema.get("$ref")).removeprefix(_REFERENCE)
            if other in definitions and other not in found:
                found[other] = definitions[other]
                waiting.append(definitions[other])
    return json.dumps([name, found], sort_keys=True, default=repr)


def identifier(name: str, *, capital: bool = False) -> str:
    """Return a name as an identifier: `order_place` for `order.place`, or in capitals `OrderPlace`."""
    words = re.findall(r"[A-Za-z0-9]+" if capital else r"[A-Za-z0-9_]+", name[:_MAX_NAME])
    text = "".join(word[0].upper() + word[1:] for word in words) if capital else "_".join(words)
    if not text or text[0].isdigit():
        text = f"_{text}"
    return f"{text}_" if keyword.iskeyword(text) else text


def unique(name: str, used: set[str]) -> str:
    """Return a name that is not used, and add it."""
    number, chosen = 1, name
    while chosen in used:
        number += 1
        chosen = f"{name}{number}"
    used.add(chosen)
    return chosen


def clean_text(text: str) -> str:
    """Return text for comments, without control characters, and of bounded length."""
    return _CONTROL.sub("?", text[:_MOST_TEXT]).strip()
