"""Test that the repr of events identifies them and hides secrets."""

from __future__ import annotations

import pytest

from zcproto.connection.events import (
    NEVER,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    FrameBuffered,
    GoAwayReceived,
    Request,
    RequestEnded,
    ResponseReceived,
    SessionJoined,
    Welcomed,
)
from zcproto.errors import Code
from zcproto.wire.message import NO_META

TOKEN = bytes(range(0x41, 0x61))
SECRETS = (TOKEN.hex(), repr(TOKEN)[2:-1], "hunter2")


def request() -> Request:
    return Request(7, TOKEN, None, "echo", {"password": "hunter2"}, NO_META)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (request(), "Request(stream=7, method='echo')"),
        (RequestEnded(request(), Code.CANCELLED), "CANCELLED"),
        (FrameBuffered(1, 2.0, "ada"), "FrameBuffered(size=1, began=2.0, user='ada')"),
        (SessionJoined("id"), "SessionJoined(session_id='id')"),
        (ConnectionEnded(None, "idle"), "idle"),
        (Welcomed({"server": "x"}), "server"),
        (ResponseReceived(3, {"token": TOKEN, "key": "hunter2"}), "ResponseReceived(stream=3)"),
        (ErrorReceived(3, 5, "no such thing", {}), "no such thing"),
        (GoAwayReceived("draining", 1_000), "draining"),
        (EventReceived("session.expiring", {"expires_at": 1}, TOKEN, b""), "session.expiring"),
    ],
)
def test_repr_of_event_hides_secrets(event: object, text: str) -> None:
    shown = repr(event)
    assert text in shown
    assert not any(secret in shown for secret in SECRETS)


def test_new_request_has_no_deadline_and_is_not_held() -> None:
    fresh = request()
    assert (fresh.deadline, fresh.held, fresh.lingers) == (NEVER, False, False)
    assert not hasattr(fresh, "__dict__")
