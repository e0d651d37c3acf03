"""The list of issued client certificates: one form of a line, and bounds."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.certs.support import DAY, NOW
from zcproto.certs.issued import (
    KEEP_EXPIRED,
    MAX_SERIAL_NUMBER,
    REASONS,
    UNKNOWN_NAME,
    Issued,
    current,
    has_room,
    parse_list,
    parse_serial,
    render_list,
)
from zcproto.errors import CertificateError

WHEN = NOW.replace(microsecond=0)
ADA = Issued(0x4D2A9F, "ada", WHEN + 90 * DAY)
BOB = Issued(MAX_SERIAL_NUMBER, "bob.example.com", WHEN, WHEN - DAY, "keyCompromise")
STRAY = Issued(1, UNKNOWN_NAME, WHEN, WHEN, "unspecified")
HEADER = render_list(()).decode()

times = st.datetimes(
    min_value=WHEN.replace(tzinfo=None, year=2000), max_value=WHEN.replace(tzinfo=None, year=2500)
).map(lambda moment: moment.replace(microsecond=0, tzinfo=WHEN.tzinfo))
entries = st.builds(
    lambda number, name, end, revoked: Issued(number, name, end, *(revoked or ())),
    st.integers(1, MAX_SERIAL_NUMBER),
    st.sampled_from(["ada", "b.c-d.example", UNKNOWN_NAME]),
    times,
    st.none() | st.tuples(times, st.sampled_from(REASONS)),
)


def test_list_is_readable_text() -> None:
    assert render_list([ADA, BOB, STRAY]).decode() == (
        "zcproto client certificates: serial, name, end, and if revoked: when and why\n"
        "4D2A9F ada 20260830T123015Z\n"
        f"{'7' + 39 * 'F'} bob.example.com 20260601T123015Z 20260531T123015Z keyCompromise\n"
        "1 ? 20260601T123015Z 20260601T123015Z unspecified\n"
    )


@given(st.lists(entries, unique_by=lambda entry: entry.serial_number))
def test_rendered_list_is_parsed_again(issued: list[Issued]) -> None:
    assert parse_list(render_list(issued), "list") == tuple(issued)


def test_empty_file_is_an_empty_list() -> None:
    assert parse_list(b"", "list") == parse_list(HEADER.encode(), "list") == ()


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"x",
        HEADER[:-1].encode(),
        HEADER[1:].encode(),
        render_list([ADA])[:-1],
        b"\xff" + HEADER.encode(),
    ],
)
def test_truncated_list_is_refused(data: bytes) -> None:
    with pytest.raises(CertificateError, match=r"^client-ca\.issued: is not a complete list"):
        parse_list(data, "client-ca.issued")


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "4D2A9F",
        "4D2A9F ada",
        "4D2A9F  20260830T123015Z",
        " 4D2A9F ada 20260830T123015Z",
        "4D2A9F ada 20260830T123015Z ",
        "4D2A9F ada 20260830T123015Z\r",
        "4D2A9F ada 20260830T123015Z  ",
        "4D2A9F ada 20260830T123015Z 20260830T123015Z",
        "4D2A9F ada 20260830T123015Z 20260830T123015Z keycompromise",
        "4D2A9F ada 20260830T123015Z 20260830T123015Z certificateHold",
        "4D2A9F ada 20260830T123015Z  keyCompromise",
        "4D2A9F ada 20260830T123015Z 20260830T123015Z keyCompromise more",
        "4d2a9f ada 20260830T123015Z",
        "04D2A9F ada 20260830T123015Z",
        "4D:2A:9F ada 20260830T123015Z",
        "0 ada 20260830T123015Z",
        f"8{39 * '0'} ada 20260830T123015Z",
        f"{41 * '1'} ada 20260830T123015Z",
        "4D2A9F Ada 20260830T123015Z",
        "4D2A9F ../ada 20260830T123015Z",
        "4D2A9F ad\u00e4 20260830T123015Z",
        "4D2A9F ada 2026-08-30T12:30:15Z",
        "4D2A9F ada 20260830T123015",
        "4D2A9F ada 20260830T123015+0000",
        "4D2A9F ada 20261330T123015Z",
        "4D2A9F ada 20260830T123015.5Z",
        "4D2A9F ada Z",
        "4D2A9F ada 20260830T123015Z Z keyCompromise",
        "1 ada 20260830T123015Z",  # twice
    ],
)
def test_malformed_line_invalidates_the_list(line: str) -> None:
    good = "1 bob 20260830T123015Z\n"
    with pytest.raises(CertificateError, match=r"^list: line 3 is damaged"):
        parse_list((HEADER + good + line + "\n").encode(), "list")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_refused(noise: bytes) -> None:
    data = HEADER.encode() + noise
    try:
        issued = parse_list(data, "list")
    except CertificateError:
        return
    assert render_list(issued) == data


def test_entry_is_kept_for_a_week_after_expiry() -> None:
    end = BOB.not_after + KEEP_EXPIRED
    assert current([ADA, BOB], end) == (ADA, BOB)
    assert current([ADA, BOB], end + timedelta(seconds=1)) == (ADA,)


def test_list_has_room_to_revoke_every_entry() -> None:
    longest = max(REASONS, key=len)
    issued = [Issued(MAX_SERIAL_NUMBER - number, f"device-{number}", WHEN) for number in range(200)]
    revoked = [Issued(entry.serial_number, entry.name, WHEN, WHEN, longest) for entry in issued]
    limit = len(render_list(revoked))
    assert has_room(issued, limit)
    assert not has_room(issued, limit - 1)
    assert has_room(revoked, limit)


@pytest.mark.parametrize("text", ["4D2A9F", "4d2a9f", "4D:2A:9F", "4d:2a:9f", "0000004D2A9F"])
def test_serial_number_is_accepted_in_openssl_format(text: str) -> None:
    assert parse_serial(text) == 0x4D2A9F


@pytest.mark.parametrize(
    "text",
    ["", ":", "0", "00:00", "-1", "+1", "0x1", "1_0", " 1", "1 ", "xyz", "\u0661", "1" * 41, "8" + "0" * 39],
)
def test_malformed_serial_number_is_refused(text: str) -> None:
    with pytest.raises(CertificateError, match="hexadecimal"):
        parse_serial(text)
