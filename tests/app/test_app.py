"""Tests of registering methods and binding their arguments."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from zcproto.app import app as app_module
from zcproto.app.app import App, Items, Method, default_app
from zcproto.app.context import Context
from zcproto.app.topics import TopicEvent
from zcproto.common.roles import NO_ROLES, OPERATORS
from zcproto.errors import InvalidArgument
from zcproto.wire.message import METHOD_MAX_LENGTH, decode_body


@dataclass
class Point:
    x: int
    y: int = 0


def bind(function: Callable[..., Any], **params: Any) -> dict[str, Any]:
    return Method("m", function).bind(params)


def complaint(function: Callable[..., Any], **params: Any) -> str:
    with pytest.raises(InvalidArgument) as raised:
        bind(function, **params)
    return raised.value.message


# --- registering -----------------------------------------------------------------------------------------


def test_decorator_registers_and_returns_the_function() -> None:
    app = App()

    @app.method("greet", public=True)
    def greet(name: str) -> str:
        """Say hello."""
        return f"hello {name}"

    @app.method("stop", roles=OPERATORS)
    async def stop() -> None: ...

    assert greet("you") == "hello you"
    assert len(list(app)) == 2
    first, second = app
    assert (first.name, first.public, first.roles, first.doc) == ("greet", True, NO_ROLES, "Say hello.")
    assert (second.name, second.public, second.roles, second.doc) == ("stop", False, OPERATORS, "")
    assert (first.is_async, second.is_async) == (False, True)


@pytest.mark.parametrize("name", ["a", "a.b_c.9", ".", "x" * METHOD_MAX_LENGTH])
def test_valid_method_name_is_accepted(name: str) -> None:
    app = App()
    app.method(name)(lambda: None)
    assert [method.name for method in app] == [name]


@pytest.mark.parametrize(
    "name", ["", "x" * (METHOD_MAX_LENGTH + 1), "Upper", "a-b", "a b", "ä", "a/b", "a\n"]
)
def test_malformed_method_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 128 characters of a-z 0-9 _"):
        App().method(name)(lambda: None)


@pytest.mark.parametrize("name", ["session.open", "session.x", "server.info", "device.enroll", "server."])
def test_reserved_method_name_is_refused(name: str) -> None:
    app = App()
    with pytest.raises(ValueError, match="are reserved for the protocol"):
        app.method(name)(lambda: None)
    with pytest.raises(ValueError, match="are reserved for the protocol"):
        app.add(Method(name, lambda: None))
    assert len(list(app)) == 0


@pytest.mark.parametrize("name", ["sessions.open", "server", "session", "my.session.open"])
def test_similar_to_reserved_name_is_accepted(name: str) -> None:
    app = App()
    app.method(name)(lambda: None)
    assert len(list(app)) == 1


def test_duplicate_method_name_is_refused() -> None:
    app = App()
    app.method("m")(lambda: 1)
    with pytest.raises(ValueError, match="'m' is registered twice"):
        app.method("m")(lambda: 2)
    assert next(iter(app)).function() == 1


def test_public_method_with_roles_is_refused() -> None:
    with pytest.raises(ValueError, match="choose public or roles"):
        App().method("m", public=True, roles=OPERATORS)(lambda: None)


# --- signatures that cannot be served ----------------------------------------------------------------------


def positional_only(a: int, /) -> None: ...
def variadic(*rest: int) -> None: ...
def uncheckable(a: complex) -> None: ...
def unresolvable(a: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def uncheckable_inside(a: list[set[complex]]) -> None: ...
def unsendable() -> complex: ...  # type: ignore[empty-body]


async def unsendable_items() -> AsyncIterator[App]:
    yield App()


async def unreceivable(items: Items[App]) -> None: ...


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (positional_only, "'a' must be passable by name"),
        (variadic, "'rest' must be passable by name"),
        (uncheckable, "method m: parameter 'a': complex cannot be used .*; allowed are int, float"),
        (uncheckable_inside, r"method m: parameter 'a': list\[set\[complex\]\] cannot be used"),
        (unsendable, "method m: the result: complex cannot be used"),
        (unsendable_items, "method m: an item: App cannot be used"),
        (unreceivable, "method m: parameter 'items': App cannot be used"),
        (unresolvable, "cannot be resolved: name 'Missing'"),
        (generator, "must be an async generator"),
    ],
)
def test_unservable_function_is_refused_at_registration(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        App().method("m")(function)


def test_async_generator_is_a_stream() -> None:
    app = App()
    app.method("stream")(async_generator)
    app.method("call")(lambda: 1)
    assert [method.shape for method in app] == ["server", "unary"]
    assert [method.admits_sessions for method in app] == [False, True]


def test_topic_event_may_be_annotated_as_an_item() -> None:
    async def stream() -> AsyncIterator[TopicEvent | Point]:
        yield Point(1)

    method = Method("m", stream)
    assert decode_body(method.encode_item(Point(1))) == {"x": 1, "y": 0}


# --- arguments -------------------------------------------------------------------------------------------


def test_parameters_are_passed_by_name_and_keep_defaults() -> None:
    def function(a: int, b: str = "x", *, c: bool = False) -> None: ...

    assert bind(function, a=1) == {"a": 1}
    assert bind(function, c=True, a=1, b="y") == {"a": 1, "b": "y", "c": True}


def test_missing_unknown_or_wrong_parameter_is_named() -> None:
    def function(b: int, a: int, c: int = 0) -> None: ...

    assert complaint(function, a=1) == "b is missing"
    assert complaint(function, a=1, b=2, d=3) == "d is unknown"
    assert complaint(function, a=1, b="x") == "b must be an int"
    assert complaint(function, a=1, b=2, **{"a secret text": 1}) == "(not an identifier) is unknown"


def test_every_fault_of_a_call_is_named_at_once() -> None:
    def function(b: int, a: int, point: Point, c: int = 0) -> None: ...

    with pytest.raises(InvalidArgument) as raised:
        bind(function, b="x", c=None, d=3, point={"y": "z"})
    assert raised.value.details["faults"] == [
        {"path": "a", "problem": "is missing"},
        {"path": "b", "problem": "must be an int"},
        {"path": "c", "problem": "must be an int"},
        {"path": "d", "problem": "is unknown"},
        {"path": "point.x", "problem": "is missing"},
        {"path": "point.y", "problem": "must be an int"},
    ]
    assert raised.value.message == (
        "a is missing; b must be an int; c must be an int; d is unknown; and more"
    )


def test_number_of_faults_is_bounded() -> None:
    def function() -> None: ...

    with pytest.raises(InvalidArgument) as raised:
        bind(function, **{f"p{number}": 1 for number in range(100)})
    assert len(raised.value.details["faults"]) == 16


@dataclass
class Picky:
    n: int

    def __post_init__(self) -> None:
        raise InvalidArgument("not today", {"day": 1})


def test_error_of_a_validator_is_the_answer() -> None:
    def function(picky: Picky, other: int) -> None: ...

    with pytest.raises(InvalidArgument) as raised:
        bind(function, picky={"n": 1}, other=2)
    assert (raised.value.message, raised.value.details) == ("not today", {"day": 1})


def test_dataclass_and_any_parameters_are_accepted() -> None:
    def function(point: Point, whatever, more: Annotated[int, "an extra"] = 0) -> None: ...  # type: ignore[no-untyped-def]

    assert bind(function, point={"x": 1}, whatever=b"w", more=2) == {
        "point": Point(1),
        "whatever": b"w",
        "more": 2,
    }
    assert complaint(function, point={"x": 1, "y": None}, whatever=0) == "point.y must be an int"


def test_keyword_function_receives_unchecked_params() -> None:
    def function(**params: Any) -> None: ...

    assert Method("m", function).is_unchecked
    assert bind(function, a=1, b=[2]) == {"a": 1, "b": [2]}
    assert bind(function) == {}


def test_methods_without_roles_admit_all_sessions_unless_they_are_streams() -> None:
    def function(a: int, **params: Any) -> Any: ...
    async def with_items(context: Context, items: Items[int]) -> None: ...

    assert Method("m", function).admits_sessions
    assert Method("m", function, public=True).admits_sessions
    assert not Method("m", function, roles=OPERATORS).admits_sessions
    assert not Method("m", with_items).admits_sessions


def test_arguments_of_one_class_are_a_copy_of_the_params() -> None:
    def function(a: int, b: str = "") -> None: ...

    params = {"a": 1, "b": "x"}
    arguments = Method("m", function).bind(params)
    assert arguments == params
    assert arguments is not params


def test_named_parameters_beside_keywords_are_checked() -> None:
    def function(a: int, **rest: Any) -> None: ...

    assert bind(function, a=1, b="x") == {"a": 1, "b": "x"}
    assert complaint(function, a="x", b="x") == "a must be an int"
    assert complaint(function, b="x") == "a is missing"
    assert not Method("m", function).is_unchecked


def test_annotation_of_keywords_checks_each_value() -> None:
    def function(**counts: int) -> None: ...

    assert bind(function, a=1, b=2) == {"a": 1, "b": 2}
    assert complaint(function, a=1, b="x") == "b must be an int"
    assert complaint(function, **{"a secret text": "x"}) == "(not an identifier) must be an int"


def test_caller_cannot_pass_the_context() -> None:
    def checked(context: Context, a: int = 0) -> None: ...
    def open_to_all(ctx: Context, **rest: Any) -> None: ...

    assert Method("m", checked).context_name == "context"
    assert complaint(checked, context=1) == "context is unknown"
    assert complaint(open_to_all, ctx=1) == "ctx is unknown"
    assert bind(open_to_all, a=1) == {"a": 1}
    assert not Method("m", open_to_all).is_unchecked


def test_long_type_is_cut_in_the_list_for_callers() -> None:
    def function(choice): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"choice": Literal[tuple(f"choice {number}" for number in range(100))]}
    (param,) = Method("m", function).signature.params
    assert param["type"].startswith("Literal['choice 0', ")
    assert (len(param["type"]), param["type"][-3:]) == (200, "...")


def test_parameters_are_listed_for_callers() -> None:
    def function(a: int, context: Context, b: list[Point] | None = None, **rest: str) -> None: ...

    assert Method("m", function).signature.params == [
        {"name": "a", "type": "int", "required": True},
        {"name": "b", "type": "list[Point] | None", "required": False},
        {"name": "**rest", "type": "str", "required": False},
    ]


# --- all that can be called --------------------------------------------------------------------------------


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, n: int = 1) -> int:
        self.count += n
        return self.count

    async def add_later(self, n: int) -> int:
        return self.add(n)

    def __call__(self, n: int) -> int:
        return self.add(n)


class AsyncCall:
    async def __call__(self, n: int) -> int:
        return n


def test_bound_method_can_be_registered() -> None:
    counter = Counter()
    method = Method("m", counter.add)
    assert method.function(**method.bind({"n": 2})) == 2
    assert Method("m", counter.add_later).is_async
    assert complaint(counter.add, n="x") == "n must be an int"


def test_callable_object_can_be_registered() -> None:
    assert complaint(Counter(), n="x") == "n must be an int"
    assert not Method("m", Counter()).is_async
    assert Method("m", AsyncCall()).is_async
    assert complaint(AsyncCall(), n="x") == "n must be an int"


def test_partial_can_be_registered() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    async def later(a: int, b: int) -> int:
        return a + b

    plain = Method("m", functools.partial(add, 1))
    assert plain.function(**plain.bind({"b": 2})) == 3
    assert [param["name"] for param in plain.signature.params] == ["b"]
    assert complaint(functools.partial(add, 1), b="x") == "b must be an int"
    assert Method("m", functools.partial(functools.partial(later), b=1)).is_async


def test_decorated_function_keeps_its_parameters() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @logged
    def add(a: int) -> int:
        return a + 1

    method = Method("m", add)
    assert method.function(**method.bind({"a": 1})) == 2
    assert complaint(add, a="x") == "a must be an int"


# --- streams ---------------------------------------------------------------------------------------------


def plain_method() -> int:
    return 1


async def takes(items: Items[int]) -> int:
    return sum([item async for item in items])


async def sends() -> AsyncIterator[int]:
    yield 1


async def takes_and_sends(n: int, items: Items) -> AsyncIterator[int]:  # type: ignore[type-arg]
    async for item in items:
        yield n + item


class Sends:
    async def __call__(self, n: int) -> AsyncIterator[int]:
        yield n


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (plain_method, "unary"),
        (takes, "client"),
        (sends, "server"),
        (Sends(), "server"),
        (takes_and_sends, "both"),
    ],
)
def test_shape_says_which_items_a_method_sends_and_takes(function: Callable[..., Any], shape: str) -> None:
    assert Method("m", function).shape == shape


def test_items_are_no_param_of_the_caller() -> None:
    method = Method("m", takes_and_sends)
    assert [param["name"] for param in method.signature.params] == ["n"]
    assert method.items is not None
    assert method.items[0] == "items"
    assert method.items[1].check("anything", "item 0") == "anything"
    assert complaint(takes_and_sends, n=1, items=[1]) == "items is sent as the items of the stream"


def test_items_are_not_taken_from_further_params() -> None:
    async def collect(items: Items[int], **rest: Any) -> Any:
        return rest

    assert complaint(collect, items=[1]) == "items is sent as the items of the stream"
    assert Method("m", collect).bind({"other": 1}) == {"other": 1}


def test_items_are_checked_against_their_type() -> None:
    items = Method("m", takes).items
    assert items is not None
    with pytest.raises(InvalidArgument, match="item 3 must be an int"):
        items[1].check("x", "item 3")


def test_plain_function_cannot_take_items() -> None:
    def plain(items: Items[int]) -> int:
        return 1

    with pytest.raises(TypeError, match="write async def"):
        Method("m", plain)


def test_method_has_one_source_of_items() -> None:
    async def two(a: Items[int], b: Items[int]) -> int:
        return 1

    with pytest.raises(TypeError, match="one source of items"):
        Method("m", two)


# --- the default application -----------------------------------------------------------------------------


class FakeContext:
    """A context with a clock that only sleeping moves, each time a little less than asked for."""

    def __init__(self) -> None:
        self.time = 100.0
        self.result: Any = None

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += max(seconds - 0.001, 0.0005)


@pytest.mark.parametrize("interval", [0, 0.25])
async def test_repeat_sends_numbered_items_never_early(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = FakeContext()
    monkeypatch.setattr(app_module.asyncio, "sleep", context.sleep)
    (repeat,) = (method for method in default_app() if method.name == "repeat")
    items = repeat.function(context=context, n=7, data=b"x", count=4, interval=interval)
    *found, (ended, _) = [(item, context.time) async for item in items]
    assert [item for item, _ in found] == [{"n": 7 + number, "data": b"x"} for number in range(4)]
    assert [time for _, time in found] == pytest.approx([100 + k * interval for k in range(4)], abs=0.001)
    assert all(time >= 100 + number * interval for number, (_, time) in enumerate(found))
    assert ended.result == {"items": 4}


@pytest.mark.parametrize("interval", [-0.1, 3_600.5, float("nan")])
async def test_repeat_refuses_an_impossible_interval(interval: float) -> None:
    (repeat,) = (method for method in default_app() if method.name == "repeat")
    items = repeat.function(context=FakeContext(), n=7, data=b"x", count=4, interval=interval)
    with pytest.raises(InvalidArgument, match="interval must be from 0 to 3600"):
        await anext(items)
