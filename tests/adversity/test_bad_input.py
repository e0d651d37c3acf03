"""Tests of bad frames over real TLS: each gets its answer, and a bystander is not disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from tests.server.conftest import Serve
from tests.server.helpers import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    NO_TOKEN,
    PING,
    REQUEST,
    RESPONSE,
    WELCOME,
    Client,
    ServerThread,
    bystander,
    wall,
)
from zcproto.errors import Code

PROTOCOL_ERROR, FRAME_TOO_LARGE = Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE


# --- headers ---------------------------------------------------------------------------------------------


def fatal(client: Client, data: bytes) -> int:
    """Send bytes; return the code of the ERROR on stream 0 before the clean close."""
    client.send(data)
    frames, how = client.rest_until_closed()
    assert how == "close_notify"
    assert [(frame.kind, frame.stream, frame.token) for frame in frames[-1:]] == [(ERROR, 0, NO_TOKEN)]
    return frames[-1].code


HEADERS: dict[str, tuple[dict[str, Any], int]] = {
    "length 2^32-1": ({"length": 2**32 - 1}, FRAME_TOO_LARGE),
    "length 0": ({"length": 0}, PROTOCOL_ERROR),
    "length 63": ({"length": 63}, PROTOCOL_ERROR),
    "length one above the limit": ({"length": 1_048_577}, FRAME_TOO_LARGE),
    "version 0": ({"version": 0}, PROTOCOL_ERROR),
    "version 2": ({"version": 2}, PROTOCOL_ERROR),
    "flags": ({"flags": 1}, PROTOCOL_ERROR),
    "stream 0": ({"stream": 0}, PROTOCOL_ERROR),
    **{
        f"kind {kind:#x}": ({"kind": kind, "stream": 1}, PROTOCOL_ERROR) for kind in (0, 10, 0x0F, 0x1F, 0xFF)
    },
    **{
        f"kind {kind:#x} of servers": (
            {"kind": kind, "stream": int(kind in (WELCOME, RESPONSE))},
            PROTOCOL_ERROR,
        )
        for kind in (WELCOME, RESPONSE, ERROR, GOAWAY, EVENT)
    },
    "PING on a stream": ({"kind": PING, "stream": 5}, PROTOCOL_ERROR),
    "PING with a body": ({"kind": PING, "body": b"\xc0"}, PROTOCOL_ERROR),
    "CANCEL of stream 0": ({"kind": CANCEL, "stream": 0}, PROTOCOL_ERROR),
}


@pytest.mark.parametrize(("fields", "code"), HEADERS.values(), ids=HEADERS)
def test_invalid_frame_header_ends_the_connection(
    server: ServerThread, fields: dict[str, Any], code: int
) -> None:
    with server.client("ada") as client:
        assert fatal(client, client.frame(**fields)) == code


def test_large_frame_before_session_is_refused_by_header(server: ServerThread) -> None:
    with server.client() as client:
        assert fatal(client, client.frame(length=16_385)) == FRAME_TOO_LARGE


def test_frame_sent_byte_by_byte_is_decoded(server: ServerThread) -> None:
    with server.client("ada") as client:
        for byte in client.request("echo", {"a": 1}):
            client.tls.sendall(bytes((byte,)))
        assert client.answer().value == {"a": 1}


def test_reused_stream_in_flight_ends_the_connection(server: ServerThread) -> None:
    with server.client("ada") as client:
        client.send(client.request("sleep", {"ms": 3_600_000}, stream=7))
        assert fatal(client, client.request("echo", {}, stream=7)) == PROTOCOL_ERROR
    server.until(lambda: server.server.state.tasks.running == 0)


# --- bodies ----------------------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "not msgpack": b"\xc1",
    "two values": msgpack.packb(["echo", {}]) + b"\xc0",
    "cut off": msgpack.packb(["echo", {"a": "b" * 40}])[:-3],
    "a map": msgpack.packb({"method": "echo"}),
    "no params": msgpack.packb(["echo"]),
    "params a list": msgpack.packb(["echo", [1]]),
    "keys that are no str": msgpack.packb(["echo", {1: 2}]),
    "invalid UTF-8": b"\x92\xa4echo\x81\xa1a\xa1\xff",
    "ext": msgpack.packb(["echo", {"a": msgpack.ExtType(5, b"x")}]),
    "timestamp": msgpack.packb(["echo", {"a": msgpack.Timestamp(1)}]),
    "33 deep": b"\x92\xa4echo\x81\xa1a" + b"\x91" * 31 + b"\xc0",
    "100,000 deep": b"\x92\xa4echo\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "an array of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdd\xff\xff\xff\xff",
    "arrays of 2^20 in one another": b"\x92\xa4echo\x81\xa1a" + b"\xdd\x00\x10\x00\x00" * 31,
    "a map of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdf\xff\xff\xff\xff",
    "a str of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdb\xff\xff\xff\xff",
    "a bin of 2^32-1": b"\x92\xa4echo\x81\xa1a\xc6\xff\xff\xff\xff",
    "a bomb of arrays, 1 MiB": b"\x92\xa4echo\x81\xa1a" + b"\xdd\x00\x01\x00\x00" * 200_000,
    "method in capitals": msgpack.packb(["ECHO", {}]),
    "method of 129 characters": msgpack.packb(["e" * 129, {}]),
    "deadline no int": msgpack.packb(["echo", {}, {"deadline_ms": "soon"}]),
    "idempotency key of 65": msgpack.packb(["echo", {}, {"idempotency_key": "k" * 65}]),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_invalid_body_is_refused_on_its_stream(server: ServerThread, body: bytes) -> None:
    before = server.stats["rss_bytes"]
    with server.client("ada") as client:
        client.send(client.frame(REQUEST, body))
        answer = client.answer(client.stream)
        assert answer.code == Code.INVALID_ARGUMENT
        client.echo()
    # The frame takes a few copies of a megabyte; an expanded bomb would take a hundred.
    assert server.stats["rss_bytes"] - before < 16 * 2**20


# --- freshness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
def test_replayed_frame_is_refused(server: ServerThread, elsewhere: bool) -> None:
    with server.client("ada") as client, server.client() as other:
        captured = client.request("echo", {})
        client.send(captured)
        client.answer()
        assert fatal(other if elsewhere else client, captured) == Code.REPLAYED


def test_replayed_frame_after_restart_is_refused(serve: Serve) -> None:
    first = serve()
    with first.client("ada") as client:
        captured = client.request("echo", {})
    first.drain()
    second = serve()
    with bystander(second), second.client() as client:
        assert fatal(client, captured) == Code.REPLAYED


@pytest.mark.parametrize(
    "timestamp", [lambda: wall() - 31_000, lambda: wall() + 40_000, lambda: 0, lambda: 2**64 - 1]
)
def test_stale_timestamp_refuses_only_its_request(server: ServerThread, timestamp: Callable[[], int]) -> None:
    with server.client("ada") as client:
        answer = client.refused("echo", {}, timestamp=timestamp())
        assert answer.code == Code.STALE_TIMESTAMP
        assert abs(answer.details["server_time"] - wall()) < 5_000
        client.echo()
