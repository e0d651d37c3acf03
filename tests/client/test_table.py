"""Every row of the table of zcp1.md, section 11.1, against a scripted server."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.client.helpers import (
    ScriptedServer,
    client_of,
    cut,
    fail,
    goodbye,
    now,
    numbers,
    ok,
    refreshable,
    scripted,
    silence,
    turns,
)
from zcproto.client.client import Client
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    InternalError,
    ResourceExhausted,
    SessionReplaced,
    StaleTimestamp,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
    Unavailable,
    UnknownError,
)

# --- UNAVAILABLE, RESOURCE_EXHAUSTED: not run; retry after retry_after_ms and jitter ------------------


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
@scripted
async def test_refused_call_is_retried_after_retry_after_and_jitter(code: Code) -> None:
    server = ScriptedServer()
    server.script("echo", fail(code, retry_after_ms=200), fail(code, retry_after_ms=200))
    async with client_of(server, random=numbers(0.5)) as client:
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
    times = [request.at - start for request in server.calls()]
    # full jitter up to 100 ms, then 200 ms, in addition to retry_after_ms
    assert times == pytest.approx([0, 0.25, 0.25 + 0.3])
    assert len(server.links) == 1


@scripted
async def test_retry_delay_without_retry_after_doubles_to_30_s() -> None:
    server = ScriptedServer()
    server.script("echo", *[fail(Code.UNAVAILABLE)] * 12)
    async with client_of(server, random=numbers(0.999_999)) as client:
        await client.call("echo", timeout=None)
    times = [request.at for request in server.calls()]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30], rel=1e-3)


@scripted
async def test_retry_delay_beyond_the_timeout_raises_the_error() -> None:
    server = ScriptedServer()
    server.script("echo", *[fail(Code.UNAVAILABLE, retry_after_ms=900)] * 5)
    async with client_of(server) as client:
        start = now()
        with pytest.raises(Unavailable):
            await client.call("echo", timeout=1.0)
        assert now() - start < 1.0
    assert len(server.calls()) == 2


@pytest.mark.parametrize("delay", [-5, "soon", None, True, 1.5])
@scripted
async def test_invalid_retry_after_is_ignored(delay: Any) -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=delay))
    async with client_of(server, random=numbers(0.0)) as client:
        await client.call("echo")
    first, second = server.calls()
    assert second.at == first.at


@scripted
async def test_session_limit_raises_at_once() -> None:
    server = ScriptedServer()
    server.script("session.open", fail(Code.RESOURCE_EXHAUSTED, limit=5))
    with pytest.raises(ResourceExhausted) as caught:
        await client_of(server)
    assert caught.value.details == {"limit": 5}
    assert len(server.requests) == 1


@scripted
async def test_resource_exhausted_with_limit_raises_for_any_call() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.RESOURCE_EXHAUSTED, limit=5))
    async with client_of(server) as client:
        with pytest.raises(ResourceExhausted):
            await client.call("echo")
    assert len(server.calls()) == 1


# --- GOAWAY before an answer: not run; retry on another connection -----------------------------------


@scripted
async def test_call_without_answer_after_goaway_and_clean_close_is_retried() -> None:
    server = ScriptedServer()
    server.script("echo", goodbye)
    async with client_of(server) as client:
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert len(server.links) == 2
        assert server.calls()[1].link is server.links[1]
        # after the 500 ms of GOAWAY, and jitter
        assert server.dialled[1] - start == pytest.approx(0.5 + 0.05)


@scripted
async def test_call_without_answer_after_goaway_and_reset_raises() -> None:
    server = ScriptedServer()

    def reset(request: Any) -> None:
        request.link.go_away()
        request.link.cut()

    server.script("echo", reset)
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.call("echo")
        assert not caught.value.clean
    assert len(server.calls()) == 1


@scripted
async def test_goaway_finishes_calls_in_flight_and_moves_new_ones() -> None:
    server = ScriptedServer()
    server.script("echo", silence)
    async with client_of(server) as client:
        slow = asyncio.create_task(client.call("echo", x="slow"))
        await turns()
        first = server.link
        first.go_away("draining", 0)
        assert await client.call("echo", x="new") == {"x": "new"}
        assert server.calls()[1].link is server.links[1]
        assert not slow.done()
        server.calls()[0].respond("old answer")
        assert await slow == "old answer"
        await turns()
        assert first.ended == "closed"  # by the client, because nothing is in flight on it


@scripted
async def test_unavailable_on_a_draining_connection_is_retried_on_the_next() -> None:
    server = ScriptedServer()

    def refuse(request: Any) -> None:
        request.link.go_away("draining", 100)
        request.fail(Code.UNAVAILABLE, {"retry_after_ms": 100})

    server.script("echo", refuse)
    async with client_of(server) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.calls()[1].link is server.links[1]


# --- UNAUTHENTICATED, TOKEN_REVOKED, SESSION_REPLACED: raised, no automatic retry --------------------


@pytest.mark.parametrize(
    ("code", "error"), [(Code.TOKEN_REVOKED, TokenRevoked), (Code.SESSION_REPLACED, SessionReplaced)]
)
@scripted
async def test_revoked_session_raises_in_every_later_call(code: Code, error: type[CallError]) -> None:
    server = ScriptedServer()
    server.script("echo", fail(code))
    async with client_of(server) as client:
        for _ in range(3):
            with pytest.raises(error):
                await client.call("echo")
        assert client.session is None
        assert server.methods == ["session.open", "echo"]
        server.link.cut()
        await asyncio.sleep(100)
        with pytest.raises(error):
            await client.call("echo")
    assert len(server.links) == 1  # no automatic reconnect


@scripted
async def test_application_opens_a_new_session_after_revocation() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.SESSION_REPLACED))
    async with client_of(server) as client:
        with pytest.raises(SessionReplaced):
            await client.call("echo")
        server.link.cut()
        session = await client.open_session()
        assert session.id == "session-2"
        assert client.session is session
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_unauthenticated_raises_without_retry() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.UNAUTHENTICATED), fail(Code.UNAUTHENTICATED, attach=True))
    async with client_of(server) as client:
        for _ in range(2):
            with pytest.raises(Unauthenticated):
                await client.call("echo")
        assert server.methods == ["session.open", "echo", "echo"]
        assert await client.call("echo", x=1) == {"x": 1}  # the method itself may have refused the first call


@scripted
async def test_wrong_key_raises_without_retry() -> None:
    server = ScriptedServer()
    server.script("session.open", fail(Code.UNAUTHENTICATED))
    client = client_of(server)
    with pytest.raises(Unauthenticated):
        await client.open()
    assert server.methods == ["session.open"]
    assert server.link.ended


@scripted
async def test_key_that_became_wrong_raises_in_every_later_call() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.TOKEN_EXPIRED))
    async with client_of(server) as client:
        server.script("session.open", fail(Code.UNAUTHENTICATED))
        for _ in range(3):
            with pytest.raises(Unauthenticated):
                await client.call("echo")
    assert server.methods == ["session.open", "echo", "session.open"]


# --- STALE_TIMESTAMP: correct the offset, retry at once, once ----------------------------------------


@scripted
async def test_stale_timestamp_corrects_the_clock_and_is_retried() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.ahead_ms = 3_600_000
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert now() == start
        assert await client.call("echo", x=2) == {"x": 2}
    assert len(server.calls()) == 3
    assert len(server.links) == 1


@scripted
async def test_second_stale_timestamp_raises() -> None:
    server = ScriptedServer()
    server.script("echo", *[fail(Code.STALE_TIMESTAMP)] * 3)
    async with client_of(server) as client:
        with pytest.raises(StaleTimestamp):
            await client.call("echo")
    assert len(server.calls()) == 2


# --- TOKEN_EXPIRED: refresh or open, retry once ------------------------------------------------------


@scripted
async def test_expired_token_is_refreshed_and_the_call_retried() -> None:
    server = ScriptedServer()
    server.session = refreshable()
    server.script("echo", fail(Code.TOKEN_EXPIRED))
    async with client_of(server) as client:
        assert await client.call("echo", x=1) == {"x": 1}
        refresh = server.calls("session.refresh")[0]
        assert refresh.params["refresh_token"] == bytes([101]) * 32
        assert refresh.token == bytes(32)
        assert server.calls()[1].token == bytes([2]) * 32
    assert server.methods == ["session.open", "echo", "session.refresh", "echo", "session.close"]
    assert len(server.links) == 1


@scripted
async def test_expired_token_without_refresh_token_opens_a_session() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.TOKEN_EXPIRED))
    async with client_of(server) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "echo", "session.open", "echo", "session.close"]


@scripted
async def test_second_expired_token_raises() -> None:
    server = ScriptedServer()
    server.script("echo", *[fail(Code.TOKEN_EXPIRED)] * 3)
    async with client_of(server) as client:
        with pytest.raises(TokenExpired):
            await client.call("echo")
    assert len(server.calls()) == 2


@scripted
async def test_token_expired_without_token_raises() -> None:
    server = ScriptedServer()
    server.script("server.info", fail(Code.TOKEN_EXPIRED))
    async with client_of(server, user=None) as client:
        with pytest.raises(TokenExpired):
            await client.call("server.info")


@scripted
async def test_concurrent_calls_with_expired_token_share_one_refresh() -> None:
    server = ScriptedServer()
    server.session = refreshable()
    server.script("echo", *[fail(Code.TOKEN_EXPIRED)] * 20)
    async with client_of(server) as client:
        results = await asyncio.gather(*[client.call("echo", i=i) for i in range(20)])
    assert results == [{"i": i} for i in range(20)]
    assert len(server.calls("session.refresh")) == 1
    assert len(server.calls()) == 40


# --- connection lost: may have run; retry only with an idempotency key -------------------------------


@scripted
async def test_lost_connection_raises_because_the_call_may_have_run() -> None:
    server = ScriptedServer()
    server.script("echo", cut)
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.call("echo")
        assert caught.value.reason == "connection_reset"
        assert not caught.value.clean
        assert await client.call("echo", x=1) == {"x": 1}
    assert len(server.calls()) == 2


@scripted
async def test_lost_call_with_idempotency_key_is_retried() -> None:
    server = ScriptedServer()
    server.script("echo", cut, cut)
    async with client_of(server) as client:
        assert await client.call("echo", x=1, idempotency_key="order-7") == {"x": 1}
    assert [request.meta.idempotency_key for request in server.calls()] == ["order-7"] * 3
    assert len(server.links) == 3


@scripted
async def test_clean_close_without_goaway_is_a_loss() -> None:
    server = ScriptedServer()
    server.script("echo", lambda request: request.link.close_cleanly())
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.call("echo")
        assert caught.value.clean


@pytest.mark.parametrize("code", [Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE, Code.REPLAYED])
@scripted
async def test_fatal_error_is_a_loss_with_its_code(code: Code) -> None:
    server = ScriptedServer()
    server.script("echo", lambda request: request.link.fatal(code))
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.call("echo")
        assert caught.value.code is code


@scripted
async def test_retries_with_idempotency_key_end_at_the_timeout() -> None:
    server = ScriptedServer()
    server.script("echo", *[cut] * 1_000)
    async with client_of(server) as client:
        start = now()
        with pytest.raises(ConnectionClosed):
            await client.call("echo", idempotency_key="k", timeout=10)
        assert now() - start < 10
        assert 5 < len(server.calls()) < 12  # increasingly delayed: the call may be what crashes the server
        server.scripts.clear()


# --- other errors: raised ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in Code
        if code
        not in {
            Code.UNAVAILABLE,
            Code.RESOURCE_EXHAUSTED,
            Code.STALE_TIMESTAMP,
            Code.TOKEN_EXPIRED,
            Code.TOKEN_REVOKED,
            Code.SESSION_REPLACED,
        }
    ],
)
@scripted
async def test_other_error_raises_at_once_with_its_details(code: Code) -> None:
    server = ScriptedServer()
    server.script("echo", fail(code, field="name"))
    async with client_of(server) as client:
        with pytest.raises(CallError) as caught:
            await client.call("echo", idempotency_key="k")
        assert caught.value.details == {"field": "name"}
        assert caught.value.message.startswith("because")
        kind = CallError.by_code.get(code, UnknownError)
        assert type(caught.value) is kind
    assert len(server.calls()) == 1


@scripted
async def test_malformed_answer_raises_internal_for_its_call_only() -> None:
    server = ScriptedServer()

    def garbage(request: Any) -> None:
        request.link.send(0x01030000, request.stream, b"\xc1")

    server.script("echo", garbage)
    async with client_of(server) as client:
        broken = client.call("echo")
        fine = client.call("echo", x=1)
        results = await asyncio.gather(broken, fine, return_exceptions=True)
    assert isinstance(results[0], InternalError)
    assert results[1] == {"x": 1}


# --- timeout and cancellation------------------------------------------------------------------------


@scripted
async def test_timeout_sends_cancel_for_its_call_only() -> None:
    server = ScriptedServer()
    server.script("echo", silence, silence)
    async with client_of(server) as client:
        start = now()
        other = asyncio.create_task(client.call("echo", x="other", timeout=60))
        await turns()
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=2.0)
        assert 2.0 <= now() - start <= 2.2
        await turns()
        assert server.link.cancelled == [server.calls()[1].stream]
        server.calls()[1].fail(Code.CANCELLED)  # too late
        server.calls()[0].respond("fine")
        assert await other == "fine"


@scripted
async def test_cancelled_task_sends_cancel_for_its_call_only() -> None:
    server = ScriptedServer()
    server.script("echo", silence, silence)
    async with client_of(server) as client:
        victim = asyncio.create_task(client.call("echo", x="victim"))
        other = asyncio.create_task(client.call("echo", x="other"))
        await turns()
        victim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await victim
        await turns()
        assert server.link.cancelled == [server.calls()[0].stream]
        server.calls()[0].respond("too late")
        server.calls()[1].respond("fine")
        assert await other == "fine"


@scripted
async def test_call_cancelled_in_the_turn_of_its_answer_sends_no_cancel() -> None:
    server = ScriptedServer()
    server.script("echo", silence, silence, silence)
    async with client_of(server) as client:
        for answer in (lambda: server.calls()[0].respond(1), lambda: server.calls()[1].fail(Code.NOT_FOUND)):
            victim = asyncio.create_task(client.call("echo"))
            await turns()
            victim.cancel()
            answer()
            with pytest.raises(asyncio.CancelledError):
                await victim
        await turns()
        assert server.link.cancelled == []
        victim = asyncio.create_task(client.call("echo"))
        await turns()
        victim.cancel()
        server.link.cut()
        with pytest.raises(asyncio.CancelledError):
            await victim


@scripted
async def test_server_deadline_and_cancel_errors_are_raised() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.DEADLINE_EXCEEDED), fail(Code.CANCELLED))
    async with client_of(server) as client:
        with pytest.raises(DeadlineExceeded, match="because"):
            await client.call("echo")
        with pytest.raises(Cancelled, match="because"):
            await client.call("echo")


@scripted
async def test_sent_deadline_shrinks_with_each_attempt() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=2_000))
    async with client_of(server, random=numbers(0.0)) as client:
        await client.call("echo", timeout=10)
        await client.call("echo", timeout=None)
        await client.call("echo")
        await client.call("echo", timeout=1e300)
    deadlines = [request.meta.deadline_ms for request in server.calls()]
    assert deadlines == [10_000, 8_000, None, 30_000, 2**53]


@pytest.mark.parametrize("seconds", [0, -1, 0.0])
@scripted
async def test_zero_timeout_sends_nothing(seconds: float) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=seconds)
    assert server.calls() == []


@scripted
async def test_call_without_timeout_waits_indefinitely() -> None:
    server = ScriptedServer()
    server.script("echo", silence)
    async with client_of(server, timeout=None) as client:
        call = asyncio.create_task(client.call("echo"))
        await asyncio.sleep(86_400 * 0.7)
        assert not call.done()
        server.calls()[0].respond("at last")
        assert await call == "at last"


# --- sent frames -------------------------------------------------------------------------------------


@scripted
async def test_params_by_name_and_by_mapping_are_merged() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        assert await client.call("echo", {"timeout": 1, "method": "x"}) == {"timeout": 1, "method": "x"}
        assert await client.call("echo", {"a": 1}, b=2) == {"a": 1, "b": 2}
        assert await client.call("echo", method="y", params=[1]) == {"method": "y", "params": [1]}
        assert await client.call("echo") == {}


@scripted
async def test_traceparent_is_sent() -> None:
    server = ScriptedServer()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client_of(server) as client:
        await client.call("echo", traceparent=parent, timeout=None)
    assert server.calls()[0].meta.traceparent == parent


@scripted
async def test_unencodable_params_are_refused_locally() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        with pytest.raises(CallError, match="cannot be sent"):
            await client.call("echo", x=object())
        with pytest.raises(CallError, match="accepts at most 1048576"):
            await client.call("echo", x=bytes(1_048_576))
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_calls_of_one_turn_share_a_write() -> None:
    server = ScriptedServer()
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
async def test_full_transport_delays_calls() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.link.pause()
        tasks = await _started(client, 3)
        assert server.calls() == []
        server.link.resume()
        assert await asyncio.gather(*tasks) == [{"i": 0}, {"i": 1}, {"i": 2}]


@scripted
async def test_large_requests_are_written_before_the_end_of_the_turn() -> None:
    server = ScriptedServer()
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
