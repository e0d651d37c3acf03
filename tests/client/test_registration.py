"""Handlers of a client: when they are registered, run and cancelled."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest

from tests.client.helpers import (
    ScriptedServer,
    ServerLink,
    client_of,
    fail,
    now,
    refreshable,
    scripted,
    silence,
    token,
    turns,
)
from tests.helpers import WALL
from zcproto.client.client import Client, connect
from zcproto.client.handlers import MAX_HANDLERS, Call
from zcproto.errors import Code, NotFound, TokenRevoked
from zcproto.wire.frame import NO_TOKEN, WITHDRAW

CALLS = {"calls": {"max": 32}}
METHODS = {"methods": ["ask"], "max": 16}


class Asked:
    """A client with a handler `ask`, whose calls wait until they are answered."""

    def __init__(self, server: ScriptedServer, **options: Any) -> None:
        self.client = client_of(server, **options)
        self.calls: list[Call] = []
        self.answers: list[asyncio.Future[Any]] = []
        self.cancelled = 0
        self.client.handler("ask")(self.ask)

    async def ask(self, call: Call, x: int = 0) -> Any:
        self.calls.append(call)
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def server_with_calls(**session: Any) -> ScriptedServer:
    server = ScriptedServer(**CALLS)
    server.session = session
    return server


@pytest.fixture
def server() -> ScriptedServer:
    return server_with_calls()


def registrations(server: ScriptedServer) -> list[tuple[bytes, dict[str, Any]]]:
    return [(request.token, request.params) for request in server.calls("session.handle")]


# --- registration ------------------------------------------------------------------------------------


@scripted
async def test_handlers_are_registered_before_connecting_returns(server: ScriptedServer) -> None:
    async with Asked(server).client:
        assert registrations(server) == [(token(1), METHODS)]
        assert server.methods == ["session.open", "session.handle"]


@scripted
async def test_handler_added_later_replaces_the_registration(server: ScriptedServer) -> None:
    client = client_of(server, max_calls=3)
    async with client:
        assert registrations(server) == []

        @client.handler("one")
        def one() -> int:
            return 1

        @client.handler("two")
        def two() -> int:
            return 2

        await turns()
        assert registrations(server) == [(token(1), {"methods": ["one", "two"], "max": 3})]
        server.link.call(1, "two", token=token(1))
        await turns()
        assert server.link.answers == [(1, 2)]


@scripted
async def test_handlers_survive_a_reconnect_without_further_request(server: ScriptedServer) -> None:
    connected: list[float] = []
    asked = Asked(server, on_connected=lambda _: connected.append(now()))
    async with asked.client:
        await server.lose()
        await asyncio.sleep(1)
        assert server.methods == ["session.open", "session.handle", "session.handle"]
        assert registrations(server)[1] == (token(1), METHODS)
        assert len(connected) == 2
        server.link.call(1, "ask", token=token(1))
        await turns()
        asked.answers[0].set_result("yes")
        await turns()
        assert server.link.answers == [(1, "yes")]


@scripted
async def test_server_without_calls_gets_no_registration(caplog: pytest.LogCaptureFixture) -> None:
    server = ScriptedServer()
    with caplog.at_level(logging.WARNING, "zcproto.client"):
        async with Asked(server).client:
            assert registrations(server) == []
    assert "makes no calls" in caplog.text


@scripted
async def test_client_without_session_registers_once_it_has_one(server: ScriptedServer) -> None:
    async with Asked(server, session=False).client as client:
        assert registrations(server) == []
        await client.open_session()
        assert registrations(server) == [(token(1), METHODS)]


@scripted
async def test_client_without_credentials_registers_nothing(server: ScriptedServer) -> None:
    async with Asked(server, user=None).client as client:
        await client.call("echo")
        assert registrations(server) == []


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.STALE_TIMESTAMP, Code.RESOURCE_EXHAUSTED])
@scripted
async def test_refused_registration_is_repeated(server: ScriptedServer, code: Code) -> None:
    details = {"server_time": server.wall()} if code is Code.STALE_TIMESTAMP else {"retry_after_ms": 100}
    server.script("session.handle", fail(code, **details), fail(code, **details))
    began = now()
    async with Asked(server).client:
        await asyncio.sleep(2)
        assert len(registrations(server)) == 3
        assert server.requests[-1].at > began


@scripted
async def test_registration_without_answer_is_repeated(server: ScriptedServer) -> None:
    server.script("session.handle", silence)
    async with Asked(server).client:
        await asyncio.sleep(1)
        assert len(registrations(server)) == 2


@scripted
async def test_registration_with_expired_token_renews_the_session(server: ScriptedServer) -> None:
    async with Asked(server).client:
        server.script("session.handle", fail(Code.TOKEN_EXPIRED))
        await server.lose()
        await asyncio.sleep(2)
        assert [each for each, _ in registrations(server)] == [token(1), token(1), token(2)]


@pytest.mark.parametrize("code", [Code.UNIMPLEMENTED, Code.UNAUTHENTICATED])
def test_registration_that_is_refused_for_good_is_logged(
    code: Code, caplog: pytest.LogCaptureFixture
) -> None:
    @scripted
    async def test() -> None:
        server = server_with_calls()
        server.script("session.handle", fail(code))
        async with Asked(server).client:
            await asyncio.sleep(60)
            assert len(registrations(server)) == 1

    with caplog.at_level(logging.WARNING, "zcproto.client"):
        test()
    assert "cannot call this client" in caplog.text


@scripted
async def test_revoked_session_is_not_registered_again_until_there_is_another(server: ScriptedServer) -> None:
    async with Asked(server).client as client:
        server.script("session.handle", fail(Code.TOKEN_REVOKED))
        await server.lose()
        await asyncio.sleep(60)
        assert len(registrations(server)) == 2
        with pytest.raises(TokenRevoked):
            await client.call("echo")
        await client.open_session()
        assert registrations(server)[2:] == [(token(2), METHODS)]


@scripted
async def test_connection_lost_during_registration_registers_on_the_next(server: ScriptedServer) -> None:
    server.script("session.handle", lambda request: request.link.cut())
    async with Asked(server).client:
        await asyncio.sleep(1)
        assert len(server.links) == 2
        assert len(registrations(server)) == 2


@scripted
async def test_connection_that_drains_is_left_for_the_next(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        first = server.link
        first.call(1, "ask", token=token(1))
        await turns()
        first.go_away()
        await asyncio.sleep(1)
        assert len(registrations(server)) == 2
        assert not first.ended, "the call goes on"
        asked.answers[0].set_result(1)
        await turns()
        assert first.answers == [(1, 1)]
        assert first.ended


@scripted
async def test_connecting_does_not_wait_for_a_registration_longer_than_its_timeout() -> None:
    server = server_with_calls()
    server.script("session.handle", silence)
    began = now()
    async with Asked(server, timeout=3.0).client:
        assert now() == pytest.approx(began + 3.0, abs=0.1)


@scripted
async def test_refused_login_stops_registering(server: ScriptedServer) -> None:
    async with Asked(server).client:
        server.script("session.handle", fail(Code.TOKEN_EXPIRED))
        server.script("session.open", fail(Code.UNAUTHENTICATED))
        await server.lose()
        await asyncio.sleep(60)
        assert len(registrations(server)) == 2
        assert len(server.calls("session.open")) == 2


@scripted
async def test_bound_session_proves_its_key_and_is_registered(server: ScriptedServer) -> None:
    server.script("session.handle", fail(Code.UNAUTHENTICATED, attach=True))
    async with Asked(server).client:
        await asyncio.sleep(1)
        assert len(registrations(server)) == 2


# --- the session -------------------------------------------------------------------------------------


@scripted
async def test_refreshed_session_stays_registered() -> None:
    server = server_with_calls(**refreshable(expires_at=lambda number: WALL + 100_000 * number))
    asked = Asked(server)
    async with asked.client:
        await asyncio.sleep(90)
        assert server.methods == ["session.open", "session.handle", "session.refresh"]
        server.link.call(1, "ask", token=token(2))
        await turns()
        assert len(asked.calls) == 1


@scripted
async def test_session_without_refresh_token_is_renewed_while_there_are_handlers() -> None:
    server = server_with_calls(expires_at=lambda number: WALL + 100_000 * number)
    asked = Asked(server)
    async with asked.client:
        await asyncio.sleep(150)
        assert registrations(server) == [(token(1), METHODS), (token(2), METHODS)]


@scripted
async def test_failed_login_is_repeated_with_growing_delays_while_there_are_handlers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = server_with_calls(expires_at=lambda number: WALL + 100_000 * number)
    asked: list[float] = []

    def login() -> dict[str, str]:
        asked.append(now())
        if 1 < len(asked) < 8:
            raise OSError("the identity provider is down")
        return {"scheme": "ticket"}

    client = Asked(server, user=None, login=login, random=lambda: 1.0).client
    async with client:
        await asyncio.sleep(150)
        assert len(asked) == 8
        delays = [after - before for before, after in itertools.pairwise(asked[1:])]
        assert delays == pytest.approx([1.1, 1.2, 1.4, 1.8, 2.6, 4.2])
        assert registrations(server) == [(token(1), METHODS), (token(2), METHODS)]
    assert "login: the function raised OSError; see the cause" in caplog.text


@scripted
async def test_session_is_shown_before_its_idle_timeout() -> None:
    server = server_with_calls(idle_timeout_ms=60_000)
    async with Asked(server).client:
        await asyncio.sleep(200)
        assert server.methods[:2] == ["session.open", "session.handle"]
        assert set(server.methods[2:]) == {"session.info"}
        times = [request.at for request in server.requests[1:]]
        assert max(after - before for before, after in itertools.pairwise(times)) <= 31


@scripted
async def test_session_is_not_shown_when_that_extends_nothing() -> None:
    """In the last half of the idle timeout before its expiry, each second would show it in vain."""
    server = server_with_calls(idle_timeout_ms=60_000, expires_at=lambda number: WALL + number * 100_000)
    async with Asked(server).client:
        await asyncio.sleep(99)
        assert server.methods == ["session.open", "session.handle", "session.info", "session.info"]
        await asyncio.sleep(2)
        assert registrations(server) == [(token(1), METHODS), (token(2), METHODS)]


@scripted
async def test_another_session_cancels_the_calls_of_the_earlier_one(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client as client:
        server.link.call(1, "ask", token=token(1))
        await turns()
        server.script("echo", fail(Code.TOKEN_EXPIRED))
        await client.call("echo")
        await turns()
        assert asked.cancelled == 1
        assert server.link.answers == [(1, Code.CANCELLED)]
        assert registrations(server)[-1] == (token(2), METHODS)


@scripted
async def test_revoked_event_cancels_the_handlers(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        server.link.call(1, "ask", token=token(1))
        await turns()
        server.link.event("session.revoked", {"reason": "by_user"}, token(1))
        await turns()
        assert asked.cancelled == 1
        assert asked.calls[0].cancelled
        assert server.link.answers == [(1, Code.CANCELLED)]


@scripted
async def test_closing_the_client_cancels_its_handlers_first(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        link = server.link
        link.call(1, "ask", token=token(1))
        await turns()
    assert asked.cancelled == 1
    assert link.answers == [(1, Code.CANCELLED)]
    assert server.methods[-1] == "session.close"


@scripted
async def test_handler_may_close_its_client(server: ScriptedServer) -> None:
    client = client_of(server)
    done = asyncio.Event()

    @client.handler("stop")
    async def stop() -> None:
        await client.close()
        done.set()

    async with client:
        server.link.call(1, "stop", token=token(1))
        await done.wait()


@scripted
async def test_lost_connection_cancels_the_handlers(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        server.link.call(1, "ask", token=token(1))
        await turns()
        await server.lose()
        assert asked.cancelled == 1


# --- handlers ----------------------------------------------------------------------------------------


def handling(client: Client) -> None:
    @client.handler("add")
    def add(a: int, b: int = 1) -> int:
        return a + b

    @client.handler("fail")
    async def fail_(kind: str) -> None:
        raise {"not_found": NotFound("no such thing"), "revoked": TokenRevoked("x"), "key": KeyError("x")}[
            kind
        ]

    @client.handler("unsendable")
    def unsendable() -> object:
        return object()


@pytest.mark.parametrize(
    ("method", "params", "answer"),
    [
        ("add", {"a": 1}, 2),
        ("add", {"a": 1, "b": 4}, 5),
        ("add", {"a": "x"}, Code.INVALID_ARGUMENT),
        ("add", {"a": 1, "c": 1}, Code.INVALID_ARGUMENT),
        ("fail", {"kind": "not_found"}, Code.NOT_FOUND),
        ("fail", {"kind": "revoked"}, Code.UNKNOWN),
        ("fail", {"kind": "key"}, Code.INTERNAL),
        ("unsendable", {}, Code.INTERNAL),
        ("other", {}, Code.UNIMPLEMENTED),
    ],
)
@scripted
async def test_call_is_answered(method: str, params: dict[str, Any], answer: Any) -> None:
    server = server_with_calls()
    client = client_of(server)
    handling(client)
    async with client:
        server.link.call(5, method, params, token=token(1))
        await turns()
        assert server.link.answers == [(5, answer)]


@scripted
async def test_withdrawn_call_cancels_its_handler(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        server.link.call(1, "ask", token=token(1))
        server.link.send(WITHDRAW, 1, token=token(1))  # before its first step
        server.link.call(2, "ask", token=token(1))
        await turns()
        server.link.send(WITHDRAW, 2, token=token(1))
        await turns()
        assert (len(asked.calls), asked.cancelled) == (1, 1)
        assert server.link.answers == [(1, Code.CANCELLED), (2, Code.CANCELLED)]


@scripted
async def test_handler_that_ignores_its_cancellation_keeps_its_place(server: ScriptedServer) -> None:
    client = client_of(server, max_calls=1)
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @client.handler("stubborn")
    async def stubborn() -> None:
        while not answer.done():
            try:
                await asyncio.shield(answer)
            except asyncio.CancelledError:
                continue

    async with client:
        link = server.link
        link.call(1, "stubborn", token=token(1))
        await turns()
        link.send(WITHDRAW, 1, token=token(1))
        await turns()
        link.call(2, "stubborn", token=token(1))
        await turns()
        assert link.answers == [(1, Code.CANCELLED), (2, Code.RESOURCE_EXHAUSTED)]
        answer.set_result(None)
        await turns()
        link.call(3, "stubborn", token=token(1))
        await turns()
        assert link.answers[2:] == [(3, None)]


@scripted
async def test_answers_wait_while_the_server_does_not_read(server: ScriptedServer) -> None:
    client = client_of(server, max_calls=2)
    handling(client)
    async with client:
        link = server.link
        link.pause()
        for number in (1, 2, 3):
            link.call(number, "add", {"a": number}, token=token(1))
            await turns()
        assert link.answers == [(3, Code.RESOURCE_EXHAUSTED)]
        link.resume()
        await turns()
        assert link.answers[1:] == [(1, 2), (2, 3)]


@scripted
async def test_lost_connection_ends_answers_that_wait(server: ScriptedServer) -> None:
    client = client_of(server)
    handling(client)
    async with client:
        server.link.pause()
        server.link.call(1, "add", {"a": 1}, token=token(1))
        await turns()
        await server.lose()
        assert client._handlers._running == {}


def test_malformed_handlers_are_refused() -> None:
    client = connect("server.example", verify=False)

    @client.handler("once")
    def once() -> None: ...

    with pytest.raises(ValueError, match="registered twice"):
        client.handler("once")(once)
    for name in ("", "A", "x" * 129):
        with pytest.raises(ValueError, match="handler name"):
            client.handler(name)(once)

        def positional(x: int, /) -> None: ...

    with pytest.raises(TypeError, match="handler positional: parameter 'x'"):
        client.handler("positional")(positional)
    client.handler("x" * 128)(once)
    client.handler("x")(once)
    for number in range(MAX_HANDLERS - 3):
        client.handler(f"h{number}")(once)
    with pytest.raises(ValueError, match="at most 256"):
        client.handler("more")(once)


@scripted
async def test_call_shows_what_the_server_sent(server: ScriptedServer) -> None:
    asked = Asked(server)
    async with asked.client:
        server.link.call(1, "ask", {"x": 1}, token=token(1))
        await turns()
        (call,) = asked.calls
        assert (call.method, call.user, call.traceparent, call.cancelled) == ("ask", "ada", None, False)
        assert call.time_left == 30.0
        assert repr(call) == "Call(method='ask', user='ada')"
        assert server.link.protocol.conversation.running_calls == 1


@scripted
async def test_call_with_an_unknown_token_is_refused(server: ScriptedServer) -> None:
    async with Asked(server).client:
        server.link.call(1, "ask", token=NO_TOKEN)
        await turns()
        assert server.link.answers == [(1, Code.UNAUTHENTICATED)]
        assert isinstance(server.link, ServerLink)
