"""The JSON Schema of a method: its parameters, its result, and the items that it sends and takes.

    {"params": {"type": "object", "properties": {...}, "required": [...], "additionalProperties": false},
     "result": {...}, "sends": {...}, "takes": {...}, "$defs": {...}}

It describes values as they are on the wire: bin is a str of the format `binary`, Decimal one of `decimal`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, Literal

from zcproto.common.parameters import Signature
from zcproto.common.value_types import ValueType

_SHOWN_DEFAULTS: Final = frozenset({type(None), bool, int, float, str})

Direction = Literal["validation", "serialization"]
"""What a caller sends, and what it receives; the two differ for some types."""


def method_schema(signature: Signature, *, sends: bool) -> dict[str, Any]:
    """Return the schema of a method. `sends` is whether it sends items."""
    types: dict[str, tuple[ValueType, Direction]] = {
        f"params.{each.name}": (each.type, "validation") for each in signature.parameters
    }
    types["result"] = signature.result, "serialization"
    if sends:
        types["sends"] = signature.sends, "serialization"
    if signature.items is not None:
        types["takes"] = signature.items[1], "validation"
    schemas, definitions = _schemas(types)
    properties: dict[str, Any] = {}
    others: Any = False
    for each in signature.parameters:
        schema = schemas.pop(f"params.{each.name}")
        if each.name.startswith("**"):
            others = schema or True
            continue
        default = each.default.value if isinstance(each.default, Enum) else each.default
        if not each.is_required and default.__class__ in _SHOWN_DEFAULTS:
            schema = {**schema, "default": default}
        properties[each.name] = schema
    params = {"type": "object", "properties": properties, "additionalProperties": others}
    required = [each.name for each in signature.parameters if each.is_required]
    if required:
        params["required"] = required
    return {"params": params, **schemas, **({"$defs": definitions} if definitions else {})}


def _schemas(
    types: dict[str, tuple[ValueType, Direction]],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the schema of each type, and the definitions that they share."""
    schemas = {key: type_.simple_schema for key, (type_, _) in types.items() if type_.adapter is None}
    adapters = {
        key: (type_.adapter, mode) for key, (type_, mode) in types.items() if type_.adapter is not None
    }
    if not adapters:
        return schemas, {}
    from zcproto.common.adapters import json_schemas  # noqa: PLC0415  pydantic is large

    described, definitions = json_schemas(adapters)
    return {**schemas, **described}, definitions
