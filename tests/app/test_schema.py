"""The JSON Schema of methods describes what callers send and receive, for every type."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, field_serializer

from zcproto.app.app import Context, Items, Method


class Color(Enum):
    RED = "red"


@dataclass
class Order:
    item: str
    count: int = 1
    parts: list[Order] | None = None


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    schema = Method("m", function).schema
    for key, value in schema.items():
        if key != "$defs":
            Draft202012Validator.check_schema(value)
    return schema


def test_plain_types_have_a_schema() -> None:
    def function(a: int, b: str = "x", c: bytes = b"", *, d: float = 1.5, e: Any = None) -> None: ...

    assert schema_of(function) == {
        "params": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string", "default": "x"},
                "c": {"type": "string", "format": "binary"},
                "d": {"type": "number", "default": 1.5},
                "e": {"default": None},
            },
            "required": ["a"],
            "additionalProperties": False,
        },
        "result": {"type": "null"},
    }


def test_method_without_annotations_has_an_open_schema() -> None:
    schema = schema_of(lambda **others: others)
    assert schema == {
        "params": {"type": "object", "properties": {}, "additionalProperties": True},
        "result": {},
    }


def test_further_params_have_the_schema_of_their_type() -> None:
    def function(context: Context, **counts: int) -> None: ...

    assert schema_of(function)["params"] == {
        "type": "object",
        "properties": {},
        "additionalProperties": {"type": "integer"},
    }


def test_classes_are_definitions_that_all_schemas_of_a_method_share() -> None:
    def function(order: Order, color: Color = Color.RED) -> list[Order]: ...  # type: ignore[empty-body]

    schema = schema_of(function)
    reference = {"$ref": "#/$defs/Order"}
    assert schema["params"]["properties"] == {
        "order": reference,
        "color": {"$ref": "#/$defs/Color", "default": "red"},
    }
    assert schema["result"] == {"type": "array", "items": reference}
    assert schema["$defs"]["Color"] == {"enum": ["red"], "title": "Color", "type": "string"}
    assert schema["$defs"]["Order"] == {
        "title": "Order",
        "type": "object",
        "properties": {
            "item": {"type": "string"},
            "count": {"type": "integer", "default": 1},
            "parts": {"anyOf": [{"type": "array", "items": reference}, {"type": "null"}], "default": None},
        },
        "required": ["item"],
    }


@dataclass
class Event:
    at: At
    next: Event | None = None


class At(BaseModel):
    seconds: float

    @field_serializer("seconds")
    def as_text(self, seconds: float) -> str:
        return str(seconds)


def test_class_that_differs_by_direction_has_two_definitions() -> None:
    def function(event: Event) -> Event: ...  # type: ignore[empty-body]

    schema = schema_of(function)
    assert sorted(schema["$defs"]) == ["At-Input", "At-Output", "Event-Input", "Event-Output"]
    assert schema["result"] == {"$ref": "#/$defs/Event-Output"}


def test_items_of_both_directions_have_a_schema() -> None:
    async def function(items: Items[Order]) -> AsyncIterator[Decimal]:
        yield Decimal(1)

    schema = schema_of(function)
    assert schema["takes"] == {"$ref": "#/$defs/Order"}
    assert schema["sends"] == {"type": "string", "format": "decimal"}
    assert schema["result"] == {}


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (datetime.datetime, {"type": "string", "format": "date-time"}),
        (set[int], {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Literal["a", 1], {"enum": ["a", 1]}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    ],
)
def test_other_types_have_the_schema_of_their_form_on_the_wire(annotation: Any, expected: Any) -> None:
    def function(value): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"value": annotation}
    assert schema_of(function)["params"]["properties"]["value"] == expected


def test_definitions_with_one_name_are_kept_apart() -> None:
    def local() -> type:
        @dataclass
        class Order:
            number: int

        return Order

    def function(a, b): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"a": Order, "b": local()}
    assert len(schema_of(function)["$defs"]) == 2
