"""SessionManager: when a session is refreshed, and when it falls back to opening one."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.client.helpers import (
    DAY_MS,
    Action,
    ReceivedRequest,
    ScriptedServer,
    client_of,
    cut,
    fail,
    now,
    numbers,
    refreshable,
    scripted,
    silence,
    token,
    turns,
)
from tests.helpers import WALL
from zcproto.errors import (
    CallError,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    SessionReplaced,
    TokenRevoked,
)

OPEN, REFRESH = "session.open", "session.refresh"
HOUR_S = 3_600
AFTER_REFRESH_S = 0.84 * HOUR_S


def refresh_token(number: int) -> bytes:
    return bytes([100 + number]) * 32


def hourly_server(*refresh: Action, **greeting: Any) -> ScriptedServer:
    """Return a server with sessions of an hour, and these actions for the first refreshes."""
    server = ScriptedServer(**greeting)
    server.session = refreshable(expires_at=lambda number: server.wall() + HOUR_S * 1000)
    server.script("session.refresh", *refresh)
    return server


def server_with_expired_token(*refresh: Action) -> ScriptedServer:
    """Return a server that refuses the first call's token, and these actions for the first refreshes."""
    server = ScriptedServer()
    server.session = refreshable()
    server.script("echo", fail(Code.TOKEN_EXPIRED))
    server.script("session.refresh", *refresh)
    return server


def cut_after(seconds: float) -> Action:
    """Reset the connection later, without an answer."""
    return lambda request: asyncio.get_running_loop().call_later(seconds, request.link.cut)


# --- early refresh -----------------------------------------------------------------------------------


@scripted
async def test_refresh_happens_at_80_percent_of_the_lifetime() -> None:
    server = hourly_server()
    async with client_of(server, random=numbers(0.0)) as client:
        start = now()
        await asyncio.sleep(3_500)
        (refresh,) = server.calls("session.refresh")
        assert refresh.at - start == pytest.approx(0.8 * 3_600, abs=1)
        assert refresh.params["refresh_token"] == refresh_token(1)
        await client.call("echo")
        assert server.calls()[0].token == token(2)
        assert client.session is not None
        assert client.session.refresh_token_bytes == refresh_token(2)
        await asyncio.sleep(10 * HOUR_S)
        assert 12 < len(server.calls("session.refresh")) < 15


@scripted
async def test_refresh_times_have_jitter() -> None:
    times = []
    for chance in (0.0, 0.5, 0.999):
        server = hourly_server()
        async with client_of(server, random=numbers(chance)):
            start = now()
            await asyncio.sleep(3_500)
            times.append((server.calls("session.refresh")[0].at - start) / 3_600)
    assert times == pytest.approx([0.8, 0.825, 0.85], abs=0.001)


@scripted
async def test_calls_wait_during_a_refresh() -> None:
    server = hourly_server(silence)
    async with client_of(server) as client:
        await asyncio.sleep(0.825 * 3_600 + 2)
        (refresh,) = server.calls("session.refresh")
        calls = [asyncio.create_task(client.call("echo", i=i)) for i in range(5)]
        await turns()
        assert server.calls() == []
        refresh.respond(server.opened())
        assert len(await asyncio.gather(*calls)) == 5
        assert {request.token for request in server.calls()} == {token(2)}


@scripted
async def test_refused_early_refresh_is_retried_later() -> None:
    server = hourly_server(fail(Code.UNAVAILABLE, retry_after_ms=100))
    async with client_of(server) as client:
        await asyncio.sleep(AFTER_REFRESH_S)
        assert len(server.calls("session.refresh")) == 1
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.calls()[0].token == token(1)
        await asyncio.sleep(0.12 * 3_600)
        assert len(server.calls("session.refresh")) == 2


@pytest.mark.parametrize(("session", "refreshes"), [(refreshable(), 1), ({}, 0)])
@scripted
async def test_session_expiring_event_triggers_a_refresh_if_there_is_a_token(
    server: ScriptedServer, session: dict[str, Any], refreshes: int
) -> None:
    server.session = session
    async with client_of(server) as client:
        server.link.event("session.expiring", {"expires_at": WALL}, token(1))
        await turns()
        assert server.methods == [OPEN, *[REFRESH] * refreshes]
        assert await client.call("echo", x=1) == {"x": 1}


# --- hostile servers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("can_refresh", [True, False])
@pytest.mark.parametrize("expired", [{"expires_at": lambda _: WALL - DAY_MS}, {"idle_timeout_ms": -1}])
@scripted
async def test_sessions_that_have_expired_already_are_renewed_with_backoff(
    expired: dict[str, Any], can_refresh: bool
) -> None:
    server = ScriptedServer()
    server.session = (refreshable() if can_refresh else {}) | expired
    with pytest.raises(DeadlineExceeded, match="expired sessions"):
        await client_of(server, timeout=60.0)
    assert 3 <= len(server.requests) <= 12
    intervals = [after.at - before.at for before, after in itertools.pairwise(server.requests)]
    assert min(intervals) >= 1.0


@scripted
async def test_short_sessions_are_refreshed_at_most_once_a_second(server: ScriptedServer) -> None:
    server.session = refreshable(expires_at=lambda _: server.wall() + 1_100)
    async with client_of(server):
        await asyncio.sleep(100)
        assert 50 <= len(server.calls("session.refresh")) <= 101


@scripted
async def test_flood_of_session_expiring_is_answered_once_a_second() -> None:
    server = hourly_server()
    async with client_of(server) as client:
        start = now()
        for _ in range(500):
            server.link.event("session.expiring", {"expires_at": WALL}, client.session.token_bytes)  # type: ignore[union-attr]
            await turns(10)
        assert len(server.calls("session.refresh")) == 1
        await asyncio.sleep(2)
        first, second = [refresh.at - start for refresh in server.calls("session.refresh")]
        assert first == 0.0
        assert second >= 1.0


@scripted
async def test_flood_of_session_revoked_is_checked_once(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        for _ in range(500):
            server.link.event("session.revoked", {"reason": "none"}, token(1))
            await turns(10)
        assert server.methods == ["session.open", "session.info"]
        assert await client.call("echo", x=1) == {"x": 1}


# --- required refresh --------------------------------------------------------------------------------


@scripted
async def test_expired_session_is_renewed_before_the_next_call(server: ScriptedServer) -> None:
    server.session = {"expires_at": lambda number: WALL + round((now() - 1_000) * 1000) + 60_000}
    async with client_of(server) as client:
        await asyncio.sleep(61)
        await client.call("echo")
    assert server.methods == ["session.open", "session.open", "echo", "session.close"]


@scripted
async def test_idle_session_is_refreshed_before_the_next_call(server: ScriptedServer) -> None:
    server.session = refreshable(idle_timeout_ms=60_000)
    async with client_of(server) as client:
        for _ in range(5):
            await asyncio.sleep(50)
            await client.call("echo")
        await asyncio.sleep(61)
        await client.call("echo", x=bytes(100_000))
    assert server.methods == ["session.open", *["echo"] * 5, "session.refresh", "echo", "session.close"]


@scripted
async def test_use_of_a_session_is_noted_again_after_a_part_of_its_idle_timeout() -> None:
    server = ScriptedServer()
    server.session = refreshable(idle_timeout_ms=60_000)
    async with client_of(server) as client:
        for _ in range(5):
            await asyncio.sleep(0.5)
            await client.call("echo")
        await asyncio.sleep(59)
        await client.call("echo")
    assert server.methods == ["session.open", *["echo"] * 6, "session.close"]


@pytest.mark.parametrize(
    ("actions", "methods"),
    [
        ([cut], [REFRESH, REFRESH]),
        ([cut, fail(Code.UNAVAILABLE)], [REFRESH, REFRESH, REFRESH]),
        ([cut_after(6)], [REFRESH, OPEN]),
        ([cut_after(3), cut_after(3), cut_after(3)], [REFRESH, REFRESH, OPEN]),
    ],
    ids=["lost", "lost, then refused", "lost after the grace", "lost again: the grace is that of the first"],
)
def test_lost_early_refresh_is_repeated_within_the_grace(actions: list[Action], methods: list[str]) -> None:
    @scripted
    async def run() -> None:
        server = hourly_server(*actions)
        async with client_of(server) as client:
            await asyncio.sleep(AFTER_REFRESH_S)
            assert await client.call("echo", x=1) == {"x": 1}
            assert server.methods == [OPEN, *methods, "echo"]
            assert server.calls()[0].token == token(2)
            refreshes = server.calls(REFRESH)
            assert {each.params["refresh_token"] for each in refreshes} == {refresh_token(1)}
            assert refreshes[-1].at - refreshes[0].at < 5

    run()


@scripted
async def test_refresh_token_is_not_reused_after_a_long_reconnect() -> None:
    server = hourly_server(cut)
    async with client_of(server, random=numbers(0.999)) as client:
        server.refuse = [ConnectionClosed("refused", clean=False)] * 8
        await asyncio.sleep(HOUR_S)
        assert server.dialled[-1] - server.calls("session.refresh")[0].at > 5
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "session.refresh", "session.open", "echo", "session.close"]


@scripted
async def test_grace_of_a_lost_refresh_lasts_through_further_renewals() -> None:
    server = server_with_expired_token(cut, cut, cut, cut)
    async with client_of(server) as client:
        with pytest.raises(ConnectionClosed):
            await client.call("echo")
        await asyncio.sleep(6)
        assert await client.call("echo", x=1) == {"x": 1}
    assert len(server.calls("session.refresh")) == 4
    assert len(server.calls("session.open")) == 2


def leave(request: ReceivedRequest) -> None:
    request.link.go_away("draining", 0)
    request.link.close_cleanly()


def leave_later(request: ReceivedRequest) -> None:
    request.link.go_away("draining", 0)
    asyncio.get_running_loop().call_later(6, request.link.close_cleanly)


SPENT = (Code.TOKEN_EXPIRED, Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED, Code.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(
    ("action", "renewal", "seconds", "links"),
    [
        *((fail(code), [REFRESH, OPEN], 0.0, 1) for code in SPENT),
        (silence, [REFRESH, OPEN], 10.0, 1),
        (fail(Code.UNAVAILABLE, retry_after_ms=300), [REFRESH, REFRESH], 0.3, 1),
        (cut, [REFRESH, REFRESH], 0.0, 2),
        (leave, [REFRESH, REFRESH], 0.0, 2),
        (leave_later, [REFRESH, REFRESH], 6.0, 2),  # it was not run: the grace does not begin
    ],
)
def test_required_refresh_is_repeated_or_falls_back_to_the_key(
    action: Action, renewal: list[str], seconds: float, links: int
) -> None:
    @scripted
    async def run() -> None:
        server = server_with_expired_token(action)
        async with client_of(server, random=numbers(0.0)) as client:
            start = now()
            assert await client.call("echo", x=1) == {"x": 1}
            assert now() - start == pytest.approx(seconds, abs=0.2)
        # without session.info: the token is not presented during a renewal
        assert server.methods == [OPEN, "echo", *renewal, "echo", "session.close"]
        assert len(server.links) == links

    run()


REFUSED = {Code.TOKEN_REVOKED: TokenRevoked, Code.SESSION_REPLACED: SessionReplaced}


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize(("code", "error"), REFUSED.items())
@scripted
async def test_refused_refresh_raises_and_is_not_retried(
    code: Code, error: type[CallError], is_early: bool
) -> None:
    server = (hourly_server if is_early else server_with_expired_token)(fail(code))
    async with client_of(server) as client:
        await asyncio.sleep(AFTER_REFRESH_S if is_early else 0)
        for _ in range(3):
            with pytest.raises(error):
                await client.call("echo")
        assert client.session is None
        assert server.methods == [OPEN, *([] if is_early else ["echo"]), REFRESH]
        await client.open_session()
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_failed_refresh_raises_and_the_next_call_retries() -> None:
    server = server_with_expired_token(fail(Code.NOT_FOUND))
    async with client_of(server) as client:
        with pytest.raises(CallError):
            await client.call("echo")
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods[:4] == [OPEN, "echo", REFRESH, REFRESH]


@scripted
async def test_renewal_waits_for_a_full_connection() -> None:
    server = hourly_server(max_streams=1)
    async with client_of(server) as client:
        call = await server.hold_call(client, timeout=None)
        await asyncio.sleep(AFTER_REFRESH_S)
        assert server.calls("session.refresh") == []
        server.link.go_away("draining", 0)  # the waiting request moves to the next connection
        await asyncio.sleep(1)
        assert server.calls("session.refresh")[0].link is server.links[1]
        server.calls()[0].respond()
        await call


@pytest.mark.parametrize("code", [Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED])
@scripted
async def test_error_of_an_old_token_does_not_concern_the_session(code: Code) -> None:
    server = hourly_server()
    async with client_of(server) as client:
        call = await server.hold_call(client, x=1, timeout=None)
        await asyncio.sleep(AFTER_REFRESH_S)
        server.calls()[0].fail(code)
        assert await call == {"x": 1}
        assert len(server.calls("session.refresh")) == 1
        assert [request.token for request in server.calls()] == [token(1), token(2)]


@scripted
async def test_close_during_renewal_fails_waiting_calls() -> None:
    server = server_with_expired_token(silence)
    client = await client_of(server)
    call = asyncio.create_task(client.call("echo"))
    await turns()
    await client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        await call
    assert server.link.cancelled == [request.stream for request in server.calls("session.refresh")]
