"""ClientSession: token and expiry."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.helpers import NOW, WALL
from zcproto.client.credentials import ApiKey
from zcproto.client.session import ClientSession

TOKEN = bytes(range(1, 33))


def session(jitter: float = 0.0, **more: Any) -> ClientSession:
    result = {
        "token": TOKEN,
        "id": "s-1",
        "user": "ada",
        "expires_at": WALL + 100_000,
        "idle_timeout_ms": 0,
        "refresh_token": bytes(31) + b"r",
        "refresh_expires_at": WALL + 500_000,
        "bound": False,
    }
    return ClientSession(result | more, server_wall=WALL, now=NOW, jitter=jitter)


def test_repr_contains_no_secret() -> None:
    assert repr(session()) == f"ClientSession(id='s-1', user='ada', expires_at={WALL + 100_000})"
    assert repr(ApiKey("ada", "secret")) == "ApiKey(user='ada')"


def test_token_text_is_43_characters_of_base64url() -> None:
    assert session().token == "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA"
    assert session().token_bytes == TOKEN


def test_expiry_uses_server_clock_and_monotonic_time() -> None:
    assert session().valid_until == NOW + 100
    assert session(expires_at=WALL - 1).valid_until == NOW
    assert session().refresh_at == pytest.approx(NOW + 80)
    assert session(jitter=1.0).refresh_at == pytest.approx(NOW + 85)


def test_use_extends_the_idle_limit_but_not_the_expiry() -> None:
    opened = session(idle_timeout_ms=30_000)
    assert opened.valid_until == NOW + 30
    opened.used(NOW + 20)
    assert opened.valid_until == NOW + 50
    assert opened.shown_before == 15
    opened.used(NOW + 90)
    assert opened.valid_until == NOW + 100
    assert opened.shown_before == 0
    assert session().shown_before == 0


def test_session_reported_as_expired_stays_expired() -> None:
    opened = session()
    opened.expire()
    opened.used(NOW)
    assert opened.valid_until == -math.inf


def test_refresh_token_is_usable_until_expiry_or_drop() -> None:
    opened = session()
    assert opened.can_refresh(NOW + 499)
    assert not opened.can_refresh(NOW + 500)
    opened.refresh_token_bytes = None
    assert not opened.can_refresh(NOW)
    assert session(refresh_expires_at=None).can_refresh(NOW + 10**9)
    assert not session(refresh_token=None).can_refresh(NOW)
