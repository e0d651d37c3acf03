"""The JSON Schema of methods describes what callers send and receive, for every type."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, field_serializer
from typing_extensions import TypedDict

from zcproto.app.app import Context, Items, Method
from zcproto.common.parameters import Ended


class Color(Enum):
    RED = "red"


INT_OR_STR = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


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


@dataclass
class Box:
    item: str
    parts: list[Box] | None


def test_classes_are_definitions_that_all_schemas_of_a_method_share() -> None:
    def function(box: Box, color: Color = Color.RED) -> list[Box]: ...  # type: ignore[empty-body]

    schema = schema_of(function)
    reference = {"$ref": "#/$defs/Box"}
    assert schema["params"]["properties"] == {
        "box": reference,
        "color": {"$ref": "#/$defs/Color", "default": "red"},
    }
    assert schema["result"] == {"type": "array", "items": reference}
    assert schema["$defs"]["Color"] == {"enum": ["red"], "title": "Color", "type": "string"}
    assert schema["$defs"]["Box"] == {
        "title": "Box",
        "type": "object",
        "properties": {
            "item": {"type": "string"},
            "parts": {"anyOf": [{"type": "array", "items": reference}, {"type": "null"}]},
        },
        "required": ["item", "parts"],
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
    assert sorted(schema["$defs"]) == ["At", "At-Input", "Event", "Event-Input"]
    assert schema["result"] == {"$ref": "#/$defs/Event"}


def test_items_of_both_directions_have_a_schema() -> None:
    async def function(items: Items[Order]) -> AsyncIterator[Decimal | Ended[Order]]:
        yield Decimal(1)

    schema = schema_of(function)
    assert schema["takes"] == {"$ref": "#/$defs/Order-Input"}
    assert schema["sends"] == {"type": "string", "format": "decimal"}
    assert schema["result"] == {"$ref": "#/$defs/Order"}


@pytest.mark.parametrize(
    ("items", "sends", "result"),
    [
        (int, {"type": "integer"}, {"type": "null"}),
        (Ended[int], {}, {"type": "integer"}),
        (str | None | Ended[int] | Ended[str], {"anyOf": [{"type": "string"}, {"type": "null"}]}, INT_OR_STR),
        (Ended, {}, {}),
        (Any, {}, {}),
    ],
)
def test_result_of_a_stream_has_the_type_of_its_end(items: Any, sends: Any, result: Any) -> None:
    async def function():  # type: ignore[no-untyped-def]
        yield

    function.__annotations__["return"] = AsyncIterator[items]
    schema = schema_of(function)
    assert (schema["sends"], schema["result"]) == (sends, result)


@dataclass
class Note:
    text: str
    tags: list[str] = field(default_factory=list)


class Mark(TypedDict, total=False):
    name: str


def test_default_is_optional_in_params_and_present_in_results() -> None:
    def function(note: Note, mark: Mark) -> tuple[Note, Mark]: ...

    schema = schema_of(function)
    assert schema["result"]["prefixItems"] == [{"$ref": "#/$defs/Note"}, {"$ref": "#/$defs/Mark"}]
    assert schema["params"]["properties"]["note"] == {"$ref": "#/$defs/Note-Input"}
    definitions = schema["$defs"]
    assert definitions["Note"]["required"] == ["text", "tags"]
    assert definitions["Note-Input"]["required"] == ["text"]
    assert "required" not in definitions["Mark"]


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
