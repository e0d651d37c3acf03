"""Annotations that pydantic checks and dumps: dataclasses, models, TypedDict, Enum, datetime, unions and many more.

Rules:
- Inside them msgpack's types are not converted, and unknown fields of a dataclass or a TypedDict are refused, as
  beside them. A pydantic model or dataclass applies its own configuration.
- A container reports the faults of its first wrong item, so that no input causes more faults than its type has
  fields.
- The text of a ValueError of the application's validators is passed to the caller.
- An annotation is refused if values of it cannot be sent or have no JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import (
    ErrorDetails,
    PydanticCustomError,
    SchemaValidator,
    core_schema,
)

from zcproto.common.faults import Fault, path_of, refusal
from zcproto.common.text import escape_text

ALLOWED: Final = (
    "int, float, str, bytes, bool, None, Any, list, dict with str keys, tuple, set, Literal, unions, Enum, "
    "datetime, date, time, timedelta, UUID, Decimal, dataclasses, TypedDict, pydantic models, and Annotated ones"
)

MOST_FIELDS: Final = 1_000
"""Most keys of a map that stands for an object: each unknown one is a fault."""

MOST_VALUES: Final = 20_000
"""Most values in a map that stands for a pydantic model: each can be a fault."""

_STRICT: Final = frozenset({"int", "float", "str", "bytes", "bool"})
_CONTAINERS: Final = frozenset({"list", "set", "frozenset", "tuple", "dict"})
_NESTED: Final = frozenset(
    {
        *("schema", "items_schema", "keys_schema", "values_schema", "extras_schema", "arguments_schema"),
        *("choices", "fields", "definitions", "steps", "python_schema"),
    }
)
"""Keys of a core schema that hold core schemas."""

_REFUSED: Final = frozenset({"generator", "callable", "complex", "is-subclass"})
_TEXT_KINDS: Final = frozenset({"str", "any", "uuid", "date", "datetime", "definition-ref"})
_MOST_TEXT: Final = 200
_REFERENCE: Final = "#/$defs/"
_SHOULD: Final = re.compile(r"^.*? should ")

_PROBLEMS: Final = {
    **dict.fromkeys(("missing", "missing_argument", "missing_keyword_only_argument"), "is missing"),
    **dict.fromkeys(("extra_forbidden", "unexpected_keyword_argument"), "is unknown"),
    **dict.fromkeys(("int_type", "int_from_float"), "must be an int"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "must be a list"),
    **dict.fromkeys(
        ("dict_type", "dataclass_type", "model_type", "model_attributes_type", "mapping_type"),
        "must be a map",
    ),
    "float_type": "must be a float",
    "string_type": "must be a str",
    "bytes_type": "must be bytes",
    "bool_type": "must be a bool",
    "none_required": "must be nil",
    "too_large": f"has more than {MOST_FIELDS} fields, or than {MOST_VALUES} values",
    "union_tag_invalid": "has an unknown tag",
    "union_tag_not_found": "has no tag",
}
"""What is wrong, by pydantic's type of the error; the others have pydantic's message."""


class Adapter:
    """pydantic's view of an annotation."""

    __slots__ = ("_dump", "_validate", "of")

    def __init__(self, annotation: Any, name: str) -> None:
        """Raises TypeError for an annotation that cannot be used."""
        try:
            self.of: TypeAdapter[Any] = TypeAdapter(annotation)
            schema = _tightened(self.of.core_schema)
            self._validate = SchemaValidator(schema).validate_python
            self._dump = self.of.serializer.to_python
            json_schemas({"in": (self, "validation"), "out": (self, "serialization")})
        except Exception as error:  # pydantic has many
            reason = escape_text(str(error).partition("\n")[0].partition(". ")[0], _MOST_TEXT)
            raise TypeError(f"{name} cannot be used ({reason}); allowed are {ALLOWED}") from error

    def check(self, value: Any, path: str) -> Any:
        """Return the argument that a value stands for. Raises InvalidArgument with all faults."""
        try:
            return self._validate(value)
        except ValidationError as error:
            raise refusal(_faults(error, value, path)) from None

    def dump(self, value: Any) -> Any:
        """Return what is sent for a value, which is not checked. Raises ValueError if a serializer fails."""
        return self._dump(value, by_alias=True, warnings=False)


class _JsonSchemas(GenerateJsonSchema):
    """JSON Schema without titles of fields, and with a format for Decimal, which is sent as text."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Ignore what JSON Schema cannot express; it is left out."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        """A field with a default is sent, too: it is optional in what is received only."""
        is_sent = self.mode == "serialization" and field["type"] != "typed-dict-field"
        can_be_left_out = field.get("serialization_exclude_if") is not None
        return (is_sent and not can_be_left_out) or super().field_is_required(field, total)

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        return {"type": "string", "format": "decimal"}


def json_schemas(
    adapters: Mapping[str, tuple[Adapter, JsonSchemaMode]],
) -> tuple[dict[str, JsonSchemaValue], dict[str, JsonSchemaValue]]:
    """Return the JSON Schema of each adapter, and the definitions that they share."""
    inputs = [(key, mode, adapter.of) for key, (adapter, mode) in adapters.items()]
    schemas, document = TypeAdapter.json_schemas(inputs, schema_generator=_JsonSchemas)
    definitions = document.get("$defs", {})
    names = _shared_names(definitions)
    found = {key: _renamed(schema, names) for (key, _), schema in schemas.items()}
    return found, {names.get(name, name): _renamed(each, names) for name, each in definitions.items()}


def _shared_names(definitions: dict[str, Any]) -> dict[str, str]:
    """Return new names for definitions that pydantic has split by their direction: one if both are the same, as for
    recursive ones; otherwise what is sent has the name of its class."""
    pairs = [
        (name, f"{base}-Output", base)
        for name in definitions
        if (base := name.removesuffix("-Input")) != name
        and f"{base}-Output" in definitions
        and base not in definitions
    ]
    split = {sent: base for _, sent, base in pairs}
    while True:
        names = {each: base for received, sent, base in pairs for each in (received, sent)}
        same = [
            pair
            for pair in pairs
            if _renamed(definitions[pair[0]], names) == _renamed(definitions[pair[1]], names)
        ]
        if len(same) == len(pairs):
            return {**split, **names}
        pairs = same


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    """Return a schema with other names of definitions."""
    if isinstance(schema, list):
        return [_renamed(each, names) for each in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {key: _renamed(value, names) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        name = reference.removeprefix(_REFERENCE)
        renamed["$ref"] = _REFERENCE + names.get(name, name)
    return renamed


def _tightened(schema: Any, *, is_own: bool = True) -> Any:
    """Return a core schema with the rules of this module. Raises TypeError for what cannot be sent.

    `is_own` is False inside a pydantic model, whose schema is looked at only.
    """
    if isinstance(schema, list):
        return [_tightened(each, is_own=is_own) for each in schema]
    if isinstance(schema, tuple):  # a choice of a union, and its label
        return (_tightened(schema[0], is_own=is_own), *schema[1:])
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # fields or choices by their names
        return {name: _tightened(each, is_own=is_own) for name, each in schema.items()}
    if kind in _REFUSED:
        raise TypeError(f"no value of kind {kind!r} can be sent")
    if kind == "dict" and not _is_text(schema.get("keys_schema", {"type": "any"})):
        raise TypeError("the keys of a dict must be str")
    is_model = hasattr(schema.get("cls"), "__pydantic_validator__")
    tightened = {
        key: _tightened(value, is_own=is_own and not is_model) if key in _NESTED else value
        for key, value in schema.items()
    }
    if not is_own:
        return schema
    if is_model:
        return _bounded(_check_values, schema)
    if kind in _STRICT:
        tightened.setdefault("strict", True)
    elif kind in _CONTAINERS:
        tightened["fail_fast"] = True
    elif kind in ("dataclass", "typed-dict"):
        config = {"extra_fields_behavior": "forbid", **schema.get("config", {})}
        tightened["config"] = config
        if kind == "typed-dict":
            tightened["extra_behavior"] = config["extra_fields_behavior"]
        return _bounded(_check_fields, tightened)
    return tightened


def _is_text(schema: Any) -> bool:
    """Return whether the values of a core schema are sent as str."""
    kind = schema["type"]
    if kind in ("enum", "literal"):
        allowed = schema["members"] if kind == "enum" else schema["expected"]
        return all(isinstance(getattr(each, "value", each), str) for each in allowed)
    return kind in _TEXT_KINDS or (kind != "nullable" and "schema" in schema and _is_text(schema["schema"]))


def _bounded(check: Callable[[Any], Any], schema: dict[str, Any]) -> core_schema.CoreSchema:
    """Return a core schema that checks the size of a value first."""
    inner: Any = {key: value for key, value in schema.items() if key != "ref"}
    return core_schema.no_info_before_validator_function(check, inner, ref=schema.get("ref"))


def _check_fields(value: Any) -> Any:
    if value.__class__ is dict and len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_large", "too large")
    return value


def _check_values(value: Any) -> Any:
    containers, count = [value], 0
    for container in containers:  # grows in the loop
        if container.__class__ is dict:
            container = container.values()  # noqa: PLW2901
        elif container.__class__ is not list:
            continue
        count += len(container)
        if count > MOST_VALUES:
            raise PydanticCustomError("too_large", "too large")
        containers += [each for each in container if each.__class__ in (dict, list)]
    return value


def _faults(error: ValidationError, value: Any, path: str) -> list[Fault]:
    """Return the faults, one for a path."""
    faults: dict[str, str] = {}
    labelled: set[str] = set()
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        where, is_labelled = _where(each, value, path)
        problem = _problem(each["type"], each["msg"])
        if where not in faults:
            faults[where] = problem
        elif problem.startswith("must be ") and problem not in faults[where]:  # another member of a union
            faults[where] += f" or {problem.removeprefix('must be ')}"
        if is_labelled:
            labelled.add(where)
    for where in labelled:  # a fault inside a member of a union is more specific
        if any(other.startswith((f"{where}.", f"{where}[")) for other in faults):
            del faults[where]
    return list(faults.items())


def _where(error: ErrorDetails, value: Any, path: str) -> tuple[str, bool]:
    """Return the path of a fault, and whether it is that of a member of a union.

    pydantic's location has the members of unions too. They are the parts that the value does not have.
    """
    is_labelled = False
    *_, last = error["loc"] or ("",)
    for part in error["loc"]:
        is_missing = part is last and error["type"].startswith("missing")
        is_inside = value.__class__ is (list if isinstance(part, int) else dict)
        if is_inside and _has(value, part):
            value = value[part]
        elif not (is_inside and is_missing):
            is_labelled = part != "[key]"
            continue
        path, is_labelled = path_of(path, part), False
    return path, is_labelled


def _has(container: Any, part: Any) -> bool:
    return part < len(container) if isinstance(part, int) else part in container


def _problem(kind: str, message: str) -> str:
    known = _PROBLEMS.get(kind)
    if known is not None:
        return known
    message = escape_text(message, _MOST_TEXT)
    for prefix in ("Value error, ", "Assertion failed, "):
        if message.startswith(prefix):
            return f"is not acceptable: {message.removeprefix(prefix)}"
    return _SHOULD.sub("must ", message) if _SHOULD.match(message) else f"is not acceptable: {message}"
