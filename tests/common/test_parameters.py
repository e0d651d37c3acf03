"""Tests of the parameter checks; no message repeats a value."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import typing
from dataclasses import InitVar, dataclass, field
from typing import Any, Generic, Literal, NewType, Optional, TypeVar, Union

import pytest

from zcproto.common.parameters import checker_for, describe, quoted
from zcproto.errors import FailedPrecondition, InvalidArgument

SECRET = "hunter2-do-not-echo"


@dataclass
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    start: Point
    end: Point | None = None
    labels: list[str] = field(default_factory=list)
    length: float = field(default=0.0, init=False)


@dataclass
class Tree:
    value: int
    children: list[Tree] = field(default_factory=list)
    parent: Tree | None = None


@dataclass
class Left:
    right: Right | None = None


@dataclass
class Right:
    left: Left | None = None


@dataclass
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError(f"{self.number} is odd")


@dataclass
class Open:
    door: str

    def __post_init__(self) -> None:
        if self.door == "closed":
            raise FailedPrecondition("open the door first")


@dataclass
class Nothing:
    pass


def accepted(annotation: Any, value: Any) -> Any:
    return checker_for(annotation)(value, "p")


def complaint(annotation: Any, value: Any) -> str:
    with pytest.raises(InvalidArgument) as raised:
        accepted(annotation, value)
    assert SECRET not in str(raised.value)
    return raised.value.message


# --- scalars ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 7),
        (int, -(2**63)),
        (int, 2**64 - 1),
        (str, "text"),
        (str, ""),
        (bytes, b"\x00\xff"),
        (bool, True),
        (bool, False),
        (None, None),
        (type(None), None),
        (list, [1, "two", None]),
        (dict, {"a": [1]}),
        (typing.List, [1]),  # noqa: UP006  people still write it
        (typing.Dict, {"a": 1}),  # noqa: UP006
        (Any, object),
        (object, SECRET),
        (float, 1.5),
    ],
)
def test_value_of_annotated_type_is_passed_unchanged(annotation: Any, value: Any) -> None:
    assert accepted(annotation, value) == value
    assert type(accepted(annotation, value)) is type(value)


def test_parameter_without_annotation_accepts_any_value() -> None:
    assert accepted(inspect.Parameter.empty, SECRET) == SECRET


def test_only_int_is_converted_to_float() -> None:
    number = accepted(float, 3)
    assert number == 3.0
    assert type(number) is float
    assert type(accepted(float, 2**64 - 1)) is float


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, SECRET, "p must be an int"),
        (int, 1.0, "p must be an int"),
        (int, True, "p must be an int"),
        (int, None, "p must be an int"),
        (float, SECRET, "p must be a float"),
        (float, True, "p must be a float"),
        (str, 5, "p must be a str"),
        (str, SECRET.encode(), "p must be a str"),
        (bytes, SECRET, "p must be bytes"),
        (bool, 1, "p must be a bool"),
        (bool, SECRET, "p must be a bool"),
        (None, SECRET, "p must be nil"),
        (list, {"a": SECRET}, "p must be a list"),
        (list, SECRET, "p must be a list"),
        (dict, [SECRET], "p must be a map"),
        (list[int], SECRET, "p must be a list"),
        (dict[str, int], SECRET, "p must be a map"),
        (Point, SECRET, "p must be a map"),
        (Point, [SECRET], "p must be a map"),
    ],
)
def test_wrong_type_is_refused_by_parameter_name(annotation: Any, value: Any, expected: str) -> None:
    assert complaint(annotation, value) == expected


# --- containers ------------------------------------------------------------------------------------------


def test_wrong_list_element_is_named_by_index() -> None:
    assert accepted(list[int], [1, 2]) == [1, 2]
    assert complaint(list[int], [1, SECRET]) == "p[1] must be an int"
    assert complaint(list[list[str]], [["a"], ["b", 3]]) == "p[1][1] must be a str"


def test_list_of_int_becomes_list_of_float() -> None:
    assert [type(number) for number in accepted(list[float], [1, 2.5])] == [float, float]


def test_wrong_map_value_is_named_by_key() -> None:
    assert accepted(dict[str, int], {"a": 1}) == {"a": 1}
    assert complaint(dict[str, int], {"a": 1, "b": SECRET}) == "p['b'] must be an int"


def test_map_key_is_quoted_only_if_identifier() -> None:
    assert complaint(dict[str, int], {SECRET: "x"}) == "p[(not an identifier)] must be an int"
    assert complaint(dict[str, int], {"\x1b[31m": "x"}) == "p[(not an identifier)] must be an int"


def test_long_name_is_truncated_in_message() -> None:
    assert quoted("a" * 500) == "'" + "a" * 64 + "'"
    assert quoted("") == "(not an identifier)"


# --- unions and literals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("annotation", [int | None, Optional[int], Union[int, None]])  # noqa: UP007, UP045
def test_optional_is_accepted_in_every_spelling(annotation: Any) -> None:
    assert accepted(annotation, None) is None
    assert accepted(annotation, 4) == 4
    assert complaint(annotation, SECRET) == "p must be int | None"


def test_union_uses_first_matching_member() -> None:
    assert type(accepted(int | float, 3)) is int
    assert accepted(int | str | list[int], [1]) == [1]
    assert accepted(Point | Even, {"number": 4}) == Even(4)


def test_union_reports_fault_inside_container() -> None:
    assert complaint(list[int] | None, [1, SECRET]) == "p[1] must be an int"
    assert complaint(Point | None, {"x": SECRET}) == "p.x must be an int"


def test_literal_matches_value_and_type() -> None:
    annotation = Literal["red", "green", 1]
    assert accepted(annotation, "red") == "red"
    assert accepted(annotation, 1) == 1
    assert complaint(annotation, SECRET) == "p must be Literal['red', 'green', 1]"
    assert complaint(annotation, True).startswith("p must be")  # True == 1
    assert complaint(annotation, 1.0).startswith("p must be")


# --- dataclasses -----------------------------------------------------------------------------------------


def test_map_becomes_dataclass_with_defaults() -> None:
    assert accepted(Point, {"x": 1}) == Point(1, 0)
    assert accepted(Point, {"x": 1, "y": 2}) == Point(1, 2)
    assert accepted(Nothing, {}) == Nothing()


def test_nested_dataclass_is_built() -> None:
    line = accepted(Line, {"start": {"x": 1}, "end": {"x": 2, "y": 3}, "labels": ["a"]})
    assert line == Line(start=Point(1), end=Point(2, 3), labels=["a"])
    assert complaint(Line, {"start": {"x": 1, "y": SECRET}}) == "p.start.y must be an int"
    assert complaint(list[Line], [{"start": {"x": 1}}, {"start": {}}]) == "p[1].start.x is missing"


def test_missing_or_unknown_field_is_named() -> None:
    assert complaint(Point, {}) == "p.x is missing"
    assert complaint(Point, {"x": 1, "z": SECRET}) == "p.'z' is unknown"
    assert complaint(Point, {"x": 1, SECRET: 1}) == "p.(not an identifier) is unknown"
    assert complaint(Nothing, {"a": 1}) == "p.'a' is unknown"


def test_first_missing_field_is_named() -> None:
    many = dataclasses.make_dataclass("Many", [(name, int) for name in "qwertz"])
    assert complaint(many, {"q": 1}) == "p.w is missing"


def test_field_outside_constructor_is_unknown() -> None:
    assert complaint(Line, {"start": {"x": 1}, "length": 1.0}) == "p.'length' is unknown"


def test_recursive_dataclass_is_checked() -> None:
    tree = accepted(Tree, {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]})
    assert tree == Tree(1, [Tree(2, [Tree(3)])])
    assert (
        complaint(Tree, {"value": 1, "children": [{"value": SECRET}]}) == "p.children[0].value must be an int"
    )


def test_mutually_recursive_dataclasses_are_checked() -> None:
    assert accepted(Left, {"right": {"left": {}}}) == Left(Right(Left()))
    assert complaint(Right, {"left": {"right": {"left": 3}}}) == "p.left.right.left must be Left | None"


def test_value_error_of_dataclass_hides_its_message() -> None:
    assert accepted(Even, {"number": 2}) == Even(2)
    assert complaint(Even, {"number": 3}) == "p is not acceptable"


def test_call_error_of_dataclass_is_the_answer() -> None:
    with pytest.raises(FailedPrecondition) as raised:
        accepted(Open, {"door": "closed"})
    assert raised.value.message == "open the door first"


# --- what cannot be checked is refused when it is registered ----------------------------------------------


@dataclass
class WithDate:
    when: datetime.datetime


@dataclass
class Deep:
    inner: list[WithDate]


@dataclass
class WithInitVar:
    x: int
    seed: InitVar[int]


@dataclass(init=False)
class WithOwnConstructor:
    x: int

    def __init__(self, other: int) -> None:
        self.x = other


T = TypeVar("T")


@dataclass
class Page(Generic[T]):
    items: list[T]


@pytest.mark.parametrize(
    "annotation",
    [
        datetime.datetime,
        set[int],
        tuple[int, int],
        dict[int, str],
        typing.Dict[bytes, int],  # noqa: UP006
        complex,
        NewType("UserId", int),
        list[datetime.datetime],
        dict[str, set[int]],
        int | datetime.date,
        WithDate,
        Deep,
        WithInitVar,
        WithOwnConstructor,
        Page[int],
        Point(1),
        "int",
    ],
)
def test_uncheckable_annotation_is_refused(annotation: Any) -> None:
    with pytest.raises(TypeError):
        checker_for(annotation)


def test_uncheckable_dataclass_is_refused_every_time() -> None:
    for _ in range(2):
        with pytest.raises(TypeError):
            checker_for(Deep)


# --- how types are shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "int"),
        (type(None), "None"),
        (None, "None"),
        (list[int], "list[int]"),
        (dict[str, float], "dict[str, float]"),
        (int | None, "int | None"),
        (Optional[str], "str | None"),  # noqa: UP045
        (Literal["a", "b"], "Literal['a', 'b']"),
        (Any, "Any"),
        (Point, "Point"),
    ],
)
def test_type_is_described_as_in_source(annotation: Any, expected: str) -> None:
    assert describe(annotation) == expected


def test_type_description_omits_module() -> None:
    assert describe(list[Point]) == "list[Point]"
    assert describe(dict[str, Point | None]) == "dict[str, Point | None]"
    assert describe(list) == "list"


def test_missing_annotation_is_described_as_any() -> None:
    assert describe(inspect.Parameter.empty) == "Any"
