"""GOAWAY, lost connections, and which calls are retried."""

from __future__ import annotations

import asyncio
from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE
from zcproto_conformance.connection import QUIET
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import ConnectedClient, Harness

scenario: Final = Scenarios(SCRIPTED)

_MANY: Final = 10
_MANY_SECONDS: Final = 2.0
_HOUR_MS: Final = 3_600_000
_DELAY_MS: Final = 500
"""A retry_after_ms that is clearly distinguishable from no delay."""


@scenario(
    "goaway-with-calls-in-flight", "6.7: requests in flight at GOAWAY are still answered on that connection"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.goaway()
    peer.connection.respond(request, "still answered")
    await call.expect_result("still answered")


@scenario("goaway-and-new-calls", "6.7: after GOAWAY new requests use another connection")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    old = await peer.client.call("sleep", {})
    request = await peer.connection.expect_request("sleep")
    peer.connection.goaway()
    await peer.connection.sync()
    new = await peer.client.call("echo", {})
    connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("echo"), "new connection")
    await new.expect_result("new connection")
    await peer.connection.expect_silence("on a draining connection")
    peer.connection.respond(request, "old connection")
    await old.expect_result("old connection")


@scenario("goaway-retry-after", "6.7: a client does not reconnect before retry_after_ms")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    loop = asyncio.get_running_loop()
    until = loop.time() + _DELAY_MS / 1000 * 0.8
    peer.connection.goaway(retry_after_ms=_DELAY_MS)
    await peer.connection.sync()
    call = await peer.client.call("echo", {})
    if (remaining := until - loop.time()) > 0:  # on a busy machine the time may be over
        await harness.server.expect_no_connection("before retry_after_ms", remaining)
    connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("echo"), "later")
    await call.expect_result("later")


@scenario(
    "goaway-and-another-address",
    "11.1, 11.2: a client with several addresses goes on at another one without waiting for retry_after_ms",
)
async def _(harness: Harness) -> None:
    _, _, port = harness.server.address.rpartition(":")
    peer = await harness.connect_with_session(address=f"{harness.server.address},localhost:{port}")
    assert peer.session is not None
    old = await peer.client.call("sleep", {})
    request = await peer.connection.expect_request("sleep")
    peer.connection.goaway(retry_after_ms=_HOUR_MS)
    connection = await harness.next_resumed(peer.session)
    new = await peer.client.call("echo", {})
    connection.respond(await connection.expect_request("echo"), "another address")
    await new.expect_result("another address")
    peer.connection.respond(request, "old connection")
    await old.expect_result("old connection")


@scenario("goaway-twice", "16: GOAWAY may be sent more than once")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.goaway("idle")
    peer.connection.goaway("draining")
    peer.connection.respond(request, "still answered")
    await call.expect_result("still answered")


@scenario(
    "goaway-then-clean-end",
    "11.1, 16: a request without a response before a clean end did not run, and is retried",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"n": 1})
    await peer.connection.expect_request("echo")
    peer.connection.goaway()
    peer.connection.close()
    connection = await harness.next_welcomed()
    again = await connection.expect_request("echo")
    expect(again.params == {"n": 1}, f"the call was retried with params {again.params}")
    connection.respond(again, "after all")
    await call.expect_result("after all")


@scenario(
    "goaway-then-truncated",
    "11.1, 16: a request lost by truncation after GOAWAY may have run, and is not retried",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.goaway()
    peer.connection.truncate()
    await call.expect_lost(clean=False)


@scenario(
    "lost-call-without-idempotency-key",
    "11.1: a call without an idempotency key is not retried after its connection was lost",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.truncate()
    await call.expect_lost()
    following = await peer.client.call("time")
    connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("time"), 1)
    await following.expect_result(1)
    await connection.expect_silence("after a call that was lost")


@scenario(
    "lost-call-with-idempotency-key",
    "11.1: a call with an idempotency key is retried after its connection was lost",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"n": 1}, idempotency_key="order-7")
    connection = peer.connection
    for _ in range(2):
        request = await connection.expect_request("echo")
        expect(request.meta.get("idempotency_key") == "order-7", f"meta is {request.meta}")
        expect(request.params == {"n": 1}, f"the params are {request.params}")
        connection.truncate()
        connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("echo"), "once")
    await call.expect_result("once")


@scenario(
    "reconnect-after-network-failure", "11.1: calls on a destroyed connection fail; the next call reconnects"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    await peer.client.cut()
    await call.expect_lost(clean=False)
    following = await peer.client.call("time")
    connection = await harness.next_welcomed()
    connection.respond(await connection.expect_request("time"), 1)
    await following.expect_result(1)


@scenario("reconnect-backoff", "11.2: a client whose connections keep failing reconnects ever more slowly")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    await peer.connection.truncate_and_wait()
    call = await peer.client.call("echo", {}, idempotency_key="again")
    before = harness.server.connection_count
    try:
        async with asyncio.timeout(_MANY_SECONDS):
            # With full jitter this takes minutes; about one run in 100,000 is faster than the timeout.
            while harness.server.connection_count - before < _MANY:
                (await harness.next_welcomed()).truncate()
    except TimeoutError:
        await call.cancel()
        return
    raise CheckFailed(f"the client connected {_MANY} times in {_MANY_SECONDS:g} s")


@scenario(
    "reconnect-backoff-after-answers",
    "11.2: a client whose connections end soon after a response reconnects ever more slowly",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    connection = peer.connection
    until = asyncio.get_running_loop().time() + _MANY_SECONDS
    for _ in range(_MANY):
        await connection.truncate_and_wait()
        call = await peer.client.call("echo", {}, idempotency_key="again")
        try:
            async with asyncio.timeout_at(until):
                connection = await harness.next_welcomed()
        except TimeoutError:
            await call.cancel()
            return
        connection.respond(await connection.expect_request("echo"), "answered")
        await call.expect_result("answered")
    raise CheckFailed(f"the client connected {_MANY} times in {_MANY_SECONDS:g} s")


# --- silent servers ---------------------------------------------------------------------------------

_TIMEOUT_MS: Final = 1_500
"""Timeout of a call that gets no answer: longer than the second of silence before its PING."""

_ANSWER_WITHIN: Final = 2.0
"""Seconds from the PING of a client until it connects to another address."""


async def _silent_server(harness: Harness) -> ConnectedClient:
    """Connect a client with two addresses, let a call time out, and return after its CANCEL and a PING."""
    _, _, port = harness.server.address.rpartition(":")
    peer = await harness.connect_with_session(address=f"{harness.server.address},localhost:{port}")
    late = await peer.client.call("sleep", {}, timeout_ms=_TIMEOUT_MS)
    await late.expect_code(DEADLINE_EXCEEDED)
    awaited = {"CANCEL", "PING"}  # in either order
    while awaited:
        awaited.discard((await peer.connection.next_raw_frame(" and ".join(sorted(awaited)))).kind)
    return peer


@scenario(
    "silent-server-and-another-address",
    "6.6, 11.2: calls of a server that does not answer PING are lost, and continue at another address",
)
async def _(harness: Harness) -> None:
    peer = await _silent_server(harness)
    repeated = await peer.client.call("echo", {"n": 1}, idempotency_key="order-7")
    lost = await peer.client.call("time")
    await asyncio.sleep(_ANSWER_WITHIN)
    connection = await harness.next_resumed(peer.session)
    again = await connection.expect_request("echo")
    expect(again.params == {"n": 1}, f"the call was repeated with params {again.params}")
    connection.respond(again, "another address")
    await repeated.expect_result("another address")
    await lost.expect_lost(clean=False)


@scenario("slow-server-and-another-address", "6.6: a client stays at a server that answers its PING")
async def _(harness: Harness) -> None:
    peer = await _silent_server(harness)
    call = await peer.client.call("echo", {})
    peer.connection.send("PONG")
    request = await peer.connection.expect_request("echo")
    await harness.server.expect_no_connection("beside a server that answers PING", _ANSWER_WITHIN + QUIET)
    peer.connection.respond(request, "still here")
    await call.expect_result("still here")


# --- errors with retry_after_ms ---------------------------------------------------------------------


async def _retried(harness: Harness, code: int) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"n": 1})
    for _ in range(2):
        request = await peer.connection.expect_request("echo")
        peer.connection.respond_error(request, code, {"retry_after_ms": 20})
    again = await peer.connection.expect_request("echo")
    expect(again.params == {"n": 1}, f"the call was retried with params {again.params}")
    peer.connection.respond(again, "at last")
    await call.expect_result("at last")


@scenario("unavailable", "11.1: UNAVAILABLE is retried until the deadline of the call")
async def _(harness: Harness) -> None:
    await _retried(harness, UNAVAILABLE)


@scenario("resource-exhausted", "11.1: RESOURCE_EXHAUSTED without limit is retried")
async def _(harness: Harness) -> None:
    await _retried(harness, RESOURCE_EXHAUSTED)


@scenario("retry-after", "11.1: a call is not retried before retry_after_ms")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.respond_error(request, UNAVAILABLE, {"retry_after_ms": _DELAY_MS})
    await peer.connection.expect_silence("before retry_after_ms", _DELAY_MS / 1000 * 0.8)
    peer.connection.respond(await peer.connection.expect_request("echo"), "later")
    await call.expect_result("later")


@scenario("retry-within-deadline", "11.1: all retries happen within the deadline of the call")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {}, timeout_ms=500)
    ended = asyncio.create_task(call.expect_code(UNAVAILABLE, DEADLINE_EXCEEDED))
    sent = asyncio.create_task(peer.connection.expect_request("echo"))
    await asyncio.wait({ended, sent}, return_when=asyncio.FIRST_COMPLETED)
    if not sent.cancel():  # a slow client does not get to send it
        peer.connection.respond_error(await sent, UNAVAILABLE, {"retry_after_ms": 600_000})
    await ended


@scenario(
    "retry-reduces-deadline", "6.3, 11.1: the deadline_ms of a retry is what is left of the call's timeout"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    timeout_ms = 1000 * round(harness.patience) + _DELAY_MS
    call = await peer.client.call("echo", {}, timeout_ms=timeout_ms)
    first = await peer.connection.expect_request("echo")
    peer.connection.respond_error(first, UNAVAILABLE, {"retry_after_ms": _DELAY_MS})
    again = await peer.connection.expect_request("echo")
    before, left = first.meta.get("deadline_ms"), again.meta.get("deadline_ms")
    expect(
        isinstance(before, int) and isinstance(left, int) and left <= before - _DELAY_MS * 0.8,
        f"deadline_ms is {left} after a delay of {_DELAY_MS} ms, and was {before} before",
    )
    peer.connection.respond(again, "later")
    await call.expect_result("later")


@scenario("limit-reached", "11.1: RESOURCE_EXHAUSTED with limit is reported to the application")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(
        await peer.connection.expect_request("echo"), RESOURCE_EXHAUSTED, {"limit": 5}
    )
    await call.expect_code(RESOURCE_EXHAUSTED)
    await peer.connection.expect_silence("after an error that must not be retried")


@scenario("other-errors-are-not-retried", "11.1: INTERNAL, UNKNOWN, ABORTED and others are never retried")
async def _(harness: Harness) -> None:
    peer: ConnectedClient = await harness.connect()
    for code in (2, 10, 13, 15):
        call = await peer.client.call("echo", {}, idempotency_key=f"key-{code}")
        peer.connection.respond_error(await peer.connection.expect_request("echo"), code)
        await call.expect_code(code)
        await peer.connection.expect_silence("after an error that must not be retried", QUIET / 3)
