from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.config.duration import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("500ms", 0.5),
        ("10s", 10),
        ("5m", 300),
        ("24h", 86_400),
        ("30d", 2_592_000),
        ("1h30m", 5_400),
        ("1d2h3m4s5ms", 93_784.005),
        ("0.5s", 0.5),
        ("1.5h", 5_400),
        ("0.1s", 0.1),
        ("90m", 5_400),
    ],
)
def test_text_with_units_is_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "5", "s", "5 s", " 5s", "5s ", "5s\n", "-5s", "+5s", "1e3s", ".5s", "5.s", "5S", "5w", "5sec", "30m1h",
     "1s1s", "1m1m", "1ms1s", "9999999999999s", "inf", "nans", "off", "\u0665s"],
)  # fmt: skip
def test_anything_else_is_no_duration(text: str) -> None:
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (1.5, "1500ms"),
        (86_400, "24h"),
        (172_800, "2d"),
        (129_600, "36h"),
        (5_400, "90m"),
    ],
)
def test_a_duration_is_written_in_one_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 365 * 86_400_000))
def test_what_is_written_is_read_as_the_same(ms: int) -> None:
    assert parse_duration(format_duration(ms / 1000)) == ms / 1000
