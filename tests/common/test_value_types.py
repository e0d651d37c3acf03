"""Tests of the types of parameters, results and items; no message repeats a value."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import typing
import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    TypeVar,
    Union,
)

import pytest
from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from zcproto.common.faults import shown_name
from zcproto.common.value_types import ValueType, describe
from zcproto.errors import FailedPrecondition, InvalidArgument
from zcproto.wire.message import decode_body, encode_body

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
    return ValueType(annotation).check(value, "p")


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
    assert complaint(dict[str, int], {"a": 1, "b": SECRET}) == "p.b must be an int"


def test_map_key_is_quoted_only_if_identifier() -> None:
    assert complaint(dict[str, int], {SECRET: "x"}) == "p.(not an identifier) must be an int"
    assert complaint(dict[str, int], {"\x1b[31m": "x"}) == "p.(not an identifier) must be an int"


def test_long_name_is_truncated_in_message() -> None:
    assert shown_name("a" * 500) == "a" * 64
    assert shown_name("") == "(not an identifier)"


# --- unions and literals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("annotation", [int | None, Optional[int], Union[int, None]])  # noqa: UP007, UP045
def test_optional_is_accepted_in_every_spelling(annotation: Any) -> None:
    assert accepted(annotation, None) is None
    assert accepted(annotation, 4) == 4
    assert complaint(annotation, SECRET) == "p must be an int"


def test_union_uses_best_matching_member() -> None:
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
    assert complaint(annotation, SECRET) == "p must be 'red', 'green' or 1"
    assert type(accepted(annotation, True)) is int, "True == 1, but the method gets the literal"


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
    assert complaint(Point, {"x": 1, "z": SECRET}) == "p.z is unknown"
    assert complaint(Point, {"x": 1, SECRET: 1}) == "p.(not an identifier) is unknown"
    assert complaint(Nothing, {"a": 1}) == "p.a is unknown"


def test_every_fault_is_named() -> None:
    many = dataclasses.make_dataclass("Many", [(name, int) for name in "qwertz"])
    with pytest.raises(InvalidArgument) as raised:
        accepted(many, {"q": 1, "w": SECRET, "x": 1})
    assert raised.value.message == (
        "p.w must be an int; p.e is missing; p.r is missing; p.t is missing; and more"
    )
    assert raised.value.details["faults"][0] == {"path": "p.w", "problem": "must be an int"}
    assert [each["path"] for each in raised.value.details["faults"]] == [
        "p.w",
        "p.e",
        "p.r",
        "p.t",
        "p.z",
        "p.x",
    ]


def test_field_outside_constructor_is_unknown() -> None:
    assert complaint(Line, {"start": {"x": 1}, "length": 1.0}) == "p.length is unknown"


def test_recursive_dataclass_is_checked() -> None:
    tree = accepted(Tree, {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]})
    assert tree == Tree(1, [Tree(2, [Tree(3)])])
    assert (
        complaint(Tree, {"value": 1, "children": [{"value": SECRET}]}) == "p.children[0].value must be an int"
    )


def test_mutually_recursive_dataclasses_are_checked() -> None:
    assert accepted(Left, {"right": {"left": {}}}) == Left(Right(Left()))
    assert complaint(Right, {"left": {"right": {"left": 3}}}) == "p.left.right.left must be a map"


def test_value_error_of_dataclass_is_the_problem() -> None:
    assert accepted(Even, {"number": 2}) == Even(2)
    assert complaint(Even, {"number": 3}) == "p is not acceptable: 3 is odd"


def test_call_error_of_dataclass_is_the_answer() -> None:
    with pytest.raises(FailedPrecondition) as raised:
        accepted(Open, {"door": "closed"})
    assert raised.value.message == "open the door first"


# --- types of the standard library and of pydantic --------------------------------------------------------


class Color(Enum):
    RED = "red"
    GREEN = "green"


class Level(IntEnum):
    LOW = 1


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Pair(NamedTuple):
    x: int
    y: int


class Account(BaseModel):
    owner: str
    limit: int = 0
    tags: list[str] = []


@pydantic_dataclass
class Checked:
    n: int


T = TypeVar("T")


@dataclass
class Page(Generic[T]):
    items: list[T]


@dataclass
class Cat:
    kind: Literal["cat"]
    lives: int


@dataclass
class Dog:
    kind: Literal["dog"]
    name: str


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]

NOON = datetime.datetime(2026, 1, 2, 12, 0, tzinfo=datetime.UTC)
ID = uuid.UUID("12345678123456781234567812345678")


@pytest.mark.parametrize(
    ("annotation", "sent", "value"),
    [
        (datetime.datetime, "2026-01-02T12:00:00Z", NOON),
        (datetime.date, "2026-01-02", NOON.date()),
        (datetime.time, "12:00:00", NOON.time()),
        (datetime.timedelta, "PT1M30S", datetime.timedelta(seconds=90)),
        (uuid.UUID, "12345678-1234-5678-1234-567812345678", ID),
        (Decimal, "1.50", Decimal("1.50")),
        (Color, "red", Color.RED),
        (Level, 1, Level.LOW),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[float, ...], [1.0, 2.5], (1.0, 2.5)),
        (set[int], [1], {1}),
        (frozenset[str], ["a"], frozenset({"a"})),
        (Movie, {"title": "M"}, {"title": "M"}),
        (Pair, [1, 2], Pair(1, 2)),
        (Account, {"owner": "ada", "limit": 5, "tags": []}, Account(owner="ada", limit=5)),
        (Checked, {"n": 1}, Checked(1)),
        (Page[Point], {"items": [{"x": 1, "y": 2}]}, Page([Point(1, 2)])),
        (list[Pet], [{"kind": "cat", "lives": 9}], [Cat("cat", 9)]),
        (dict[Color, int], {"red": 1}, {Color.RED: 1}),
        (dict[str, datetime.date], {"a": "2026-01-02"}, {"a": NOON.date()}),
        (NewType("UserId", int), 7, 7),
        (Annotated[int, Field(ge=1)], 7, 7),
        (Tree, {"value": 1, "children": [], "parent": None}, Tree(1)),
        (int | datetime.date, "2026-01-02", NOON.date()),
        (Path, "a/b", Path("a/b")),
    ],
)
def test_value_is_received_and_sent(annotation: Any, sent: Any, value: Any) -> None:
    kind = ValueType(annotation)
    received = kind.check(sent, "p")
    assert received == value
    assert type(received) is type(value)
    body = encode_body(value if kind.dump is None else kind.dump(value))
    assert decode_body(body) == sent
    assert decode_body(encode_body(value)) == sent, "also without the annotation"


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (datetime.datetime, SECRET, "p must be a valid datetime or date, invalid character in year"),
        (Color, SECRET, "p must be 'red' or 'green'"),
        (Movie, {"year": 1}, "p.title is missing"),
        (Movie, {"title": "M", "seen": 1}, "p.seen is unknown"),
        (tuple[int, str], [1], "p[1] is missing"),
        (tuple[int, ...], [1, SECRET], "p[1] must be an int"),
        (set[int], SECRET, "p must be a list"),
        (Annotated[int, Field(gt=0)], -1, "p must be greater than 0"),
        (Annotated[str, Field(min_length=3)], "a", "p must have at least 3 characters"),
        (
            Annotated[list[int], Field(max_length=1)],
            [1, 2],
            "p must have at most 1 item after validation, not 2",
        ),
        (list[Annotated[int, Field(ge=0)]], [-1], "p[0] must be greater than or equal to 0"),
        (int | str, [SECRET], "p must be an int or a str"),
        (int | Point, {"x": SECRET}, "p.x must be an int"),
        (dict[str, int | Point], {"a": {"x": SECRET}}, "p.a.x must be an int"),
        (Pet, {"kind": SECRET}, "p has an unknown tag"),
        (Pet, {}, "p has no tag"),
        (Pet, {"kind": "cat"}, "p.lives is missing"),
        (list[Pet], [{"kind": "dog", "name": 7}], "p[0].name must be a str"),
        (list[Movie], [{}], "p[0].title is missing"),
        (
            Account,
            {"owner": "ada", "limit": "x"},
            "p.limit must be a valid integer, unable to parse string as an integer",
        ),
        (Account, {"owner": "ada", "tags": [1]}, "p.tags[0] must be a str"),
        (dict[Color, int], {SECRET: 1}, "p.(not an identifier) must be 'red' or 'green'"),
        (uuid.UUID, 5, "p must be a string, bytes or UUID object"),
    ],
)
def test_wrong_value_is_refused_by_path(annotation: Any, value: Any, expected: str) -> None:
    assert complaint(annotation, value) == expected


def test_msgpack_types_are_not_converted_inside_others() -> None:
    for annotation, value in (
        (list[int], ["1"]),
        (list[str], [b"a"]),
        (list[bytes], ["a"]),
        (list[bool], [1]),
        (dict[str, float], {"a": "1"}),
        (Point, {"x": "1"}),
        (Movie, {"title": "M", "year": "1"}),
        (tuple[int, ...], ["1"]),
    ):
        assert " must be " in complaint(annotation, value)


def test_model_applies_its_own_configuration() -> None:
    assert accepted(Account, {"owner": "ada", "limit": "5", "more": 1}) == Account(owner="ada", limit=5)
    assert accepted(Checked, {"n": "5"}) == Checked(5)


def test_container_reports_its_first_wrong_item() -> None:
    for annotation, value in ((list[int], ["x"] * 9), (dict[str, int], dict.fromkeys("abcdefgh", "x"))):
        assert complaint(annotation, value).count("must be") == 1


def test_path_of_a_fault_is_bounded() -> None:
    nested: Any = SECRET
    annotation: Any = int
    for _ in range(20):
        nested, annotation = {"a" * 60: nested}, dict[str, annotation]
    assert len(complaint(annotation, nested)) < 300


@pytest.mark.parametrize("annotation", [Point, Movie, Account, list[Account]])
def test_faults_are_bounded(annotation: Any) -> None:
    many = {f"k{number}": 1 for number in range(60_000)}
    assert complaint(annotation, [many] if annotation == list[Account] else many).endswith(
        " has more than 1000 fields, or than 20000 values"
    )


# --- results ---------------------------------------------------------------------------------------------


def test_msgpack_result_is_sent_as_it_is() -> None:
    for annotation in (int, Any, None, list[dict[str, int | None]], Literal["a", 1], dict, list):
        assert ValueType(annotation).dump is None


def test_result_is_not_checked() -> None:
    dump = ValueType(list[Point]).dump
    assert dump is not None
    assert dump([Point(1), {"x": 2}]) == [{"x": 1, "y": 0}, {"x": 2}]


def test_result_has_the_fields_of_its_annotation_only() -> None:
    @dataclass
    class Secretive(Point):
        password: str = SECRET

    dump = ValueType(Point).dump
    assert dump is not None
    assert dump(Secretive(1)) == {"x": 1, "y": 0}


# --- what cannot be used is refused when it is registered -------------------------------------------------


class Foreign:
    pass


@dataclass
class Deep:
    inner: list[Foreign]


class Model(BaseModel):
    by_number: dict[int, str]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Foreign, "Foreign cannot be used (Unable to generate pydantic-core schema for <class"),
        (list[Foreign], "Foreign"),
        (Deep, "Foreign"),
        (dict[int, str], "the keys of a dict must be str"),
        (typing.Dict[bytes, int], "the keys of a dict must be str"),  # noqa: UP006
        (dict[str | None, int], "the keys of a dict must be str"),
        (dict[Level, int], "the keys of a dict must be str"),
        (Model, "the keys of a dict must be str"),
        (complex, "no value of kind 'complex' can be sent"),
        (typing.Callable[[], int], "no value of kind 'callable' can be sent"),
        (type[int], "no value of kind"),
        (typing.Iterable[int], "no value of kind 'generator' can be sent"),
        (Point(1), "cannot be used"),
        ("Unknown", "cannot be used"),
    ],
)
def test_unusable_annotation_is_refused_with_what_is_allowed(annotation: Any, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(TypeError) as raised:
            ValueType(annotation)
        assert reason in str(raised.value)
        assert "; allowed are int, float, str, bytes," in str(raised.value)


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
