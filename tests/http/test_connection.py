"""Test requests, refusals, limits and timeouts of an HTTP connection, for every split of the bytes."""

from __future__ import annotations

from dataclasses import replace

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers import NOW, WALL
from tests.http.helpers import GET, LIMITS, SECURITY, Conversation, answers
from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import HttpResponse, SecurityHeaders, text_response

HSTS = "max-age=31536000; includeSubDomains"


def head(*lines: str, first: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join((first, *lines, "", "")).encode("latin-1")


def post(body: bytes, *lines: str) -> bytes:
    return head("Host: a", *lines, first="POST /p HTTP/1.1") + body


GOOD: dict[str, tuple[bytes, list[str]]] = {
    "one": (GET, ["GET / ? b''"]),
    "a query is left as it is": (head("Host: a", first="GET /x?y=%20&z HTTP/1.1"), ["GET /x ?y=%20&z b''"]),
    "two slashes are a path": (head("Host: a", first="GET //a/../b HTTP/1.1"), ["GET //a/../b ? b''"]),
    "the absolute form": (head("Host: a", first="GET https://a:1/b?c HTTP/1.1"), ["GET /b ?c b''"]),
    "the absolute form without a path": (head("Host: a", first="GET http://a HTTP/1.1"), ["GET / ? b''"]),
    "the asterisk": (head("Host: a", first="OPTIONS * HTTP/1.1"), ["OPTIONS * ? b''"]),
    "an empty line before": (b"\r\n" + GET, ["GET / ? b''"]),
    "a body": (post(b"hello", "Content-Length: 5"), ["POST /p ? b'hello'"]),
    "an empty body": (post(b"", "Content-Length: 0"), ["POST /p ? b''"]),
    "a body of ambiguous bytes": (post(b"\n \0\r", "Content-Length: 4"), [r"POST /p ? b'\n \x00\r'"]),
    "the largest body": (post(b"x" * 64, "Content-Length: 64"), [f"POST /p ? b'{'x' * 64}'"]),
    "chunks": (
        post(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        ["POST /p ? b'abcde'"],
    ),
    "many chunks": (
        post(b"1\r\nx\r\n" * 10 + b"0\r\n\r\n", "Transfer-Encoding: chunked"),
        ["POST /p ? b'xxxxxxxxxx'"],
    ),
    "as many fields as allowed": (head("Host: a", *(f"X{n}: y" for n in range(9))), ["GET / ? b''"]),
    "no host in HTTP/1.0": (head(first="GET / HTTP/1.0"), ["GET / ? b''"]),
    "an empty host": (head("Host:"), ["GET / ? b''"]),
    "an address as host": (head("Host: [::1]:7443"), ["GET / ? b''"]),
    "pipelined": (GET * 3, ["GET / ? b''"] * 3),
    "pipelined behind a body": (post(b"hi", "Content-Length: 2") + GET, ["POST /p ? b'hi'", "GET / ? b''"]),
    "an upgrade request": (
        head("Host: a", "Upgrade: h2c", "Connection: upgrade"),
        ["GET / ? b''"],
    ),
    "expect: 100-continue": (
        post(b"hi", "Content-Length: 2", "Expect: 100-continue"),
        ["POST /p ? b'hi'"],
    ),
}

BAD: dict[str, tuple[int, bytes]] = {
    "no HTTP": (400, b"\x16\x03\x01\x02\x00"),
    "a frame of ZCP": (400, bytes.fromhex("0000004401020000")),
    "no version": (400, b"GET /\r\n\r\n"),
    "words": (400, b"hello world\r\n\r\n"),
    "a space before the line": (400, b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "bare line feeds": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "one bare line feed": (400, b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"),
    "a bare carriage return": (400, b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n"),
    "a folded line": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n"),
    "a folded line by tab": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\tz\r\n\r\n"),
    "a fold before all fields": (400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "a zero byte": (400, head("Host: a", "X: a\0b")),
    "a control character": (400, head("Host: a", "X: a\x01b")),
    "a space before the colon": (400, head("Host : a")),
    "no colon": (400, head("Host: a", "X")),
    "no name": (400, head("Host: a", ": x")),
    "no host": (400, head()),
    "two hosts": (400, head("Host: a", "Host: b")),
    "an invalid host": (400, head("Host: a/b")),
    "a host with a user": (400, head("Host: u@a")),
    "two lengths": (400, post(b"hello", "Content-Length: 5", "Content-Length: 6")),
    "the same length twice": (400, post(b"hello", "Content-Length: 5", "content-length: 5")),
    "a list of lengths": (400, post(b"hello", "Content-Length: 5, 5")),
    "a negative length": (400, post(b"", "Content-Length: -1")),
    "a signed length": (400, post(b"hello", "Content-Length: +5")),
    "a length in hexadecimal": (400, post(b"hello", "Content-Length: 0x5")),
    "a length in other digits": (400, post(b"hello", "Content-Length: \xb2")),
    "length and chunks": (400, post(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked")),
    "chunks and length": (400, post(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5")),
    "length and another coding": (
        400,
        post(b"0\r\n\r\n", "Transfer-Encoding: xchunked", "Content-Length: 5"),
    ),
    "chunks in HTTP/1.0": (400, head("Host: a", "Transfer-Encoding: chunked", first="POST / HTTP/1.0")),
    "a bad chunk": (400, post(b"xyz\r\n", "Transfer-Encoding: chunked")),
    "a chunk that goes on": (400, post(b"1\r\nabc\r\n", "Transfer-Encoding: chunked")),
    "a fragment or another form": (400, head("Host: a", first="GET a/b HTTP/1.1")),
    "another scheme": (400, head("Host: a", first="GET ftp://a/b HTTP/1.1")),
    "an asterisk without OPTIONS": (400, head("Host: a", first="GET * HTTP/1.1")),
    "a body too large": (413, post(b"", "Content-Length: 65")),
    "a body of absurd size": (413, post(b"", "Content-Length: 99999999999999999999")),
    "chunks too large": (413, post(b"41\r\n" + b"x" * 65, "Transfer-Encoding: chunked")),
    "too many chunks": (413, post(b"1\r\nx\r\n" * 11, "Transfer-Encoding: chunked")),
    "a target too long": (414, head("Host: a", first=f"GET /{'x' * 100} HTTP/1.1")),
    "a line that never ends": (414, b"GET /" + b"x" * 200),
    "an unknown expectation": (417, post(b"", "Content-Length: 2", "Expect: tea")),
    "fields too long": (431, head("Host: a", *(f"X{n}: {'y' * 250}" for n in range(4)))),
    "fields that never end": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1_100),
    "too many fields": (431, head("Host: a", *(f"X{n}: y" for n in range(10)))),
    "another method": (501, head("Host: a", first="BREW / HTTP/1.1")),
    "a tunnel": (501, head("Host: a", first="CONNECT a:443 HTTP/1.1")),
    "a trace": (501, head("Host: a", first="TRACE / HTTP/1.1")),
    "another coding": (501, post(b"", "Transfer-Encoding: gzip")),
    "two codings": (501, post(b"", "Transfer-Encoding: gzip, chunked")),
    "coded twice": (501, post(b"", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked")),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9 with a version": (505, head("Host: a", first="GET / HTTP/0.9")),
}


def splits(data: bytes) -> list[list[bytes]]:
    """Return the data whole, byte by byte, and in two pieces at every position."""
    single = [data[at : at + 1] for at in range(len(data))]
    return [[data], single, *([data[:at], data[at:]] for at in range(1, len(data)))]


@pytest.mark.parametrize("name", GOOD)
def test_request_is_parsed_for_every_split(name: str) -> None:
    data, expected = GOOD[name]
    for pieces in splits(data):
        conversation = Conversation().feed(*pieces)
        assert [answer.body.decode().strip() for answer in conversation.answers] == expected, pieces
        assert {answer.status for answer in conversation.answers} == {200}


@pytest.mark.parametrize("name", BAD)
def test_invalid_request_gets_its_status_for_every_split_and_closes(name: str) -> None:
    status, data = BAD[name]
    for pieces in splits(data):
        conversation = Conversation().feed(*pieces, GET)
        assert conversation.requests == [], pieces
        answer = conversation.answer
        assert answer.status == status, pieces
        assert answer.closes
        assert answer.one("strict-transport-security") == HSTS
        assert conversation.connection.closing
        assert not conversation.connection.wants_data


@pytest.mark.parametrize(
    ("name", "text"), [("another method", "not implemented"), ("too many fields", "too many header fields")]
)
def test_refusal_states_its_reason(name: str, text: str) -> None:
    assert Conversation().feed(BAD[name][1]).answer.body.decode().strip() == text


@pytest.mark.parametrize("name", BAD)
def test_invalid_pipelined_request_is_refused_after_a_valid_one(name: str) -> None:
    status, data = BAD[name]
    conversation = Conversation().feed(GET + data + GET)
    assert [answer.status for answer in conversation.answers] == [200, status]
    assert len(conversation.requests) == 1


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_bytes_give_requests_or_one_refusal(pieces: list[bytes]) -> None:
    conversation = Conversation().feed(*pieces)
    refused = [answer for answer in conversation.answers if answer.status != 200]
    assert len(refused) <= 1
    assert conversation.connection.closing or not refused


TOKENS = (
    "GET / HTTP/1.1",
    "\r\n",
    "\n",
    "\r",
    "Host: a",
    "Content-Length: 5",
    "Transfer-Encoding: chunked",
    " ",
    "0",
)


@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join), st.integers(1, 50))
@example("GET / HTTP/1.1" * 10 + "\n", 1)
def test_any_tokens_parse_the_same_for_every_split(text: str, size: int) -> None:
    data = text.encode()
    whole = Conversation().feed(data) if data else Conversation()
    cut = Conversation().feed(*(data[at : at + size] for at in range(0, len(data), size)))
    assert [answer.status for answer in cut.answers] == [answer.status for answer in whole.answers]
    assert [request.path for request in cut.requests] == [request.path for request in whole.requests]


# --- keep-alive and pipelining ---------------------------------------------------------------------------------


def test_connection_closes_after_max_requests() -> None:
    conversation = Conversation()
    for number in range(1, 6):
        conversation.feed(GET)
        assert conversation.connection.closing is (number == 5)
    assert [answer.closes for answer in conversation.answers] == [False, False, False, False, True]
    assert conversation.feed(GET).answers[5:] == []


@pytest.mark.parametrize(
    "request_",
    [
        head("Host: a", "Connection: close"),
        head("Host: a", "Connection: keep-alive, Close"),
        head(first="GET / HTTP/1.0"),
        head("Connection: keep-alive", first="GET / HTTP/1.0"),
        post(b"0\r\n\r\n", "Transfer-Encoding: chunked"),
    ],
)
def test_connection_close_is_honoured_after_the_response(request_: bytes) -> None:
    conversation = Conversation().feed(request_ + GET)
    assert conversation.answer.closes
    assert conversation.connection.closing
    assert len(conversation.requests) == 1


def test_head_response_has_length_and_no_body() -> None:
    conversation = Conversation().feed(head("Host: a", first="HEAD / HTTP/1.1") + GET)
    of_head, of_get = conversation.answers
    assert of_head.body == b""
    assert int(of_head.one("content-length")) == len(of_get.body) + 1  # HEAD is a letter longer


def test_pipelined_request_waits_for_previous_response() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    first = connection.receive_data(GET + head("Host: a", first="GET /2 HTTP/1.1"), WALL, NOW)
    assert first is not None
    assert connection.receive_data(GET, WALL, NOW) is None
    second = connection.respond(text_response(200, "1"), WALL, NOW)
    assert second is not None
    assert (first.path, second.path) == ("/", "/2")
    assert connection.sent == [200]


def test_bytes_received_while_answering_are_bounded() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    connection.receive_data(GET, WALL, NOW)
    kept = 0
    while connection.wants_data:
        assert connection.receive_data(GET, WALL, NOW) is None
        kept += 1
    assert kept == -(-LIMITS.max_head // len(GET))
    assert connection.respond(text_response(200, "1"), WALL, NOW) is not None
    assert connection.wants_data


def test_response_without_request_is_dropped() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    assert connection.respond(text_response(200, "early"), WALL, NOW) is None
    assert connection.data_to_send() == b""


def test_100_continue_is_sent_only_when_expected() -> None:
    request = post(b"", "Content-Length: 2", "Expect: 100-continue")
    conversation = Conversation().feed(request)
    assert conversation.out == b"HTTP/1.1 100 Continue\r\n\r\n"
    conversation.feed(b"h", b"i")
    assert conversation.answer.body == b"POST /p ? b'hi'\n"
    assert b"100 Continue" not in Conversation().feed(post(b"", "Content-Length: 2")).out
    assert b"100 Continue" not in Conversation().feed(request + b"hi").out
    refused = Conversation().feed(post(b"", "Content-Length: 65", "Expect: 100-continue"))
    assert refused.answer.status == 413
    assert b"100 Continue" not in refused.out


def test_go_away_closes_after_next_response() -> None:
    conversation = Conversation().feed(GET)
    conversation.connection.go_away()
    assert not conversation.connection.closing
    conversation.feed(GET)
    assert [answer.closes for answer in conversation.answers] == [False, True]
    assert conversation.connection.closing


def test_repeated_header_fields_are_joined() -> None:
    (request,) = Conversation().feed(head("Host: a", "X: 1", "x: 2", "Y: \xe4")).requests
    assert request.headers == {"host": "a", "x": "1, 2", "y": "\xe4"}


# --- responses -------------------------------------------------------------------------------------------


def test_response_carries_status_headers_and_body() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    connection.receive_data(GET, WALL, NOW)
    connection.respond(
        HttpResponse(200, b"x", "text/x", (("Allow", "GET"),), policy="default-src 'self'"), WALL, NOW
    )
    (answer,) = answers(connection.data_to_send())
    assert answer.body == b"x"
    assert answer.one("content-type") == "text/x"
    assert answer.one("allow") == "GET"
    assert answer.one("content-security-policy") == "default-src 'self'"
    assert answer.one("date") == "Thu, 01 Jan 2026 00:00:00 GMT"
    assert answer.all("server") == []
    assert not answer.closes


def test_204_has_no_content_length() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    connection.receive_data(GET, WALL, NOW)
    connection.respond(HttpResponse(204), WALL, NOW)
    (answer,) = answers(connection.data_to_send())
    assert answer.status == 204
    assert answer.all("content-length") == answer.all("content-type") == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "bad",
    [
        text_response(200, "x", headers=(("X", "a\r\nSet-Cookie: b"),)),
        text_response(200, "x", headers=(("X: y", "a"),)),
        text_response(200, "x", policy="default-src 'none'\r\nSet-Cookie: b"),
        text_response(200, "x", policy="default-src é"),
        text_response(299, "x"),
    ],
)
def test_invalid_response_raises_and_another_can_be_sent(method: str, bad: HttpResponse) -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    connection.receive_data(head("Host: a", first=f"{method} / HTTP/1.1"), WALL, NOW)
    with pytest.raises((h11.LocalProtocolError, ValueError)):
        connection.respond(bad, WALL, NOW)
    assert connection.data_to_send() == b""
    connection.respond(text_response(500, "internal error"), WALL, NOW)
    data = connection.data_to_send()
    (answer,) = answers(data, [method])
    assert answer.status == 500
    assert answer.all("set-cookie") == []


def test_hsts_is_absent_without_tls() -> None:
    for data in (GET, b"\0"):
        answer = Conversation(security=SecurityHeaders(tls=False)).feed(data).answer
        assert answer.all("strict-transport-security") == []
        assert answer.one("x-content-type-options") == "nosniff"


# --- time ------------------------------------------------------------------------------------------------


def expire(conversation: Conversation, after: float) -> None:
    """Assert that nothing happens before the deadline and that the connection closes at it."""
    connection = conversation.connection
    assert connection.next_deadline() == conversation.now + after
    before = conversation.out
    connection.handle_timeout(WALL, conversation.now + after - 0.001)
    assert connection.data_to_send() == b""
    assert not connection.closing
    connection.handle_timeout(WALL, conversation.now + after)
    conversation.out = before + connection.data_to_send()
    assert connection.closing


def test_silent_connection_times_out_without_response() -> None:
    conversation = Conversation()
    expire(conversation, 10.0)
    assert conversation.out == b""


def test_truncated_head_times_out_with_408() -> None:
    conversation = Conversation().feed(GET[:-2])
    expire(conversation, 10.0)
    assert conversation.answer.status == 408
    assert conversation.answer.closes
    assert conversation.answer.one("strict-transport-security") == HSTS


def test_slow_bytes_do_not_extend_head_timeout() -> None:
    conversation = Conversation()
    for letter in GET[:-2]:
        conversation.now += 0.1
        conversation.feed(bytes([letter]))
    assert conversation.connection.next_deadline() == NOW + 10.0


def test_body_timeout_is_separate_and_not_extended_by_slow_bytes() -> None:
    conversation = Conversation()
    conversation.now = NOW + 9.0
    conversation.feed(post(b"h", "Content-Length: 5"))
    conversation.now = NOW + 12.0
    conversation.feed(b"e")
    conversation.now = NOW + 9.0
    expire(conversation, 10.0)
    assert conversation.answer.status == 408


def test_idle_connection_times_out_without_response() -> None:
    conversation = Conversation().feed(GET)
    expire(conversation, 30.0)
    assert len(conversation.answers) == 1


def test_next_request_gets_full_request_timeout() -> None:
    conversation = Conversation().feed(GET)
    conversation.now = NOW + 29.0
    conversation.feed(b"G")
    assert conversation.connection.next_deadline() == NOW + 30.0  # no more than is left of the idle time
    conversation = Conversation().feed(GET)
    conversation.now = NOW + 5.0
    conversation.feed(b"G")
    assert conversation.connection.next_deadline() == NOW + 15.0
    conversation = Conversation().feed(GET + b"G")
    assert conversation.connection.next_deadline() == NOW + 10.0


def test_slow_handler_times_out_with_503() -> None:
    connection = HttpConnection(LIMITS, SECURITY, NOW)
    connection.receive_data(GET, WALL, NOW)
    connection.handle_timeout(WALL, NOW + 19.9)
    assert not connection.closing
    connection.handle_timeout(WALL, NOW + 20.0)
    (answer,) = answers(connection.data_to_send())
    assert answer.status == 503
    assert answer.closes
    assert connection.respond(text_response(200, "late"), WALL, NOW + 21) is None
    assert connection.data_to_send() == b""
    assert connection.next_deadline() == float("inf")
    connection.handle_timeout(WALL, NOW + 1e9)
    assert connection.data_to_send() == b""


def test_idle_connection_holds_no_buffers() -> None:
    connection = HttpConnection(HttpLimits(), SECURITY, NOW)
    for _ in range(100):
        request = connection.receive_data(GET, WALL, NOW)
        assert request is not None
        connection.respond(text_response(200, "x"), WALL, NOW)
        connection.data_to_send()
    assert connection.idle
    assert connection._h11 is None
    assert len(connection._buffer) == 0


@pytest.mark.parametrize("size", [1, 100, 1_000])
def test_buffer_of_head_is_bounded(size: int) -> None:
    limits = replace(LIMITS, max_head=1_000, max_target=900)
    connection = HttpConnection(limits, SECURITY, NOW)
    most = 0
    while not connection.closing:
        connection.receive_data(b"x" * size, WALL, NOW)
        most = max(most, len(connection._buffer))
    assert most <= 1_000 + size
    assert len(connection._buffer) == 0


def test_closed_connection_holds_no_part_of_a_body() -> None:
    conversation = Conversation().feed(BAD["chunks too large"][1])
    assert conversation.connection.closing
    assert len(conversation.connection._body) == 0
