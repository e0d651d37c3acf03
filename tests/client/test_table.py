"""Every row of the table of zcp1.md, section 11.1, against a scripted server."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.client.helpers import (
    Action,
    ReceivedRequest,
    ScriptedServer,
    client_of,
    cut,
    fail,
    goodbye,
    now,
    numbers,
    refreshable,
    scripted,
    token,
    turns,
)
from zcproto.errors import (
    CallError,
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
async def test_retry_delay_without_retry_after_doubles_to_30_s(server: ScriptedServer) -> None:
    server.script("echo", *[fail(Code.UNAVAILABLE)] * 12)
    async with client_of(server, random=numbers(0.999_999)) as client:
        await client.call("echo", timeout=None)
    times = [request.at for request in server.calls()]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30], rel=1e-3)


@scripted
async def test_deadline_of_each_attempt_is_what_is_left_of_the_timeout(server: ScriptedServer) -> None:
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=400), cut)
    async with client_of(server, random=numbers(0.0)) as client:
        server.delay = 1.0  # of the next connection
        await client.call("echo", timeout=2.0, idempotency_key="once")
    assert [request.meta.deadline_ms for request in server.calls()] == pytest.approx([2000, 1600, 600], abs=1)


@pytest.mark.parametrize("delay", [-5, "soon", None, True, 1.5])
@scripted
async def test_invalid_retry_after_is_ignored(server: ScriptedServer, delay: Any) -> None:
    server.script("echo", fail(Code.UNAVAILABLE, retry_after_ms=delay))
    async with client_of(server, random=numbers(0.0)) as client:
        await client.call("echo")
    first, second = server.calls()
    assert second.at == first.at


@scripted
async def test_session_limit_raises_at_once(server: ScriptedServer) -> None:
    server.script("session.open", fail(Code.RESOURCE_EXHAUSTED, limit=5))
    with pytest.raises(ResourceExhausted) as caught:
        await client_of(server)
    assert caught.value.details == {"limit": 5}
    assert len(server.requests) == 1


# --- GOAWAY before an answer: not run; retry on another connection -----------------------------------


def refuse_and_leave(request: ReceivedRequest) -> None:
    request.link.go_away("draining", 500)
    request.fail(Code.UNAVAILABLE, {"retry_after_ms": 100})


@pytest.mark.parametrize("action", [goodbye, refuse_and_leave])
@scripted
async def test_call_that_a_leaving_server_has_not_run_is_retried_on_the_next_connection(
    server: ScriptedServer, action: Action
) -> None:
    server.script("echo", action)
    async with client_of(server) as client:
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert len(server.links) == 2
        assert server.calls()[1].link is server.links[1]
        # after the 500 ms of GOAWAY, and jitter
        assert server.dialled[1] - start == pytest.approx(0.5 + 0.05)


@scripted
async def test_goaway_finishes_calls_in_flight_and_moves_new_ones(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        slow = await server.hold_call(client, x="slow")
        first = server.link
        first.go_away("draining", 0)
        assert await client.call("echo", x="new") == {"x": "new"}
        assert server.calls()[1].link is server.links[1]
        assert not slow.done()
        server.calls()[0].respond("old answer")
        assert await slow == "old answer"
        await turns()
        assert first.ended == "closed"  # by the client, because nothing is in flight on it


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
        session = await client.open_session()
        assert session.id == "session-2"
        assert client.session is session
        assert await client.call("echo", x=1) == {"x": 1}


# --- UNAUTHENTICATED with unknown_token: open another session after a delay, retry once ---------------

UNKNOWN_TOKEN = {"reason": "unknown_token"}


@scripted
async def test_unknown_token_opens_another_session_after_jitter_and_is_retried() -> None:
    server = ScriptedServer()
    server.session = refreshable()
    server.script("echo", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
    async with client_of(server, random=numbers(0.5)) as client:
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.methods == ["session.open", "echo", "session.open", "echo"]
        opened, retried = server.requests[2:]
        assert opened.at - start == pytest.approx(0.05)
        assert retried.token == token(2)
        assert client.session is not None
        assert client.session.id == "session-2"
    assert len(server.links) == 1


@scripted
async def test_second_unknown_token_raises(server: ScriptedServer) -> None:
    server.script("echo", *[fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN)] * 2)
    async with client_of(server) as client:
        with pytest.raises(Unauthenticated) as caught:
            await client.call("echo")
        assert caught.value.details == UNKNOWN_TOKEN
        assert server.methods == ["session.open", "echo"] * 2
        assert await client.call("echo", x=1) == {"x": 1}  # with the session that was opened


@scripted
async def test_call_whose_unknown_token_was_replaced_meanwhile_is_retried_without_another_session() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        slow = await server.hold_call(client, x="slow")
        held = server.calls()[0]
        server.script("echo", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
        await client.call("echo", x="fast")
        held.fail(Code.UNAUTHENTICATED, UNKNOWN_TOKEN)
        assert await slow == {"x": "slow"}
    assert len(server.calls("session.open")) == 2


@scripted
async def test_delay_of_new_sessions_doubles_until_one_has_lasted_5_s(server: ScriptedServer) -> None:
    async with client_of(server, random=numbers(0.5)) as client:
        delays = []
        for pause in (0, 1, 4.9, 0, 5.1, 0):
            await asyncio.sleep(pause)
            server.script("echo", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
            start = now()
            await client.call("echo")
            delays.append(server.calls("session.open")[-1].at - start)
    assert delays == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.05, 0.1])


@scripted
async def test_call_with_an_unknown_token_times_out_while_no_session_may_be_opened() -> None:
    server = ScriptedServer()
    server.script("echo", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
    async with client_of(server) as client:
        with pytest.raises(DeadlineExceeded, match="the server has lost the session"):
            await client.call("echo", timeout=0.04)
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods[:4] == ["session.open", "echo", "session.open", "echo"]


@scripted
async def test_refresh_with_an_unknown_token_opens_a_session_after_jitter(server: ScriptedServer) -> None:
    server.session = refreshable()
    server.script("echo", fail(Code.TOKEN_EXPIRED))
    server.script("session.refresh", fail(Code.UNAUTHENTICATED))
    async with client_of(server) as client:
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.methods == ["session.open", "echo", "session.refresh", "session.open", "echo"]
        assert server.requests[3].at - start == pytest.approx(0.05)


@scripted
async def test_unknown_token_on_a_new_connection_opens_a_session_before_the_next_call() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
        await server.lose()
        await asyncio.sleep(1)
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.methods == ["session.open", "session.info", "session.open", "echo"]


@scripted
async def test_handlers_are_registered_again_after_an_unknown_token_without_a_call() -> None:
    server = ScriptedServer(calls={"max": 32})
    client = client_of(server)

    @client.handler("approve")
    async def approve() -> None: ...

    async with client:
        server.script("session.handle", fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN))
        await server.lose()
        await asyncio.sleep(5)
        assert server.methods == [
            "session.open",
            "session.handle",
            "session.handle",
            "session.open",
            "session.handle",
        ]


# --- STALE_TIMESTAMP: correct the offset, retry at once, once ----------------------------------------


@scripted
async def test_stale_timestamp_corrects_the_clock_and_is_retried(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.ahead_ms = 3_600_000
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert now() == start
        assert await client.call("echo", x=2) == {"x": 2}
    assert len(server.calls()) == 3
    assert len(server.links) == 1


# --- TOKEN_EXPIRED: refresh or open, retry once ------------------------------------------------------


@scripted
async def test_expired_token_is_refreshed_and_the_call_retried(server: ScriptedServer) -> None:
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
async def test_token_expired_without_token_raises(server: ScriptedServer) -> None:
    server.script("server.info", fail(Code.TOKEN_EXPIRED))
    async with client_of(server, user=None) as client:
        with pytest.raises(TokenExpired):
            await client.call("server.info")


@pytest.mark.parametrize(
    ("refusal", "renewal"),
    [
        (fail(Code.TOKEN_EXPIRED), "session.refresh"),
        (fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN), "session.open"),
    ],
)
@scripted
async def test_concurrent_calls_share_one_renewal(
    server: ScriptedServer, refusal: Action, renewal: str
) -> None:
    server.session = refreshable()
    server.script("echo", *[refusal] * 20)
    async with client_of(server) as client:
        results = await asyncio.gather(*(client.call("echo", x=x) for x in range(20)))
    assert results == [{"x": x} for x in range(20)]
    assert [each for each in server.methods if each != "echo"] == ["session.open", renewal, "session.close"]
    assert len(server.calls()) == 40


@pytest.mark.parametrize("refusal", [fail(Code.TOKEN_EXPIRED), fail(Code.UNAUTHENTICATED, **UNKNOWN_TOKEN)])
@scripted
async def test_key_that_became_wrong_raises_in_every_later_call(
    server: ScriptedServer, refusal: Action
) -> None:
    server.script("echo", refusal)
    async with client_of(server) as client:
        server.script("session.open", fail(Code.UNAUTHENTICATED))
        for _ in range(3):
            with pytest.raises(Unauthenticated):
                await client.call("echo")
    assert server.methods == ["session.open", "echo", "session.open"]


# --- connection lost: may have run; retry only with an idempotency key -------------------------------


@scripted
async def test_lost_call_with_idempotency_key_is_retried(server: ScriptedServer) -> None:
    server.script("echo", cut, cut)
    async with client_of(server) as client:
        assert await client.call("echo", x=1, idempotency_key="order-7") == {"x": 1}
    assert [request.meta.idempotency_key for request in server.calls()] == ["order-7"] * 3
    assert len(server.links) == 3


@scripted
async def test_retries_with_idempotency_key_end_at_the_timeout(server: ScriptedServer) -> None:
    server.script("echo", *[cut] * 1_000)
    async with client_of(server) as client:
        start = now()
        with pytest.raises(ConnectionClosed):
            await client.call("echo", idempotency_key="k", timeout=10)
        assert now() - start < 10
        assert 5 < len(server.calls()) < 12  # increasingly delayed: the call may be what crashes the server
        server.scripts.clear()


# --- errors that are not retried, or once ------------------------------------------------------------


def leave_and_reset(request: ReceivedRequest) -> None:
    request.link.go_away()
    request.link.cut()


def fatal(code: Code) -> Action:
    return lambda request: request.link.fatal(code)


@pytest.mark.parametrize(
    ("action", "attempts", "error", "attributes"),
    [
        (fail(Code.RESOURCE_EXHAUSTED, limit=5), 1, ResourceExhausted, {"details": {"limit": 5}}),
        (fail(Code.STALE_TIMESTAMP), 2, StaleTimestamp, {}),
        (fail(Code.TOKEN_EXPIRED), 2, TokenExpired, {}),
        (fail(Code.UNAUTHENTICATED), 1, Unauthenticated, {}),
        (fail(Code.UNAUTHENTICATED, attach=True), 1, Unauthenticated, {}),
        (cut, 1, ConnectionClosed, {"clean": False, "reason": "connection_reset"}),
        (leave_and_reset, 1, ConnectionClosed, {"clean": False}),
        (lambda request: request.link.close_cleanly(), 1, ConnectionClosed, {"clean": True}),
        (fatal(Code.PROTOCOL_ERROR), 1, ConnectionClosed, {"code": Code.PROTOCOL_ERROR}),
        (fatal(Code.FRAME_TOO_LARGE), 1, ConnectionClosed, {"code": Code.FRAME_TOO_LARGE}),
        (fatal(Code.REPLAYED), 1, ConnectionClosed, {"code": Code.REPLAYED}),
    ],
)
@scripted
async def test_error_is_raised_after_so_many_attempts(
    server: ScriptedServer, action: Action, attempts: int, error: type[Exception], attributes: dict[str, Any]
) -> None:
    server.script("echo", *[action] * attempts)
    async with client_of(server) as client:
        with pytest.raises(error) as caught:
            await client.call("echo")
        assert len(server.calls()) == attempts
        assert await client.call("echo", x=1) == {"x": 1}
    assert {name: getattr(caught.value, name) for name in attributes} == attributes


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
async def test_other_error_raises_at_once_with_its_details(server: ScriptedServer, code: Code) -> None:
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
async def test_malformed_answer_raises_internal_for_its_call_only(server: ScriptedServer) -> None:
    def garbage(request: Any) -> None:
        request.link.send(0x01030000, request.stream, b"\xc1")

    server.script("echo", garbage)
    async with client_of(server) as client:
        broken = client.call("echo")
        fine = client.call("echo", x=1)
        results = await asyncio.gather(broken, fine, return_exceptions=True)
    assert isinstance(results[0], InternalError)
    assert results[1] == {"x": 1}
