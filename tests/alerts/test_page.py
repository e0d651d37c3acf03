"""Compare docs/alerts.md with the code: figures, the message, and the program for receivers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zcproto.alerts import CATALOGUE, Alert, AlertCenter, AlertKind, Ending, Message, Phase, Severity
from zcproto.alerts.alert import MAX_MESSAGE
from zcproto.alerts.center import BURST, MANY_DELAY_S, MANY_REPEAT_S, REFILL_S
from zcproto.alerts.service import STOP_S
from zcproto.alerts.sinks import (
    DOWN_AFTER,
    HEADER,
    MAX_AGE_S,
    MAX_DELAY_S,
    PASSED_ON,
    QUEUED,
    REFUSED_TRIES,
    SHOWN,
    TOLERANCE_S,
    TRIES,
    sign,
)
from zcproto.common.secret import Secret
from zcproto.config.model import settings as all_settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "alerts.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECRET = "0123456789abcdef"
BODY = b'{"id":"1"}'

IsGenuine = Callable[..., bool]


def block(language: str) -> str:
    """Return the only code block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


@pytest.mark.parametrize("kind", AlertKind)
def test_each_kind_is_documented(kind: AlertKind) -> None:
    entry = CATALOGUE[kind]
    assert re.fullmatch(r"[a-z]+\.[a-z_]+", kind.value)
    assert entry.meaning.endswith(".")
    assert entry.cure.endswith(".")
    assert "|" not in entry.meaning + entry.cure
    if entry.ending is Ending.QUIET:
        assert entry.severity >= Severity.WARNING or kind is AlertKind.TEST


def test_documented_settings_exist() -> None:
    named = set(re.findall(r"`(?:alerts|store|freshness|certificates)\.[a-z_]+`", TEXT))
    kinds = {f"`{kind.value}`" for kind in AlertKind}
    settings = {name.strip("`") for name in named - kinds}
    assert settings
    assert settings <= set(all_settings())
    for name in re.findall(r"`((?:webhook|command)_[a-z]+)`", TEXT):
        assert f"alerts.{name}" in all_settings()


def test_documented_figures_match_code() -> None:
    text = " ".join(TEXT.split())
    assert f"up to {BURST} alerts are sent individually" in text
    assert REFILL_S == 6 * 60
    assert "one more every six minutes" in text
    assert (MANY_DELAY_S, MANY_REPEAT_S) == (10, 3600)
    assert "ten seconds after the first of them, and then once an hour" in text
    assert (MAX_DELAY_S, MAX_AGE_S) == (120, 3600)
    assert "up to two minutes, for an hour" in text
    assert REFUSED_TRIES == TRIES == DOWN_AFTER == 3
    assert f"up to {QUEUED} wait" in text
    assert f"the first {SHOWN} characters" in text
    assert STOP_S == 3
    assert "waits three seconds" in text
    assert "`PATH`, `HOME`, `LANG` and `TZ`" in text
    assert PASSED_ON == ("PATH", "HOME", "LANG", "TZ")


def test_documented_message_has_all_fields() -> None:
    shown: dict[str, Any] = json.loads(block("json"))
    alert = shown["alert"]
    made = Message(
        7,
        Phase(shown["phase"]),
        Alert(
            AlertKind(alert["kind"]),
            alert["about"],
            Severity[alert["severity"].upper()],
            alert["title"],
            alert["details"],
            alert["began_at"],
            alert["last_at"],
            alert["ended_at"],
            alert["count"],
        ),
    )
    body = made.as_json("9f86d081884c7d65", "gate:7443")
    assert json.loads(body) == shown
    assert [*json.loads(body)] == [*shown], "in this order, too"


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\U0001f512"])
def test_message_size_is_limited(letter: str) -> None:
    """Non-ASCII characters are escaped, which makes them longer."""
    long = letter * 5_000
    center = AlertCenter(repeat_s=None, quiet_s=1.0)
    details: dict[str, object] = {f"name{number}": [long] * 16 for number in range(50)}
    center.raise_(AlertKind.TEST, long, about=long, details=details, wall=10**15, now=0.0)
    (message,) = center.take_messages()
    body = message.as_json("f" * 16, "h" * 253 + ":65535")
    assert len(body) <= MAX_MESSAGE == 8 * 1024
    assert "of at most 8 KiB" in TEXT
    alert = json.loads(body)["alert"]
    assert alert["details"]["oversize"] > MAX_MESSAGE
    assert alert["title"].startswith(letter * 100)


# --- the program for receivers ------------------------------------------------------------------------------


@pytest.fixture
def is_genuine() -> IsGenuine:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    found: IsGenuine = names["is_genuine"]
    return found


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_documented_receiver_accepts_genuine_message(is_genuine: IsGenuine) -> None:
    header = sign(Secret(SECRET), BODY, now_ms())
    assert is_genuine(SECRET.encode(), BODY, header)
    other = sign(Secret("another secret!!"), BODY, now_ms())
    assert is_genuine(SECRET.encode(), BODY, f"{other},{header.partition(',')[2]}")


def test_documented_receiver_refuses_others(is_genuine: IsGenuine) -> None:
    secret, header = SECRET.encode(), sign(Secret(SECRET), BODY, now_ms())
    assert not is_genuine(b"another", BODY, header)
    assert not is_genuine(secret, BODY + b" ", header)
    for off in (-3_600_000, 3_600_000):
        assert not is_genuine(secret, BODY, sign(Secret(SECRET), BODY, now_ms() + off))
        assert is_genuine(secret, BODY, sign(Secret(SECRET), BODY, now_ms() + off), tolerance_s=4_000)
    for wrong in ("", "t=1", "v1=00", f"{header},t=1", "t=x,v1=00", "t=\u00b2,v1=00", "t=1,v1=\u00e9"):
        assert not is_genuine(secret, BODY, wrong), wrong


def test_documented_header_is_valid() -> None:
    shown = re.search(rf"^{HEADER}: (t=[0-9]+,v1=[0-9a-f]+)$", TEXT, re.MULTILINE)
    assert shown is not None
    example = re.search(r"signs the body `(.*?)` under the secret `(.*?)`", TEXT)
    assert example is not None
    assert shown[1] == sign(Secret(example[2]), example[1].encode(), 1_767_225_600_000)
    assert TOLERANCE_S == 300
    assert "tolerance_s: int = 300" in TEXT
