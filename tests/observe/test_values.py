from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.common.secret import Secret, SecretBytes, SecretText
from zcproto.errors import Code, ConfigError, ConnectionClosed
from zcproto.observe.values import MAX_DEPTH, MAX_ITEMS, cut, loggable


class Colour(enum.Enum):
    RED = 1


class Opaque:
    def __repr__(self) -> str:
        return "hunter2"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (-(2**64) + 1, -(2**64) + 1),
        (2**64, "(a huge number)"),
        (10**5000, "(a huge number)"),
        (1.5, 1.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("text", "text"),
        ("x" * 256, "x" * 256),
        ("x" * 257, "x" * 253 + "..."),
        ("Grüße", "Grüße"),
        ("\ud800", "\\ud800"),
        (b"hunter2", "(7 bytes)"),
        (bytearray(3), "(3 bytes)"),
        (memoryview(b"12"), "(2 bytes)"),
        (Secret("hunter2"), "(hidden)"),
        (Code.REPLAYED, "REPLAYED"),
        (Colour.RED, "RED"),
        (Path("/a/b"), "/a/b"),
        (ConnectionClosed("idle"), "ConnectionClosed: idle"),
        (FileNotFoundError(2, "No such file", "/a"), "FileNotFoundError: No such file"),
        (OSError("hunter2"), "OSError"),
        (ValueError("hunter2"), "ValueError"),
        (Opaque(), "(Opaque)"),
        ([1, b"12", Secret("hunter2"), [Opaque()]], [1, "(2 bytes)", "(hidden)", ["(Opaque)"]]),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (frozenset({3}), [3]),
        ({"a": 1, "token": "hunter2"}, {"a": 1, "token": "(hidden)"}),
        ({b"hunter2": 1, 5: 2}, {"(7 bytes)": 1, "5": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_is_converted_without_secrets(value: object, written: object) -> None:
    result = loggable("value", value)
    assert result == written
    assert type(result) is type(written)


@pytest.mark.parametrize(
    "name",
    ["token", "key", "api_key", "refresh_token", "password", "passphrase", "client_secret", "Authorization"],
)
def test_value_with_secret_name_is_masked(name: str) -> None:
    assert loggable(name, "hunter2") == "(hidden)"
    assert loggable("value", {name: "hunter2"}) == {name: "(hidden)"}
    assert loggable("value", [{name: ["hunter2"]}]) == [{name: "(hidden)"}]


@pytest.mark.parametrize("name", ["keys", "tokens_live", "keyword", "monkey"])
def test_similar_name_is_not_masked(name: str) -> None:
    assert loggable(name, 3) == 3


def test_lists_and_maps_are_limited_in_length() -> None:
    assert loggable("value", list(range(1000))) == list(range(MAX_ITEMS))
    assert loggable("value", dict.fromkeys(map(str, range(1000)), 1)) == dict.fromkeys(
        map(str, range(MAX_ITEMS)), 1
    )


def test_lists_and_maps_are_limited_in_depth() -> None:
    value: Any = []
    for _ in range(10_000):
        value = [value]
    assert json.dumps(loggable("value", value)).count("[") == MAX_DEPTH
    assert loggable("value", [[{"a": 1}]]) == [["(1 items)"]]


def test_recursive_list_is_limited() -> None:
    value: list[Any] = []
    value.append(value)
    assert loggable("value", value) == [["(1 items)"]]


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(Secret, st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.binary(), inner),
)


@given(st.text(), ANY)
def test_any_value_converts_to_json(name: str, value: object) -> None:
    json.dumps(loggable(name, value), allow_nan=False).encode("ascii")


TOKEN_TEXT = "4x9BIsBbfQma-lweC2Yn2JFMPnKl8BiLbdQql8OxDl8"


@pytest.mark.parametrize(
    "value",
    [SecretBytes(b"hunter2"), SecretText("hunter2"), [SecretText("hunter2")], {"a": SecretBytes(b"hunter2")}],
)
def test_secret_types_are_masked(value: object) -> None:
    assert "hidden" in str(loggable("name", value))
    assert "hunter2" not in str(loggable("name", value))
    assert "(7 bytes)" not in str(loggable("name", value))


@pytest.mark.parametrize(
    "form", ["{}", "token={} is bad", "({})", "Bearer {}", "a" * 200 + " {} " + "b" * 200]
)
def test_token_shaped_text_is_masked_anywhere(form: str) -> None:
    for value in (form.format(TOKEN_TEXT), [form.format(TOKEN_TEXT)], ConfigError([form.format(TOKEN_TEXT)])):
        shown = str(loggable("client", value))
        assert "(hidden)" in shown
        assert TOKEN_TEXT[:8] not in shown


@pytest.mark.parametrize(
    "text",
    ["sha256/4x9BIsBbfQma+lweC2Yn2JFMPnKl8BiLbdQql8OxDl8=", TOKEN_TEXT[:-1], TOKEN_TEXT + "A", "e3" * 32],
)
def test_pins_and_long_words_are_not_masked(text: str) -> None:
    assert loggable("pins", [text]) == [text]


def test_part_of_a_token_at_the_cut_is_not_shown() -> None:
    for count in range(1, 40):
        text = "x " * count + f"{TOKEN_TEXT} " * 20
        assert TOKEN_TEXT[:8] not in cut(text)
