"""Test how a session changes the frame limit and the tokens of a client."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness
from zcproto.connection.client import MAX_FRAME_BEFORE_SESSION
from zcproto.connection.events import ClientEvent, EventReceived, ResponseReceived
from zcproto.errors import Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable
from zcproto.wire.frame import ERROR, EVENT, GOAWAY, NO_TOKEN, RESPONSE
from zcproto.wire.message import decode_request, encode_body, encode_error


def body_of(size: int) -> dict[str, Any]:
    """Return params whose request frame has this length."""
    overhead = 64 + len(encode_body(["echo", {"x": bytes(70_000)}])) - 70_000
    return {"x": bytes(size - overhead)}


def test_send_limit_is_16_kib_without_session_and_max_frame_with_one(harness: ClientHarness) -> None:
    assert not harness.client.has_session
    params = {"x": bytes(MAX_FRAME_BEFORE_SESSION - 64 - 12)}
    harness.request("echo", params, token=TOKEN)
    with pytest.raises(InvalidArgument) as caught:
        harness.request("echo", {"x": bytes(MAX_FRAME_BEFORE_SESSION)}, token=TOKEN)
    assert caught.value.details["limit"] == MAX_FRAME_BEFORE_SESSION
    assert caught.value.details["size"] > MAX_FRAME_BEFORE_SESSION
    assert len(harness.client.in_flight) == 1

    harness.receive_frame(RESPONSE, 1, b"\xc0")
    assert harness.client.has_session
    harness.request("echo", body_of(WELCOME_MAP["max_frame"]), token=TOKEN)
    assert harness.sent()[-1][0] == WELCOME_MAP["max_frame"]
    with pytest.raises(InvalidArgument) as caught:
        harness.request("echo", body_of(WELCOME_MAP["max_frame"] + 1), token=TOKEN)
    assert caught.value.details["limit"] == WELCOME_MAP["max_frame"]


def test_send_limit_follows_smaller_server_max_frame() -> None:
    harness = ClientHarness(WELCOME_MAP | {"max_frame": 200})
    harness.request("echo", {"x": bytes(100)})
    with pytest.raises(InvalidArgument):
        harness.request("echo", {"x": bytes(200)})


@pytest.mark.parametrize("method", ["session.open", "session.refresh"])
def test_session_open_sends_no_token_and_its_result_has_one(harness: ClientHarness, method: str) -> None:
    stream = harness.request(method, {}, token=TOKEN)
    assert harness.sent()[0][6] == NO_TOKEN
    harness.receive_frame(RESPONSE, stream, encode_body({"token": TOKEN}))
    assert harness.client.has_session
    harness.client.session_ended(TOKEN)
    assert not harness.client.has_session


@pytest.mark.parametrize(
    "result", [None, {}, {"token": "text"}, {"token": bytes(31)}, {"token": NO_TOKEN}, []]
)
def test_result_without_valid_token_opens_no_session(harness: ClientHarness, result: Any) -> None:
    stream = harness.request("session.open", {})
    harness.receive_frame(RESPONSE, stream, encode_body(result))
    assert not harness.client.has_session


def test_accepted_token_counts_as_session_until_it_ends(harness: ClientHarness) -> None:
    for _ in range(3):
        harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
        assert harness.client.has_session
    harness.client.session_ended(TOKEN)
    assert not harness.client.has_session


def test_repr_of_event_hides_token() -> None:
    events: list[ClientEvent] = [ResponseReceived(1, {"token": TOKEN}), EventReceived("a", None, TOKEN, b"")]
    assert "kkkk" not in repr(events)


def test_answer_of_public_method_does_not_confirm_session(harness: ClientHarness) -> None:
    harness.receive_frame(RESPONSE, harness.request("server.info"), b"\xc0")
    assert not harness.client.has_session


@pytest.mark.parametrize(
    "code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED]
)
def test_refused_token_ends_session(harness: ClientHarness, code: Code) -> None:
    harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
    harness.receive_frame(ERROR, harness.request(token=TOKEN), encode_error(Code.NOT_FOUND, "x"))
    assert harness.client.has_session
    harness.receive_frame(ERROR, harness.request(token=TOKEN), encode_error(code, "x"))
    assert not harness.client.has_session
    assert harness.client.send_limit == MAX_FRAME_BEFORE_SESSION


def test_session_revoked_event_ends_session(harness: ClientHarness) -> None:
    harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
    body = encode_body(["session.revoked", {"reason": "operator"}])
    assert harness.receive_frame(EVENT, 0, body, token=TOKEN) == [
        EventReceived("session.revoked", {"reason": "operator"}, TOKEN, body)
    ]
    assert not harness.client.has_session


# --- showing a token ----------------------------------------------------------------------------------


def test_token_is_shown_beyond_the_limit_of_requests_and_after_goaway(harness: ClientHarness) -> None:
    for _ in range(WELCOME_MAP["max_streams"]):
        harness.request("echo")
    with pytest.raises(ResourceExhausted):
        harness.request("echo")
    streams = [harness.client.show(TOKEN, harness.wall)]
    harness.receive_frame(GOAWAY, 0, encode_body({"reason": "draining", "retry_after_ms": 0}))
    with pytest.raises(Unavailable):
        harness.request("echo")
    streams.append(harness.client.show(TOKEN, harness.wall))
    *_, first, second = harness.sent()
    assert [frame[2] for frame in (first, second)] == streams
    assert {frame[6] for frame in (first, second)} == {TOKEN}
    assert {decode_request(frame[7])[0] for frame in (first, second)} == {"session.info"}
    assert set(streams) <= set(harness.client.in_flight)


def test_token_is_shown_on_a_stream_that_is_not_in_flight(harness: ClientHarness) -> None:
    harness.request("echo")
    harness.client._next_stream = 1  # as after 2^32 requests
    assert harness.client.show(TOKEN, harness.wall) == 2


def test_token_is_not_shown_after_the_end(harness: ClientHarness) -> None:
    harness.client.end()
    with pytest.raises(ConnectionClosed):
        harness.client.show(TOKEN, harness.wall)
