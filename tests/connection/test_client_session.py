"""What a session changes for a client: how large its frames may be, and which token they carry."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import GREETING, TOKEN, Conversation
from zcproto.connection.client import MAX_FRAME_BEFORE_SESSION
from zcproto.connection.events import ClientEvent, EventReceived, ResponseReceived
from zcproto.errors import Code, InvalidArgument
from zcproto.wire.frame import ERROR, EVENT, NO_TOKEN, RESPONSE
from zcproto.wire.message import encode_body, encode_error


def body_of(size: int) -> dict[str, Any]:
    """Params whose request has this length."""
    overhead = 64 + len(encode_body(["echo", {"x": bytes(70_000)}])) - 70_000
    return {"x": bytes(size - overhead)}


def test_16_kib_is_the_limit_without_a_session_and_max_frame_with_one(talk: Conversation) -> None:
    assert not talk.client.has_session
    params = {"x": bytes(MAX_FRAME_BEFORE_SESSION - 64 - 12)}
    talk.request("echo", params, token=TOKEN)
    with pytest.raises(InvalidArgument) as caught:
        talk.request("echo", {"x": bytes(MAX_FRAME_BEFORE_SESSION)}, token=TOKEN)
    assert caught.value.details["limit"] == MAX_FRAME_BEFORE_SESSION
    assert caught.value.details["size"] > MAX_FRAME_BEFORE_SESSION
    assert talk.client.in_flight == 1

    talk.say(RESPONSE, 1, b"\xc0")
    assert talk.client.has_session
    talk.request("echo", body_of(GREETING["max_frame"]), token=TOKEN)
    assert talk.sent()[-1][0] == GREETING["max_frame"]
    with pytest.raises(InvalidArgument) as caught:
        talk.request("echo", body_of(GREETING["max_frame"] + 1), token=TOKEN)
    assert caught.value.details["limit"] == GREETING["max_frame"]


def test_a_server_with_a_tiny_limit_is_heeded() -> None:
    talk = Conversation(GREETING | {"max_frame": 200})
    talk.request("echo", {"x": bytes(100)})
    with pytest.raises(InvalidArgument):
        talk.request("echo", {"x": bytes(200)})


@pytest.mark.parametrize("method", ["session.open", "session.refresh"])
def test_opening_a_session_carries_no_token_and_its_result_gives_one(talk: Conversation, method: str) -> None:
    stream = talk.request(method, {}, token=TOKEN)
    assert talk.sent()[0][6] == NO_TOKEN
    talk.say(RESPONSE, stream, encode_body({"token": TOKEN}))
    assert talk.client.has_session
    talk.client.session_ended(TOKEN)
    assert not talk.client.has_session


@pytest.mark.parametrize(
    "result", [None, {}, {"token": "text"}, {"token": bytes(31)}, {"token": NO_TOKEN}, []]
)
def test_a_result_without_a_token_gives_no_session(talk: Conversation, result: Any) -> None:
    stream = talk.request("session.open", {})
    talk.say(RESPONSE, stream, encode_body(result))
    assert not talk.client.has_session


def test_a_token_taken_once_is_known_from_then_on(talk: Conversation) -> None:
    for _ in range(3):
        talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
        assert talk.client.has_session
    talk.client.session_ended(TOKEN)
    assert not talk.client.has_session


def test_no_token_is_in_the_repr_of_an_event() -> None:
    events: list[ClientEvent] = [ResponseReceived(1, {"token": TOKEN}), EventReceived("a", None, TOKEN)]
    assert "kkkk" not in repr(events)


def test_the_answer_of_a_public_method_shows_no_session(talk: Conversation) -> None:
    talk.say(RESPONSE, talk.request("server.info"), b"\xc0")
    assert not talk.client.has_session


@pytest.mark.parametrize(
    "code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED]
)
def test_a_refused_token_is_no_session_any_more(talk: Conversation, code: Code) -> None:
    talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
    talk.say(ERROR, talk.request(token=TOKEN), encode_error(Code.NOT_FOUND, "x"))
    assert talk.client.has_session
    talk.say(ERROR, talk.request(token=TOKEN), encode_error(code, "x"))
    assert not talk.client.has_session
    assert talk.client.send_limit == MAX_FRAME_BEFORE_SESSION


def test_a_revoked_session_is_none_any_more(talk: Conversation) -> None:
    talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
    body = encode_body(["session.revoked", {"reason": "operator"}])
    assert talk.say(EVENT, 0, body, token=TOKEN) == [
        EventReceived("session.revoked", {"reason": "operator"}, TOKEN)
    ]
    assert not talk.client.has_session
