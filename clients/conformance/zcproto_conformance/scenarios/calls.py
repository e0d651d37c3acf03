"""Calls: streams, deadlines, cancellation, errors, events, and the contents of bodies."""

from __future__ import annotations

import struct
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    UNKNOWN,
)
from zcproto_conformance.connection import MAX_FRAME, NO_TOKEN, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import Harness

scenario: Final = Scenarios(SCRIPTED)

TRACEPARENT: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@scenario("responses-out-of-order", "6.4: responses are matched by stream, never by order")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    calls = await peer.client.calls("echo", 5)
    for request in reversed(await peer.connection.expect_requests("echo", 5)):
        peer.connection.respond(request, request.params)
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})


@scenario("response-on-unknown-stream", "6.4: a response on a stream that is not in flight is dropped")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.send("RESPONSE", request.stream + 1000, b"\xc0")
    peer.connection.send("ERROR", request.stream + 1001, pack([INTERNAL, "not in flight"]))
    peer.connection.respond(request, "expected")
    await call.expect_result("expected")


@scenario("duplicate-response", "6.4: a second response to a request is dropped")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    first = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.respond(request, "first")
    await first.expect_result("first")
    peer.connection.respond(request, "second")
    await peer.exchange()


@scenario("error-codes", "10.1: each code of an ERROR reaches the application, with message and details")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for code in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15):
        call = await peer.client.call("echo", {})
        peer.connection.respond_error(await peer.connection.expect_request("echo"), code, {"why": code})
        error = await call.expect_code(code)
        expect(error.get("message") == "refused by the scenario", f"the message is {error.get('message')!r}")
        expect(error.get("details") == {"map": {"why": code}}, f"the details are {error.get('details')}")
    await peer.connection.expect_silence("after errors that must not be retried")


@scenario("error-without-details", "6.4: details may be absent or nil")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for body in ([NOT_FOUND, "no such thing"], [NOT_FOUND, "no such thing", None]):
        call = await peer.client.call("echo", {})
        request = await peer.connection.expect_request("echo")
        peer.connection.in_flight.clear()
        peer.connection.send("ERROR", request.stream, pack(body))
        error = await call.expect_code(NOT_FOUND)
        expect(error.get("details") in (None, {"map": {}}), f"the details are {error.get('details')}")


@scenario("unknown-code", "6.4: an unknown code is an error of the call, like UNKNOWN")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), 200)
    await call.expect_code(UNKNOWN, 200)
    await peer.exchange()


# --- bodies -----------------------------------------------------------------------------------------


def _invalid_body(name: str, proves: str, body: bytes) -> None:
    """Register a scenario with an invalid response, which fails the call but not the connection."""

    @scenario(name, f"{proves}; the call fails with INTERNAL and the connection continues")
    async def _(harness: Harness) -> None:
        peer = await harness.connect()
        call = await peer.client.call("echo", {})
        request = await peer.connection.expect_request("echo")
        peer.connection.in_flight.clear()
        peer.connection.send("RESPONSE", request.stream, body)
        await call.expect_code(INTERNAL)
        await peer.exchange()


_invalid_body("body-not-msgpack", "12.2: a body must be one msgpack value", b"\x92\x01")
_invalid_body("body-with-trailing-bytes", "12.2: bytes after the value are refused", b"\xc0\xc0")
_invalid_body("body-with-ext-type", "12.2: ext types are refused", b"\xd4\x05\x00")
_invalid_body("body-with-timestamp", "12.2: msgpack's timestamp is an ext type", b"\xd6\xff\x00\x00\x00\x00")
_invalid_body("body-with-int-key", "12.2: keys must be str", b"\x81\x01\x02")
_invalid_body("body-with-bin-key", "12.2: keys must be str, not bin", b"\x81\xc4\x01a\x02")
_invalid_body("body-not-utf-8", "12.2: a str must be valid UTF-8", b"\xa2\xc3\x28")
_invalid_body(
    "body-nested-too-deep", "12.2: bodies have at most 32 levels of nesting", b"\x91" * 32 + b"\x90"
)
_invalid_body("body-empty", "6.1: a RESPONSE must have a body", b"")
_invalid_body(
    "body-with-huge-array-length",
    "12.2: an array of four billion elements in five bytes is refused",
    b"\xdd\xff\xff\xff\xff",
)


@scenario("body-32-deep", "12.2: a body with 32 levels of nesting is valid")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.in_flight.clear()
    peer.connection.send("RESPONSE", request.stream, b"\x91" * 31 + b"\x90")
    expected: list[Any] = []
    for _ in range(31):
        expected = [expected]
    await call.expect_result(expected)


@scenario("results-of-all-types", "12.2: values of every msgpack type reach the application unchanged")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for value in _VALUES:
        call = await peer.client.call("echo", {})
        peer.connection.respond(await peer.connection.expect_request("echo"), value)
        await call.expect_result(value)


@scenario("params-of-all-types", "12.2: values of every msgpack type reach the server unchanged")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    params = {f"v{number}": value for number, value in enumerate(_VALUES)}
    call = await peer.client.call("echo", params)
    request = await peer.connection.expect_request("echo")
    received = request.params
    for name, value in params.items():
        same = received.get(name) == value and type(received.get(name)) is type(value)
        expect(same, f"{value!r} was received as {received.get(name)!r}")
    peer.connection.respond(request, None)
    await call.expect_result(None)


_VALUES: Final[list[Any]] = [
    None,
    True,
    0,
    -1,
    2**53 - 1,
    2**53 + 1,
    2**64 - 1,
    -(2**63),
    0.5,
    struct.unpack("!d", bytes.fromhex("3ff199999999999a"))[0],
    "",
    "\u00e4\U0001f600\0",
    b"",
    bytes(range(256)),
    [],
    [1, [2, {"a": [b"\0"]}]],
    {},
    {"": {"nested": [None, False, -(2**40)]}},
]


@scenario(
    "call-without-params", "6.3: a call without params is a REQUEST whose params are nil or an empty map"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("time")
    request = await peer.connection.expect_request("time")
    expect(request.value[1] in (None, {}), f"the params are {request.value[1]!r}")
    expect(len(request.value) in (2, 3) and isinstance(request.meta, dict), f"the request is {request.value}")
    peer.connection.respond(request, 1)
    await call.expect_result(1)


# --- deadlines and cancellation ---------------------------------------------------------------------


@scenario("deadline-is-sent", "6.3: the remaining time of a call is sent as deadline_ms")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    timeout_ms = 1000 * round(harness.patience)
    call = await peer.client.call("sleep", {}, timeout_ms=timeout_ms)
    request = await peer.connection.expect_request("sleep")
    deadline = request.meta.get("deadline_ms")
    expect(isinstance(deadline, int) and 0 < deadline <= timeout_ms, f"deadline_ms is {deadline!r}")
    peer.connection.respond(request, {})
    await call.expect_result({})


@scenario(
    "deadline-at-the-client", "6.5, 14: a call past its deadline also ends at the client, and is cancelled"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for timeout_ms in (300, 3_000, 30_000):  # a slow client does not get to send its request
        call = await peer.client.call("sleep", {}, timeout_ms=timeout_ms)
        await call.expect_code(DEADLINE_EXCEEDED)
        peer.connection.send("PING")
        request = await peer.connection.next_frame("REQUEST sleep or PONG")
        if request.kind != "PONG":
            break
    expect(request.method == "sleep", f"received {request} instead of REQUEST sleep")
    expected = "CANCEL of a call past its deadline, and PONG"
    cancel, pong = [await peer.connection.next_frame(expected) for _ in range(2)]
    if cancel.kind == "PONG":
        cancel, pong = pong, cancel
    expect(pong.kind == "PONG", f"received {pong} instead of PONG")
    expect(
        cancel.kind == "CANCEL" and cancel.stream == request.stream,
        f"received {cancel} instead of its CANCEL",
    )
    peer.connection.respond(request, "too late")
    await peer.exchange()


@scenario("cancel", "6.5: CANCEL names the stream and carries the token of its request")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("sleep", {})
    other = await peer.client.call("echo", {})
    requests = [await peer.connection.next_frame("REQUEST") for _ in range(2)]
    request, other_request = sorted(requests, key=lambda each: str(each.method), reverse=True)  # in any order
    expect((request.method, other_request.method) == ("sleep", "echo"), f"received {requests}")
    await call.cancel()
    await call.expect_code(CANCELLED)
    cancel = await peer.connection.next_frame("CANCEL")
    expect(
        cancel.kind == "CANCEL" and cancel.stream == request.stream,
        f"received {cancel} instead of its CANCEL",
    )
    expect(cancel.token == request.token != NO_TOKEN, "CANCEL was sent with another token than its request")
    peer.connection.respond_error(request, CANCELLED)
    peer.connection.respond(other_request, "unaffected")
    await other.expect_result("unaffected")


@scenario("cancelled-call-stays-in-flight", "6.5: a cancelled request occupies its stream until its response")
async def _(harness: Harness) -> None:
    peer = await harness.connect(welcome={"max_streams": 1})
    call = await peer.client.call("sleep", {})
    request = await peer.connection.expect_request("sleep")
    await call.cancel()
    await call.expect_code(CANCELLED)
    cancel = await peer.connection.next_frame("CANCEL")
    expect(cancel.kind == "CANCEL", f"received {cancel} instead of CANCEL")
    following = await peer.client.call("echo", {})
    await peer.connection.expect_silence("while the one allowed request is in flight")
    peer.connection.respond_error(request, CANCELLED)
    peer.connection.respond(await peer.connection.expect_request("echo"), "next")
    await following.expect_result("next")


@scenario("traceparent-is-sent", "6.3: the traceparent of a call is sent")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {}, traceparent=TRACEPARENT)
    request = await peer.connection.expect_request("echo")
    expect(request.meta.get("traceparent") == TRACEPARENT, f"meta is {request.meta}")
    peer.connection.respond(request, None)
    await call.expect_result(None)


@scenario("request-above-max-frame", "6.2, 13: the client refuses a request above max_frame")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {"blob": b"z" * MAX_FRAME})
    error = await harness.step_error("expect", "call", "argument", call=call.name)
    expect(error.get("code") in (None, INVALID_ARGUMENT, RESOURCE_EXHAUSTED), f"the call ended with {error}")
    await peer.exchange()


@scenario("message-with-control-characters", "10: messages reach the application without control characters")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    body = pack([INVALID_ARGUMENT, "first\nlevel=error \x1b[2J\x9b31m\x7f\u202e last"])
    peer.connection.in_flight.pop(request.stream)
    peer.connection.send("ERROR", request.stream, body, token=request.token)
    error = await call.expect_code(INVALID_ARGUMENT)
    message = error.get("message")
    expect(isinstance(message, str) and message.isprintable(), f"the message is {message!r}")


# --- PING and events --------------------------------------------------------------------------------


@scenario("ping-is-answered", "6.6: each PING is answered by one PONG")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for _ in range(2):
        peer.connection.send("PING")
        pong = await peer.connection.next_frame("PONG")
        expect(pong.kind == "PONG", f"received {pong} instead of PONG")


_PINGS: Final = 7_500


@scenario("ping-flood", "6.6: a client queues at most one PONG for a server that reads nothing")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    peer.connection.limit_receive_buffer()
    pings = b"".join(peer.connection.frame_bytes("PING") for _ in range(_PINGS))
    await peer.connection.write_and_drain(pings)
    peer.connection.event("read", None)
    await peer.client.event()  # the client has answered, and nothing was read
    call = await peer.client.call("echo", {})
    pongs = 0
    while (frame := await peer.connection.next_frame("REQUEST echo")).kind == "PONG":
        pongs += 1
    expect(frame.method == "echo", f"received {frame} instead of REQUEST echo")
    expect(0 < pongs < _PINGS * 2 // 3, f"received {pongs} PONGs for {_PINGS} PINGs while nothing was read")
    peer.connection.respond(frame, {})
    await call.expect_result({})


@scenario("keepalive", "6.6: a client sends PING before the connection has been silent for idle_timeout_ms")
async def _(harness: Harness) -> None:
    peer = await harness.connect(welcome={"idle_timeout_ms": 1500})
    ping = await peer.connection.next_raw_frame("PING")
    expect(ping.kind == "PING", f"received {ping} instead of PING")
    peer.connection.send("PONG")
    await peer.exchange()


@scenario("unknown-event", "6.8: an unknown event has no effect on calls")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.event("weather.changed", [1, None])
    peer.connection.event("session.unheard_of", {"expires_at": "never"})
    peer.connection.respond(request, "unaffected")
    await call.expect_result("unaffected")


@scenario("events-are-delivered", "6.8: events are delivered to the application in order, with their data")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    events = [("first", {"n": 1}), ("second", [2**64 - 1, b"\0"]), ("first", None)]
    for name, data in events:
        peer.connection.event(name, data)
    for expected in events:
        event = await peer.client.event()
        expect(event == expected, f"the application received {event} instead of {expected}")
