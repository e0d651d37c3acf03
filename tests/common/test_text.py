from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.common.text import counted, escape_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain text", "plain text"),
        ("Grüße", "Grüße"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x7f\x85", "\\x7f\\x85"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_text(text) == shown


def test_text_is_truncated_before_escaping() -> None:
    assert escape_text("x" * 11, 10) == "xxxxxxx..."
    assert escape_text("x" * 10, 10) == "x" * 10


@given(st.text())
def test_any_text_becomes_one_printable_line(text: str) -> None:
    shown = escape_text(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 sessions"), (1, "1 session"), (2, "2 sessions"), (12_345, "12,345 sessions")]
)
def test_number_agrees_with_its_noun(count: int, text: str) -> None:
    assert counted(count, "session") == text
