"""Exceptions in the log: what a developer needs, within bounds, and no secret in any form."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from tests.secrets_watch import SecretWatch
from zcproto.auth import PairingFile
from zcproto.common.exceptions import (
    MAX_EXCEPTIONS,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_MESSAGE_LINES,
    MAX_NOTES,
    MAX_TRACEBACK,
    masked,
    summary,
    traceback_lines,
)
from zcproto.common.secret import SecretBytes, SecretText
from zcproto.observe.values import places
from zcproto.sessions.token import token_from_text, token_text


def caught(function: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - any
        function()
    return raised.value


def price() -> None:
    {}["tea"]


def wrapped() -> None:
    try:
        price()
    except KeyError as error:
        raise RuntimeError("no price for the order") from error


def while_handling() -> None:
    try:
        price()
    except KeyError:
        raise ValueError("another")  # noqa: B904 - without a cause


def suppressed() -> None:
    try:
        price()
    except KeyError:
        raise ValueError("alone") from None


async def test_lines_are_those_of_python_for_a_chain() -> None:
    for function in (price, wrapped, while_handling, suppressed):
        error = caught(function)
        expected = [
            line
            for text in traceback.format_exception(error)
            for line in text.splitlines()
            if line.strip() and not set(line.strip()) <= set("~^")
        ]
        assert traceback_lines(error) == expected


def test_members_of_a_group_are_shown_with_their_causes() -> None:
    group = ExceptionGroup(
        "two faults", [caught(wrapped), ExceptionGroup("inner", [OSError(2, "No such file")])]
    )
    lines = traceback_lines(group)
    assert lines[0] == "ExceptionGroup: two faults (2 sub-exceptions)"
    assert lines[1] == "Exception 1 of 2 in the group:"
    assert "  KeyError: 'tea'" in lines
    assert "  RuntimeError: no price for the order" in lines
    assert lines[-2:] == ["  Exception 1 of 1 in the group:", "    FileNotFoundError: [Errno 2] No such file"]


def test_notes_and_several_lines_of_a_message_are_shown() -> None:
    error = ValueError("first\nsecond")
    error.add_note("while loading the menu")
    assert traceback_lines(error) == ["ValueError: first", "second", "while loading the menu"]
    assert summary(error) == "ValueError: first"


def test_place_of_a_syntax_error_is_shown() -> None:
    error = caught(lambda: compile("a = 1\ndef (:\n", "shop.py", "exec"))
    assert traceback_lines(error)[-3:] == [
        '  File "shop.py", line 2',
        "    def (:",
        "SyntaxError: invalid syntax (shop.py, line 2)",
    ]


def test_frames_of_the_package_are_shown_if_there_are_no_others() -> None:
    error = caught(lambda: token_from_text(["A"] * 43))  # type: ignore[arg-type]
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_next is not None
    within = error.with_traceback(error.__traceback__.tb_next.tb_next)
    assert [line.rpartition(" ")[2] for line in traceback_lines(within)[1:4:2]] == [
        "token_from_text",
        "_bytes",
    ]


def test_exception_without_message_is_its_type() -> None:
    assert traceback_lines(KeyError()) == ["KeyError"]


def test_exception_whose_message_fails_is_shown() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert summary(Broken()) == "Broken: (its message cannot be read)"


def test_frames_alone_have_no_message() -> None:
    lines = places(caught(lambda: int("hunter2")))
    assert "hunter2" not in str(lines)
    assert str(lines[-1]).startswith("common/test_exceptions.py:")


# --- bounds ----------------------------------------------------------------------------------------------


def test_circle_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert [line for line in traceback_lines(first) if line.startswith("ValueError")] == [
        "ValueError: second",
        "ValueError: first",
    ]


def test_number_of_exceptions_is_limited() -> None:
    error: Exception = ValueError("0")
    for number in range(1, 1000):
        outer = ValueError(str(number))
        outer.__cause__ = error
        error = outer
    group = ExceptionGroup("many", [ValueError() for _ in range(1000)])
    for each in (error, group):
        assert sum("ValueError" in line for line in traceback_lines(each)) <= MAX_EXCEPTIONS
    nested: Exception = ValueError()
    for _ in range(1000):
        nested = ExceptionGroup("nested", [nested])
    assert len(traceback_lines(nested)) == 2 * MAX_EXCEPTIONS - 1


def test_frames_of_a_recursion_are_limited() -> None:
    def again() -> None:
        again()

    error = caught(again)
    assert len(places(error)) == MAX_FRAMES
    assert sum(line.startswith("  File") for line in traceback_lines(error)) == MAX_FRAMES


@pytest.mark.parametrize("character", ["x ", "\u00fc ", "\U0001f600", '"', "\\"])
def test_traceback_is_limited_as_json(character: str) -> None:
    def again(depth: int) -> None:
        if depth:
            try:
                again(depth - 1)
            except ValueError as error:
                raise ValueError(character * 100_000) from error
        raise ValueError(character * 100_000)

    error = caught(lambda: again(MAX_EXCEPTIONS))
    error.add_note(character * 100_000)
    lines = traceback_lines(error)
    assert len(json.dumps(lines)) < MAX_TRACEBACK + 100
    assert all(len(line) <= MAX_MESSAGE + 20 for line in lines)
    assert lines[-1].endswith("...")


def test_notes_and_lines_of_a_message_are_limited() -> None:
    error = ValueError("\n".join(["first", *"abcdefghijklmnopqrst"]))
    for number in range(10):
        error.add_note(f"note {number}")
    lines = traceback_lines(error)
    assert lines[-5:] == ["o", "note 0", "note 1", "note 2", "note 3"]
    assert len(lines) == MAX_MESSAGE_LINES + MAX_NOTES


def test_end_and_first_cause_of_a_long_traceback_are_kept() -> None:
    error: Exception = KeyError("the cause")
    for number in range(MAX_EXCEPTIONS - 1):
        outer = ValueError(f"number {number} " + "tea " * 500)
        outer.__cause__ = error
        outer.add_note("note " * 200)
        error = outer
    lines = traceback_lines(error)
    assert lines[0] == "KeyError: 'the cause'"
    assert lines[-2].startswith("ValueError: number 6")
    (left_out,) = [line for line in lines if line.endswith("lines are left out)")]
    assert 4_800 < len(json.dumps(lines[lines.index(left_out) :])) < 6_100
    assert 2_800 < len(json.dumps(lines[: lines.index(left_out)])) < 4_100


def test_values_of_variables_are_not_shown() -> None:
    def parse(text: str) -> None:
        secret = text.upper()
        raise ValueError(len(secret))

    word = "hunter"
    error = caught(lambda: parse(f"{word}2"))
    assert "hunter2" not in str(traceback_lines(error)).lower()


# --- secrets ---------------------------------------------------------------------------------------------

SECRET_FORMS: dict[str, Callable[[bytes], str]] = {
    "a token": token_text,
    "base64": lambda raw: base64.b64encode(raw).decode(),
    "base64url": lambda raw: base64.urlsafe_b64encode(raw).decode(),
    "hex": bytes.hex,
    "upper hex": lambda raw: raw.hex().upper(),
    "hex in pairs": lambda raw: raw.hex(":"),
    "hex with spaces": lambda raw: raw.hex(" "),
    "bytes": repr,
    "a bytearray": lambda raw: repr(bytearray(raw)),
    "numbers": lambda raw: str(list(raw)),
    "a tuple": lambda raw: str(tuple(raw)),
    "PEM": lambda raw: (
        Ed25519PrivateKey.from_private_bytes(raw)
        .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        .decode()
    ),
    "secret bytes": lambda raw: f"{SecretBytes(raw)} {SecretBytes(raw)!r}",
    "secret text": lambda raw: f"{SecretText(token_text(raw))} {[SecretText(token_text(raw))]}",
}

CONTEXTS = [
    "{}",
    "no session for {}",
    "'{}' is unknown",
    "https://host/reset/{}",
    "https://host/reset?t={}&x=1",
    "({})",
    "key:{}",
    "a\n{}\nb",
    "x" * 200 + " {}",
    "x" * 4080 + " {} y",
    "{} " * 40,
    "/home/ada/{}.txt",
]


def shown(message: str) -> str:
    """Return all that the log shows of exceptions with this message."""

    def fail() -> None:
        error = ValueError(message)
        error.add_note(message)
        raise KeyError(message) from error

    error = caught(fail)
    return "\n".join([*traceback_lines(error), summary(error), summary(ValueError(message))])


@pytest.mark.parametrize("form", SECRET_FORMS)
@given(st.binary(min_size=32, max_size=32).filter(lambda raw: len(set(raw)) > 16), st.sampled_from(CONTEXTS))
def test_no_secret_of_the_product_is_in_a_traceback(form: str, raw: bytes, context: str) -> None:
    watch = SecretWatch()
    watch.add_secret(raw)
    watch.add_output("a traceback", shown(context.replace("{}", SECRET_FORMS[form](raw))))
    assert watch.search() == []


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "text",
    [
        "valkeys://default:hunter2@db.example:6379",
        "password=hunter2",
        "{'client_secret': 'hunter2', 'n': 1}",
        '{"api_key": "hunter2"}',
        "Authorization: Bearer hunter2",
        "Cookie: session=hunter2",
        "User(password='hunter2')",
    ],
)
def test_password_behind_its_name_is_masked(text: str, context: str) -> None:
    assert "hunter2" not in shown(context.replace("{}", text))


def test_pairing_code_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.auth.pairing._COST", 2)  # of scrypt
    for number in range(50):
        code = PairingFile(tmp_path / "pairing.toml").make("ada", 1000, 2000 * number).reveal()
        assert code not in summary(ValueError(f"the code {code} is not known"))


@pytest.mark.parametrize(
    "text",
    [
        "division by zero",
        "order 1234567890 of 2026-11-27 not found",
        "550e8400-e29b-41d4-a716-446655440000 is unknown",
        "[Errno 2] No such file or directory: '/home/ada/projects/shop/menus/of/the/whole/year/tea_2026.json'",
        "'NoneType' object has no attribute 'price'",
        "test_method_of_the_whole_application_with_a_long_name is missing",
        "unknown key 'tea'; use one of 'cups', 'pots'",
        "invalid literal for int() with base 10: 'twelve'",
        "sha256/4x9BIsBbfQma+lweC2Yn2JFMPnKl8BiLbdQql8OxDl8= is not the pin",
        "connection to 192.0.2.7:7443 from fe80::1 refused",
        "expected [1, 2, 3, 4, 5], got (6, 7)",
        "b'GET' is not a method",
        "naïve café 漢字",
        "read-only file system; the time-zone is well-made",
    ],
)
def test_usual_messages_are_shown_as_they_are(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    "line",
    [
        "rows = sorted(rows, key=by_price)",
        "token = request.token",
        "if kind == b'GET' and password is None:",
        "with open(path, mode='b') as file, open(other) as second:",
        "return self.connections[session_id].send_event(name, data)",
    ],
)
def test_usual_source_is_shown_as_it_is(line: str) -> None:
    assert masked(line, is_source=True) == line


@pytest.mark.parametrize(
    "line",
    ["API_KEY = 'hunter2'", 'connect(password="hunter2")', 'headers = {"Authorization": "Basic hunter2"}'],
)
def test_secret_literals_of_the_source_are_masked(line: str) -> None:
    assert "hunter2" not in masked(line, is_source=True)


@pytest.mark.parametrize("text", ["\x00\x01binary", "caf\udce9", "'\\x8f\\x02'"])
def test_message_that_is_not_text_is_masked(text: str) -> None:
    assert masked(text) == f"({len(text)} characters that are not text)"


@given(st.text() | st.text("ab/=:'\"\\-_+.@0123456789ABCDEF xb", max_size=3000))
def test_masking_never_fails(text: str) -> None:
    masked(text)
    masked(text, is_source=True)
