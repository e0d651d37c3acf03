"""Calls: streams, deadlines, cancelling, errors, events, what bodies may hold."""

from __future__ import annotations

import struct
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import expect
from zcproto_conformance.link import MAX_FRAME, NO_TOKEN, pack
from zcproto_conformance.stage import Stage

scenario: Final = Scenarios(SCRIPTED)

CANCELLED: Final = 1
UNKNOWN: Final = 2
INVALID_ARGUMENT: Final = 3
DEADLINE_EXCEEDED: Final = 4
NOT_FOUND: Final = 5
INTERNAL: Final = 13
TRACEPARENT: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@scenario("answers-out-of-order", "6.4: answers are matched by their stream, never by their order")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    calls = await joined.client.calls("echo", 5)
    for request in reversed(await joined.link.requests("echo", 5)):
        joined.link.answer(request, request.params)
    for number, call in enumerate(calls):
        await call.gives({"n": number})


@scenario("answer-to-nothing", "6.4: an answer on a stream that is not in flight is dropped")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.send("RESPONSE", request.stream + 1000, b"\xc0")
    joined.link.send("ERROR", request.stream + 1001, pack([INTERNAL, "nobody asked"]))
    joined.link.answer(request, "asked for")
    await call.gives("asked for")


@scenario("answered-twice", "6.4: a second answer to a request is dropped")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    first = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.answer(request, "first")
    await first.gives("first")
    joined.link.answer(request, "second")
    await joined.exchange()


@scenario("error-codes", "10.1: each code of an ERROR reaches the application, with message and details")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for code in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15):
        call = await joined.client.call("echo", {})
        joined.link.refuse(await joined.link.request("echo"), code, {"why": code})
        error = await call.refused(code)
        expect(error.get("message") == "refused by the script", f"the message is {error.get('message')!r}")
        expect(error.get("details") == {"map": {"why": code}}, f"the details are {error.get('details')}")
    await joined.link.quiet("after errors that are for the application alone")


@scenario("error-without-details", "6.4: details may be absent or nil")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for body in ([NOT_FOUND, "no such thing"], [NOT_FOUND, "no such thing", None]):
        call = await joined.client.call("echo", {})
        request = await joined.link.request("echo")
        joined.link.in_flight.clear()
        joined.link.send("ERROR", request.stream, pack(body))
        error = await call.refused(NOT_FOUND)
        expect(error.get("details") in (None, {"map": {}}), f"the details are {error.get('details')}")


@scenario("unknown-code", "6.4: a code that a client does not know is an error of the call like UNKNOWN")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), 200)
    await call.refused(UNKNOWN, 200)
    await joined.exchange()


# --- bodies -----------------------------------------------------------------------------------------


def _unreadable(name: str, proves: str, body: bytes) -> None:
    """A call whose answer no client may take; it fails, and the connection goes on."""

    @scenario(name, f"{proves}; the call fails as INTERNAL, and the connection goes on")
    async def _(stage: Stage) -> None:
        joined = await stage.joined()
        call = await joined.client.call("echo", {})
        request = await joined.link.request("echo")
        joined.link.in_flight.clear()
        joined.link.send("RESPONSE", request.stream, body)
        await call.refused(INTERNAL)
        await joined.exchange()


_unreadable("body-no-msgpack", "12.2: a body is one msgpack value", b"\x92\x01")
_unreadable("body-with-more-behind", "12.2: bytes behind the value are refused", b"\xc0\xc0")
_unreadable("body-with-an-ext-type", "12.2: ext types are refused", b"\xd4\x05\x00")
_unreadable("body-with-a-timestamp", "12.2: msgpack's timestamp is an ext type", b"\xd6\xff\x00\x00\x00\x00")
_unreadable("body-with-an-int-key", "12.2: keys are str", b"\x81\x01\x02")
_unreadable("body-with-a-bin-key", "12.2: keys are str, and bin is none", b"\x81\xc4\x01a\x02")
_unreadable("body-not-utf-8", "12.2: a str is valid UTF-8", b"\xa2\xc3\x28")
_unreadable("body-too-deep", "12.2: bodies are nested at most 32 deep", b"\x91" * 32 + b"\x90")
_unreadable("body-empty", "6.1: a RESPONSE has a body", b"")
_unreadable(
    "body-that-promises-too-much",
    "12.2: an array of four billion elements in five bytes is refused",
    b"\xdd\xff\xff\xff\xff",
)


@scenario("body-32-deep", "12.2: a body that is nested 32 deep is good")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.in_flight.clear()
    joined.link.send("RESPONSE", request.stream, b"\x91" * 31 + b"\x90")
    wanted: list[Any] = []
    for _ in range(31):
        wanted = [wanted]
    await call.gives(wanted)


@scenario("results-of-all-types", "12.2: every type of msgpack reaches the application as it was")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for value in _VALUES:
        call = await joined.client.call("echo", {})
        joined.link.answer(await joined.link.request("echo"), value)
        await call.gives(value)


@scenario("params-of-all-types", "12.2: every type of msgpack reaches the server as it was")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    params = {f"v{number}": value for number, value in enumerate(_VALUES)}
    call = await joined.client.call("echo", params)
    request = await joined.link.request("echo")
    got = request.params
    for name, value in params.items():
        same = got.get(name) == value and type(got.get(name)) is type(value)
        expect(same, f"{value!r} came as {got.get(name)!r}")
    joined.link.answer(request, None)
    await call.gives(None)


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
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("time")
    request = await joined.link.request("time")
    expect(request.value[1] in (None, {}), f"the params are {request.value[1]!r}")
    expect(len(request.value) in (2, 3) and isinstance(request.meta, dict), f"the request is {request.value}")
    joined.link.answer(request, 1)
    await call.gives(1)


# --- deadlines and cancelling -----------------------------------------------------------------------


@scenario("deadline-travels", "6.3: the time that a call has goes with it as deadline_ms")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    timeout_ms = 1000 * round(stage.patience)
    call = await joined.client.call("sleep", {}, timeout_ms=timeout_ms)
    request = await joined.link.request("sleep")
    deadline = request.meta.get("deadline_ms")
    expect(isinstance(deadline, int) and 0 < deadline <= timeout_ms, f"deadline_ms is {deadline!r}")
    joined.link.answer(request, {})
    await call.gives({})


@scenario(
    "deadline-of-the-client", "6.5, 14: a call whose time is over ends at the client too, and is cancelled"
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("sleep", {}, timeout_ms=300)
    request = await joined.link.request("sleep")
    await call.refused(DEADLINE_EXCEEDED)
    cancel = await joined.link.frame("CANCEL of a call whose time is over")
    expect(
        cancel.kind == "CANCEL" and cancel.stream == request.stream, f"{cancel} came instead of its CANCEL"
    )
    joined.link.answer(request, "too late")
    await joined.exchange()


@scenario("cancel", "6.5: CANCEL names the stream and carries the token of its request")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("sleep", {})
    other = await joined.client.call("echo", {})
    request, beside = await joined.link.request("sleep"), await joined.link.request("echo")
    await call.cancel()
    await call.refused(CANCELLED)
    cancel = await joined.link.frame("CANCEL")
    expect(
        cancel.kind == "CANCEL" and cancel.stream == request.stream, f"{cancel} came instead of its CANCEL"
    )
    expect(cancel.token == request.token != NO_TOKEN, "CANCEL came with another token than its request")
    joined.link.refuse(request, CANCELLED)
    joined.link.answer(beside, "undisturbed")
    await other.gives("undisturbed")


@scenario("cancelled-is-in-flight", "6.5: a cancelled request takes its place until its answer has come")
async def _(stage: Stage) -> None:
    joined = await stage.joined(welcome={"max_streams": 1})
    call = await joined.client.call("sleep", {})
    request = await joined.link.request("sleep")
    await call.cancel()
    await call.refused(CANCELLED)
    cancel = await joined.link.frame("CANCEL")
    expect(cancel.kind == "CANCEL", f"{cancel} came instead of CANCEL")
    following = await joined.client.call("echo", {})
    await joined.link.quiet("while the one allowed request is in flight")
    joined.link.refuse(request, CANCELLED)
    joined.link.answer(await joined.link.request("echo"), "next")
    await following.gives("next")


@scenario("traceparent-travels", "6.3: traceparent goes with the call")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {}, traceparent=TRACEPARENT)
    request = await joined.link.request("echo")
    expect(request.meta.get("traceparent") == TRACEPARENT, f"meta is {request.meta}")
    joined.link.answer(request, None)
    await call.gives(None)


@scenario("request-above-max-frame", "6.2, 13: a request above max_frame is refused at the client")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {"blob": b"z" * MAX_FRAME})
    error = await stage.refused("expect", "call", "argument", call=call.name)
    expect(error.get("code") in (None, INVALID_ARGUMENT, 8), f"the call ended with {error}")
    await joined.exchange()


# --- PING and events --------------------------------------------------------------------------------


@scenario("ping-is-answered", "6.6: each PING is answered by one PONG")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for _ in range(2):
        joined.link.send("PING")
        pong = await joined.link.frame("PONG")
        expect(pong.kind == "PONG", f"{pong} came instead of PONG")


@scenario("keepalive", "6.6: a client sends PING before a silence has lasted for idle_timeout_ms")
async def _(stage: Stage) -> None:
    joined = await stage.joined(welcome={"idle_timeout_ms": 1500})
    ping = await joined.link.any_frame("PING in a silence")
    expect(ping.kind == "PING", f"{ping} came instead of PING")
    joined.link.send("PONG")
    await joined.exchange()


@scenario("unknown-event", "6.8: an event that a client does not know disturbs nothing")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.event("weather.changed", [1, None])
    joined.link.event("session.unheard_of", {"expires_at": "never"})
    joined.link.answer(request, "undisturbed")
    await call.gives("undisturbed")


@scenario("events-are-told", "6.8: the application is told of events, in their order, with their data")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    said = [("first", {"n": 1}), ("second", [2**64 - 1, b"\0"]), ("first", None)]
    for name, data in said:
        joined.link.event(name, data)
    for wanted in said:
        told = await joined.client.event()
        expect(told == wanted, f"the application was told {told} instead of {wanted}")
