"""Timeout, cancellation and sent frames of calls, against a scripted server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.client.helpers import (
    ScriptedServer,
    client_of,
    fail,
    now,
    numbers,
    ok,
    scripted,
    silence,
    turns,
)
from zcproto.client.client import Client
from zcproto.errors import (
    CallError,
    Code,
    DeadlineExceeded,
    Unavailable,
)

# --- timeout and cancellation -----------------------------------------------------------------------


@scripted
async def test_timeout_sends_cancel_for_its_call_only(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        start = now()
        other = await server.hold_call(client, timeout=60)
        server.script("echo", silence)
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=2.0)
        assert 2.0 <= now() - start <= 2.2
        await turns()
        assert server.link.cancelled == [server.calls()[1].stream]
        server.calls()[1].fail(Code.CANCELLED)  # too late
        server.calls()[0].respond("fine")
        assert await other == "fine"


@scripted
async def test_cancelled_task_sends_cancel_for_its_call_only(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        victim, other = [await server.hold_call(client) for _ in range(2)]
        victim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await victim
        await turns()
        assert server.link.cancelled == [server.calls()[0].stream]
        server.calls()[0].respond("too late")
        server.calls()[1].respond("fine")
        assert await other == "fine"


@scripted
async def test_call_cancelled_in_the_turn_of_its_answer_sends_no_cancel(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        for answer in (lambda: server.calls()[0].respond(1), lambda: server.calls()[1].fail(Code.NOT_FOUND)):
            victim = await server.hold_call(client)
            victim.cancel()
            answer()
            with pytest.raises(asyncio.CancelledError):
                await victim
        await turns()
        assert server.link.cancelled == []
        victim = await server.hold_call(client)
        victim.cancel()
        server.link.cut()
        with pytest.raises(asyncio.CancelledError):
            await victim


@scripted
async def test_sent_deadline_shrinks_with_each_attempt(server: ScriptedServer) -> None:
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=2_000))
    async with client_of(server, random=numbers(0.0)) as client:
        await client.call("echo", timeout=10)
        await client.call("echo", timeout=None)
        await client.call("echo")
        await client.call("echo", timeout=1e300)
    deadlines = [request.meta.deadline_ms for request in server.calls()]
    assert deadlines == [10_000, 8_000, None, 30_000, 2**53]


@scripted
async def test_retry_that_is_due_at_the_deadline_is_not_awaited(server: ScriptedServer) -> None:
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=1_000))
    async with client_of(server, random=numbers(0.0)) as client:
        start = now()
        with pytest.raises(Unavailable):
            await client.call("echo", timeout=1.0)
        assert now() == start


@pytest.mark.parametrize("seconds", [0, -1, 0.0])
@scripted
async def test_zero_timeout_sends_nothing(server: ScriptedServer, seconds: float) -> None:
    async with client_of(server) as client:
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=seconds)
    assert server.calls() == []


@scripted
async def test_call_without_timeout_waits_indefinitely(server: ScriptedServer) -> None:
    server.script("echo", silence)
    async with client_of(server, timeout=None) as client:
        call = asyncio.create_task(client.call("echo"))
        await asyncio.sleep(86_400 * 0.7)
        assert not call.done()
        server.calls()[0].respond("at last")
        assert await call == "at last"


# --- sent frames -------------------------------------------------------------------------------------


@scripted
async def test_params_by_name_and_by_mapping_are_merged(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        assert await client.call("echo", {"timeout": 1, "method": "x"}) == {"timeout": 1, "method": "x"}
        assert await client.call("echo", {"a": 1}, b=2) == {"a": 1, "b": 2}
        assert await client.call("echo", method="y", params=[1]) == {"method": "y", "params": [1]}
        assert await client.call("echo") == {}


@scripted
async def test_traceparent_is_sent(server: ScriptedServer) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client_of(server) as client:
        await client.call("echo", traceparent=parent, timeout=None)
    assert server.calls()[0].meta.traceparent == parent


@scripted
async def test_unencodable_params_are_refused_locally(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        with pytest.raises(CallError, match="cannot be sent"):
            await client.call("echo", x=object())
        with pytest.raises(CallError, match="accepts at most 1048576"):
            await client.call("echo", x=bytes(1_048_576))
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_calls_of_one_turn_share_a_write(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        before = server.writes
        await asyncio.gather(*[client.call("echo", i=i) for i in range(50)])
        assert server.writes - before == 1


@scripted
async def test_calls_beyond_max_streams_wait_in_order() -> None:
    server = ScriptedServer(max_streams=3)
    server.script("echo", *[silence] * 7)
    async with client_of(server) as client:
        tasks = [asyncio.create_task(client.call("echo", i=i)) for i in range(7)]
        await turns()
        assert [request.params["i"] for request in server.calls()] == [0, 1, 2]
        tasks[4].cancel()
        server.calls()[1].respond()
        await turns()
        assert [request.params["i"] for request in server.calls()][3:] == [3]
        for request in server.calls():
            request.respond()
        await turns()
        assert [request.params["i"] for request in server.calls()][4:] == [5, 6]
        for request in server.calls()[4:]:
            request.respond()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results.pop(4), asyncio.CancelledError)
        assert results == [None] * 6


async def _started(client: Client, count: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(client.call("echo", i=i)) for i in range(count)]
    await turns()
    return tasks


@scripted
async def test_full_transport_delays_calls(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.link.pause()
        tasks = await _started(client, 3)
        assert server.calls() == []
        server.link.resume()
        assert await asyncio.gather(*tasks) == [{"i": 0}, {"i": 1}, {"i": 2}]


@scripted
async def test_large_requests_are_written_before_the_end_of_the_turn(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        before = server.writes
        await asyncio.gather(*[client.call("echo", x=bytes(100_000)) for _ in range(3)])
        assert server.writes - before >= 3


@scripted
async def test_cancelled_waiter_passes_its_turn_on() -> None:
    server = ScriptedServer(max_streams=1)
    server.script("echo", silence, ok(), ok())
    async with client_of(server) as client:
        first, second, third = await _started(client, 3)
        server.calls()[0].respond()  # wakes the second, which is cancelled before it runs
        second.cancel()
        await first
        await third
        assert second.cancelled() or second.cancelling()
        assert [request.params["i"] for request in server.calls()] == [0, 2]
