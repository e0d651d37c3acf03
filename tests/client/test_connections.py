"""ConnectionManager: when a client connects and reconnects."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.client.helpers import (
    ScriptedServer,
    client_of,
    fail,
    now,
    numbers,
    scripted,
    silence,
    turns,
)
from zcproto.client.connections import IDLE_REASONS
from zcproto.client.dial import _resources
from zcproto.client.endpoints import STABLE_AFTER
from zcproto.errors import (
    CannotConnect,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    SessionReplaced,
    TlsError,
    TokenRevoked,
)

PERMANENT = [
    "certificate_untrusted",
    "certificate_expired",
    "certificate_name_mismatch",
    "pin_mismatch",
    "no_application_protocol",
    "unsupported_version",
    "no_shared_parameters",
    "wrong_parameters",
    "not_tls",
    "peer_rejected_certificate",
    "sts_policy",
]


# --- the first connection ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [CannotConnect("refused"), ConnectionClosed("cut"), TlsError("disconnected"), TlsError("pin_mismatch")],
)
@scripted
async def test_first_failed_attempt_raises_its_error(server: ScriptedServer, error: Exception) -> None:
    server.refuse = [error]
    with pytest.raises(type(error)) as caught:
        await client_of(server)
    assert caught.value is error
    assert len(server.dialled) == 1


@scripted
async def test_first_attempt_is_repeated_after_goaway(caplog: pytest.LogCaptureFixture) -> None:
    server = ScriptedServer()
    server.on_welcome = [lambda link: link.go_away("draining", 1_000), lambda link: None]
    async with client_of(server, random=numbers(0.0)) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    first, second = server.dialled
    assert second - first == pytest.approx(1.0, rel=1e-3)
    assert not caplog.messages


@pytest.mark.parametrize(("retry_after_ms", "seconds"), [(4_000, 0), (4_000, 3), (3_600_000, 10)])
@scripted
async def test_goaway_is_raised_if_the_server_asks_to_wait_beyond_the_start_timeout(
    retry_after_ms: int, seconds: float
) -> None:
    server = ScriptedServer()
    server.on_welcome = [lambda link: link.go_away("draining", retry_after_ms)]
    with pytest.raises(CannotConnect, match="going away"):
        await client_of(server, start_timeout=seconds)
    assert server.link.ended
    assert len(server.dialled) == 1


@scripted
async def test_close_right_after_welcome_raises(server: ScriptedServer) -> None:
    server.on_welcome = [lambda link: link.fatal(Code.PROTOCOL_ERROR)]
    with pytest.raises(ConnectionClosed) as caught:
        await client_of(server)
    assert caught.value.code is Code.PROTOCOL_ERROR


# --- a server that is starting -----------------------------------------------------------------------


def refused(count: int) -> list[Exception]:
    return [CannotConnect("refused", refused=True) for _ in range(count)]


@scripted
async def test_refused_first_attempt_is_repeated_until_the_server_listens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ScriptedServer()
    server.refuse = refused(8)
    start = now()
    async with client_of(server, random=numbers(0.999_999)) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    assert len(server.dialled) == 9
    pauses = [later - earlier for earlier, later in itertools.pairwise(server.dialled)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1, 1, 1, 1], rel=1e-3)
    assert now() - start < 10
    assert caplog.messages == [
        "server.example:7443: nothing listens there yet; waiting up to 10 s for the server to start"
    ]


@pytest.mark.parametrize("seconds", [0, 3, 10])
@scripted
async def test_refusal_is_raised_after_the_start_timeout(server: ScriptedServer, seconds: float) -> None:
    server.refuse = refused(1000)
    start = now()
    with pytest.raises(CannotConnect):
        await client_of(server, start_timeout=seconds)
    assert seconds - 1 <= now() - start <= seconds


@scripted
async def test_other_error_of_a_server_that_has_started_is_raised(server: ScriptedServer) -> None:
    server.refuse = [*refused(3), TlsError("disconnected")]
    with pytest.raises(TlsError):
        await client_of(server)
    assert len(server.dialled) == 4


@scripted
async def test_waiting_for_the_start_does_not_delay_the_first_reconnect(server: ScriptedServer) -> None:
    server.refuse = refused(8)
    async with client_of(server, random=numbers(0.999_999)) as client:
        lost_at = now()
        await server.lose()
        await client.call("echo")
        assert server.dialled[-1] - lost_at == pytest.approx(0.1, rel=1e-3)


@scripted
async def test_closing_a_client_ends_its_wait(server: ScriptedServer) -> None:
    server.refuse = refused(1000)
    client = client_of(server)
    opening = asyncio.create_task(client.open())
    await asyncio.sleep(2)
    await client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        await opening


# --- reconnect ---------------------------------------------------------------------------------------


@scripted
async def test_reconnect_presents_the_token_of_the_same_session(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        await server.lose()
        await asyncio.sleep(1)
        assert len(server.links) == 2
        assert server.methods == ["session.open", "session.info"]
        assert server.requests[1].token == server.requests[0].link.server.calls("session.info")[0].token
        assert server.requests[1].token == bytes([1]) * 32
        assert client.session is not None
        assert client.session.id == "session-1"


@scripted
async def test_reconnect_delays_double_from_100_ms_to_30_s(server: ScriptedServer) -> None:
    async with client_of(server, random=numbers(0.999_999)) as client:
        server.refuse = [CannotConnect("refused")] * 12
        lost_at = now()
        await server.lose()
        await client.call("echo", timeout=None)
    pauses = [later - earlier for earlier, later in itertools.pairwise([lost_at, *server.dialled[1:]])]
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30, 30]
    assert pauses == pytest.approx(expected, rel=1e-3)


@scripted
async def test_reconnect_jitter_may_be_zero(server: ScriptedServer) -> None:
    async with client_of(server, random=numbers(0.0)) as client:
        server.refuse = [CannotConnect("refused")] * 12
        start = now()
        await server.lose()
        await client.call("echo")
        assert now() == start


@scripted
async def test_connection_that_lasts_resets_the_backoff(server: ScriptedServer) -> None:
    async with client_of(server, random=numbers(0.999_999)) as client:
        server.refuse = [CannotConnect("refused")] * 5
        await server.lose()
        await client.call("echo")
        await asyncio.sleep(STABLE_AFTER)
        lost_at = now()
        await server.lose()
        await client.call("echo")
        assert server.dialled[-1] - lost_at == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("goes_away", [False, True])
@scripted
async def test_answered_connection_that_ends_early_does_not_reset_the_backoff(goes_away: bool) -> None:
    server = ScriptedServer()
    async with client_of(server, random=numbers(0.999_999)) as client:
        lost_at = []
        for _ in range(4):
            await client.call("echo")
            await turns()
            lost_at.append(now())
            if goes_away:
                server.link.go_away("draining", 0)
            await server.lose()
        await client.call("echo")
    pauses = [again - lost for lost, again in zip(lost_at, server.dialled[1:], strict=True)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8], rel=1e-3)


@scripted
async def test_goaway_before_the_connection_is_used_does_not_reset_the_backoff() -> None:
    server = ScriptedServer()
    async with client_of(server, random=numbers(0.999_999)) as client:
        await asyncio.sleep(STABLE_AFTER)
        server.on_welcome = [lambda link: link.go_away("draining", 0)] * 3
        lost_at = now()
        await server.lose()
        await client.call("echo", timeout=None)
    assert server.dialled[-1] - lost_at == pytest.approx(0.1 + 0.2 + 0.4 + 0.8, rel=1e-3)


@pytest.mark.parametrize("failure", ["disconnected", "handshake_timeout", "connection_reset", "truncated"])
@scripted
async def test_transient_tls_failure_is_retried(server: ScriptedServer, failure: str) -> None:
    async with client_of(server) as client:
        server.refuse = [TlsError(failure)]
        await server.lose()
        assert await client.call("echo", x=1) == {"x": 1}


@pytest.mark.parametrize("failure", PERMANENT)
@scripted
async def test_permanent_tls_failure_raises_in_all_waiting_calls(failure: str) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.refuse = [TlsError(failure)]
        await server.lose()
        calls = [client.call("echo") for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [TlsError] * 3
        assert len(server.dialled) == 2
        assert await client.call("echo", x=1) == {"x": 1}  # the next call retries


@scripted
async def test_concurrent_calls_share_one_connection_attempt(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        await server.lose()
        results = await asyncio.gather(*[client.call("echo", i=i) for i in range(50)])
        assert results == [{"i": i} for i in range(50)]
        assert len(server.dialled) == 2


@scripted
async def test_cancelled_call_does_not_cancel_the_shared_attempt(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.refuse = [CannotConnect("refused")] * 3
        await server.lose()
        first = asyncio.create_task(client.call("echo"))
        second = asyncio.create_task(client.call("echo", x=2))
        await turns()
        first.cancel()
        assert await second == {"x": 2}
        assert first.cancelled()


@scripted
async def test_timeout_without_connection_names_the_cause(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.refuse = [CannotConnect("server.example:7443: Connection refused")] * 1_000
        await server.lose()
        start = now()
        with pytest.raises(DeadlineExceeded, match="Connection refused"):
            await client.call("echo", timeout=3)
        assert now() - start == pytest.approx(3)


# --- GOAWAY ------------------------------------------------------------------------------------------


@scripted
async def test_reconnect_after_goaway_waits_for_retry_after(server: ScriptedServer) -> None:
    async with client_of(server):
        start = now()
        server.link.go_away("draining", 2_000)
        await asyncio.sleep(10)
        assert server.dialled[1] - start == pytest.approx(2 + 0.05)
        assert server.methods == ["session.open", "session.info"]


@scripted
async def test_goaway_retry_after_is_limited_to_an_hour(server: ScriptedServer) -> None:
    async with client_of(server):
        start = now()
        server.link.go_away("draining", 2**40)
        await asyncio.sleep(2 * 3_600)
        assert server.dialled[1] - start == pytest.approx(3_600, abs=1)


@pytest.mark.parametrize("reason", sorted(IDLE_REASONS))
@scripted
async def test_idle_close_reconnects_with_the_next_call(server: ScriptedServer, reason: str) -> None:
    async with client_of(server) as client:
        server.link.go_away(reason, 0)
        server.link.close_cleanly()
        await asyncio.sleep(1_000)
        assert len(server.dialled) == 1
        start = now()
        await client.call("echo")
        assert now() == start
        assert len(server.dialled) == 2


@scripted
async def test_second_goaway_is_ignored(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        call = await server.hold_call(client)
        first = server.link
        first.go_away("draining", 0)
        first.go_away("draining", 0)
        await asyncio.sleep(1)
        assert len(server.dialled) == 2
        server.calls()[0].respond("done")
        assert await call == "done"


@scripted
async def test_goaway_with_welcome_is_retried_later(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        await server.lose()
        server.on_welcome = [lambda link: link.go_away("draining", 1_000)]
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert now() - start >= 1
        assert len(server.links) == 3


@scripted
async def test_lost_old_connection_fails_only_its_own_calls(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        old_call = await server.hold_call(client)
        old = server.link
        old.go_away("draining", 0)
        await client.call("echo")
        old.cut()
        with pytest.raises(ConnectionClosed):
            await old_call
        await asyncio.sleep(1)
        assert len(server.links) == 2


# --- no automatic reconnect --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"), [(Code.TOKEN_REVOKED, TokenRevoked), (Code.SESSION_REPLACED, SessionReplaced)]
)
@scripted
async def test_no_reconnect_after_the_session_was_revoked(code: Code, error: type[Exception]) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", fail(code))
        await server.lose()
        await asyncio.sleep(10)
        assert len(server.links) == 2  # it reconnected and got TOKEN_REVOKED
        await server.lose()
        await asyncio.sleep(1_000)
        assert len(server.links) == 2
        with pytest.raises(error):
            await client.call("echo")
        assert client.session is None


# --- keepalive ---------------------------------------------------------------------------------------


@scripted
async def test_idle_connection_sends_ping() -> None:
    server = ScriptedServer(idle_timeout_ms=300_000)
    async with client_of(server):
        start = now()
        await asyncio.sleep(1_000)
        times = [at - start for at in server.link.pings]
        assert len(times) >= 9
        assert times == pytest.approx([100 * (i + 1) for i in range(len(times))], abs=1)
        assert len(server.links) == 1


@scripted
async def test_ping_behind_bytes_that_are_being_sent_is_not_late() -> None:
    server = ScriptedServer(idle_timeout_ms=30_000)
    async with client_of(server) as client:
        call = await server.hold_call(client, timeout=None)
        server.answers_pings = False
        link = server.links[0]
        link.unsent = 100
        asyncio.get_running_loop().call_later(15, setattr, link, "unsent", 50)
        with pytest.raises(ConnectionClosed, match="did not answer a PING"):
            await call
        assert now() - link.pings[0] == pytest.approx(20, abs=1)


@scripted
async def test_missing_pong_closes_the_connection_after_10_s() -> None:
    server = ScriptedServer(idle_timeout_ms=30_000)
    async with client_of(server) as client:
        call = await server.hold_call(client, timeout=None)
        server.answers_pings = False
        with pytest.raises(ConnectionClosed, match="did not answer a PING") as caught:
            await call
        assert not caught.value.clean
        assert server.links[0].ended == "aborted"
        first_ping = server.links[0].pings[0]
        assert now() - first_ping == pytest.approx(10, abs=1)
        server.answers_pings = True
        assert await client.call("echo", x=1) == {"x": 1}
        assert len(server.links) == 2


# --- the end -----------------------------------------------------------------------------------------


@scripted
async def test_close_ends_the_session_and_fails_waiting_calls(server: ScriptedServer) -> None:
    client = await client_of(server)
    call = await server.hold_call(client)
    await client.close()
    with pytest.raises(ConnectionClosed, match="closed by this client") as caught:
        await call
    assert caught.value.clean
    assert server.methods[-1] == "session.close"
    assert server.link.ended == "closed"
    with pytest.raises(ConnectionClosed, match="closed"):
        await client.call("echo")
    await client.close()
    assert client.session is None


@scripted
async def test_close_while_connecting_fails_waiting_calls(server: ScriptedServer) -> None:
    client = await client_of(server)
    server.refuse = [CannotConnect("refused")] * 100
    await server.lose()
    call = asyncio.create_task(client.call("echo", timeout=None))
    await asyncio.sleep(0.2)
    await client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        await call


@scripted
async def test_close_ends_old_connections(server: ScriptedServer) -> None:
    client = await client_of(server)
    call = await server.hold_call(client, idempotency_key="k")
    server.link.go_away("draining", 0)
    await asyncio.sleep(1)
    await client.close()
    with pytest.raises(ConnectionClosed):
        await call
    assert [link.ended for link in server.links] == ["closed", "closed"]


@scripted
async def test_close_waits_for_connections_closed_by_the_server(server: ScriptedServer) -> None:
    server.lingers = 1.5
    client = await client_of(server)
    goaway_at = now()
    server.link.go_away("idle", 0)
    server.link.close_cleanly()
    await turns()
    assert not server.link.gone
    await client.close()
    assert server.link.gone
    assert now() - goaway_at == pytest.approx(1.5)


@scripted
async def test_cancelled_close_aborts_connections(server: ScriptedServer) -> None:
    server.lingers = 1.5
    client = await client_of(server)
    server.link.go_away("draining", 0)
    await asyncio.sleep(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await client.close()
    await turns(1)
    assert [link.gone for link in server.links] == [True, True]
    assert _resources == {}


@scripted
async def test_close_waits_two_seconds_for_session_close(server: ScriptedServer) -> None:
    server.script("session.close", silence)
    client = await client_of(server)
    start = now()
    await client.close()
    assert now() - start == pytest.approx(2, abs=0.2)
    assert server.link.ended


@scripted
async def test_close_without_connection_returns_at_once(server: ScriptedServer) -> None:
    client = await client_of(server)
    server.link.go_away("idle", 0)
    await turns()
    await client.close()
    assert len(server.links) == 1


@scripted
async def test_call_waiting_on_a_draining_connection_moves_to_the_next(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.link.pause()
        call = asyncio.create_task(client.call("echo", x=1))
        await turns()
        server.link.go_away("draining", 0)
        assert await call == {"x": 1}
        assert server.calls()[0].link is server.links[1]


@scripted
async def test_closed_client_does_not_connect(server: ScriptedServer) -> None:
    client = await client_of(server)
    await client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        await client.call("echo")
    assert len(server.links) == 1


@scripted
async def test_call_waiting_for_a_connection_does_not_dial_after_close(server: ScriptedServer) -> None:
    client = await client_of(server, user=None)
    await server.lose()
    closing: list[asyncio.Task[None]] = []
    server.on_welcome = [lambda link: closing.append(asyncio.create_task(client.close()))]
    with pytest.raises(ConnectionClosed, match="this client is closed"):
        await client.call("echo")
    await closing[0]
    assert len(server.dialled) == 2
