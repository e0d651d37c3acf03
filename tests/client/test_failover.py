"""A client of several servers: which one it uses, and what becomes of its calls when that is lost or goes away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.client.helpers import (
    STREAMS,
    ReceivedRequest,
    ScriptedServer,
    client_of_all,
    cut,
    expire_token,
    fail,
    goodbye,
    now,
    numbers,
    refreshable,
    scripted,
    silence,
    token_of,
    turns,
)
from zcproto.client.client import Client
from zcproto.client.endpoints import (
    ATTEMPT_DELAY,
    HANDSHAKE_DELAY,
    MAX_START_DELAY,
    STABLE_AFTER,
    Address,
    Endpoint,
)
from zcproto.connection.silence import ANSWER_WITHIN, PING_AFTER
from zcproto.errors import CannotConnect, Code, ConfigError, ConnectionClosed, DeadlineExceeded, TlsError

REFUSED = CannotConnect("refused", refused=True)
A, B, C = "a.example", "b.example", "c.example"


class Fleet:
    """Three servers with the same sessions, and a client that prefers the first."""

    def __init__(self, *names: str, **greeting: Any) -> None:
        self.servers = {name: ScriptedServer(**greeting) for name in names or (A, B, C)}

    def client(self, **options: Any) -> Client:
        return client_of_all(self.servers, **options)

    def __getitem__(self, name: str) -> ScriptedServer:
        return self.servers[name]

    @property
    def dialled(self) -> dict[str, int]:
        """How often each server was tried, if it was."""
        return {name: len(server.dialled) for name, server in self.servers.items() if server.dialled}

    def calls(self, method: str = "echo") -> int:
        """Return how many requests of a method the servers have received."""
        return sum(len(server.calls(method)) for server in self.servers.values())


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(A, B)


def where(client: Client) -> str:
    assert client.endpoint is not None
    return client.endpoint.host


# --- connecting --------------------------------------------------------------------------------------


@scripted
async def test_client_connects_to_the_first_and_tries_no_other() -> None:
    fleet = Fleet()
    async with fleet.client() as client:
        assert where(client) == A
        await asyncio.sleep(1_000)
        assert fleet.dialled == {A: 1}
        assert client.addresses == (Address(A, 7443), Address(B, 7443), Address(C, 7443))
        assert client.address == Address(A, 7443)
        assert repr(client) == "Client('a.example:7443, b.example:7443, c.example:7443')"
    assert client.endpoint is None


@scripted
async def test_refused_address_is_skipped_at_once() -> None:
    fleet = Fleet()
    fleet[A].refuse, fleet[B].refuse = [REFUSED], [TlsError("certificate_expired")]
    start = now()
    async with fleet.client() as client:
        assert where(client) == C
        assert now() == start


@pytest.mark.parametrize(("listens", "delay"), [(False, ATTEMPT_DELAY), (True, HANDSHAKE_DELAY)])
@scripted
async def test_server_that_does_not_answer_is_overtaken(listens: bool, delay: float) -> None:
    fleet = Fleet()
    fleet[A].delay, fleet[A].listens = 10.0, listens
    start = now()
    async with fleet.client() as client:
        assert where(client) == B
        assert now() - start == pytest.approx(delay)
        await asyncio.sleep(20)
        assert fleet[A].links == []


@scripted
async def test_slow_first_server_still_wins_if_it_answers_first() -> None:
    fleet = Fleet()
    fleet[A].delay, fleet[A].listens = 0.5, False
    fleet[B].delay = 1.0
    async with fleet.client() as client:
        assert where(client) == A
        await asyncio.sleep(5)
        assert fleet[B].links == []


@scripted
async def test_connection_that_was_too_late_is_closed(fleet: Fleet) -> None:
    fleet[A].delay, fleet[A].listens = ATTEMPT_DELAY, False  # both answer in the same turn
    async with fleet.client() as client:
        await asyncio.sleep(1)
        [late] = [link for server in fleet.servers.values() for link in server.links if not link.requests]
        assert late.ended == "closed"
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_all_servers_that_start_are_awaited(fleet: Fleet) -> None:
    fleet[A].refuse, fleet[B].refuse = [REFUSED] * 1_000, [REFUSED] * 6
    async with fleet.client(random=numbers(0.999_999)) as client:
        assert where(client) == B
        assert len(fleet[B].dialled) == 7
        assert fleet[B].dialled[-1] - fleet[B].dialled[-2] == pytest.approx(MAX_START_DELAY)


@scripted
async def test_first_round_raises_the_error_of_a_server_that_has_started(fleet: Fleet) -> None:
    fleet[A].refuse, fleet[B].refuse = [REFUSED], [TlsError("pin_mismatch")]
    with pytest.raises(TlsError, match="pin"):
        await fleet.client()


@scripted
async def test_server_that_goes_away_with_its_welcome_is_not_used() -> None:
    fleet = Fleet()
    fleet[A].on_welcome = [lambda link: link.go_away("draining", 5_000)]
    start = now()
    async with fleet.client() as client:
        assert where(client) == B
        assert now() == start


@scripted
async def test_on_connected_says_where() -> None:
    fleet = Fleet()
    seen: list[Endpoint] = []
    async with fleet.client(on_connected=seen.append):
        await fleet[A].lose()
        await turns()
    assert seen == [Endpoint(A, 7443, A), Endpoint(B, 7443, B)]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"address_order": "sorted"}, 'address_order: \'sorted\' is unknown; give "random" or "listed"'),
        ({"max_connections": 0}, "max_connections: 0 is out of range; give from 1 to 64"),
        ({"max_connections": 65}, "max_connections: 65 is out of range; give from 1 to 64"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Fleet().client(**options)


# --- loss and GOAWAY ---------------------------------------------------------------------------------


@scripted
async def test_lost_connection_is_replaced_by_one_to_another_server_at_once() -> None:
    fleet = Fleet()
    async with fleet.client() as client:
        start = now()
        await fleet[A].lose()
        assert await client.call("echo", x=1) == {"x": 1}
        assert where(client) == B
        assert now() == start
        assert fleet.calls("session.open") == 1
        assert fleet[B].methods == ["session.info", "echo"]
        await asyncio.sleep(1_000)
        assert where(client) == B  # it stays there
        assert fleet.dialled == {A: 1, B: 1}


@scripted
async def test_idle_close_reconnects_to_the_same_server() -> None:
    fleet = Fleet()
    async with fleet.client() as client:
        await fleet[A].lose()
        await turns()
        fleet[B].link.go_away("idle", 0)
        fleet[B].link.close_cleanly()
        await asyncio.sleep(1_000)
        await client.call("echo")
        assert where(client) == B


@scripted
async def test_server_that_goes_away_is_left_at_once_and_rests_as_long_as_it_asks(fleet: Fleet) -> None:
    async with fleet.client() as client:
        await asyncio.sleep(STABLE_AFTER)
        call = await fleet[A].hold_call(client)
        start = now()
        fleet[A].link.go_away("draining", 60_000)
        await client.call("echo")
        assert where(client) == B
        assert now() == start
        fleet[A].calls()[0].respond("done")
        assert await call == "done"
        fleet[B].refuse = [REFUSED] * 1_000
        await fleet[B].lose()
        await client.call("echo", timeout=None)
        assert where(client) == A
        assert fleet[A].dialled[-1] - start == pytest.approx(60, abs=0.2)


@scripted
async def test_call_that_a_draining_server_refused_is_sent_to_another_at_once(fleet: Fleet) -> None:
    def refuse(request: Any) -> None:
        request.link.go_away("draining", 60_000)
        request.fail(Code.UNAVAILABLE, {"retry_after_ms": 60_000})

    async with fleet.client() as client:
        fleet[A].script("echo", refuse)
        start = now()
        assert await client.call("echo", x=1) == {"x": 1}
        assert now() - start < 0.1


@scripted
async def test_server_without_its_store_is_not_left(fleet: Fleet) -> None:
    async with fleet.client() as client:
        fleet[A].script("echo", fail(Code.UNAVAILABLE, retry_after_ms=1_000))
        start = now()
        await client.call("echo")
        assert now() - start >= 1
        assert fleet.dialled == {A: 1}


@scripted
async def test_each_server_has_its_own_delays_while_all_are_down(fleet: Fleet) -> None:
    async with fleet.client(random=numbers(0.999_999)) as client:
        fleet[A].refuse, fleet[B].refuse = [REFUSED] * 6, [REFUSED] * 6
        start = now()
        await fleet[A].lose()
        await client.call("echo", timeout=None)
        a, b = ([at - start for at in fleet[name].dialled] for name in (A, B))
        assert a[1:6] == pytest.approx([0.1, 0.3, 0.7, 1.5, 3.1], rel=1e-3)
        assert b[:6] == pytest.approx([0, 0.1, 0.3, 0.7, 1.5, 3.1], rel=1e-3)


@scripted
async def test_wrong_certificate_of_one_server_is_not_raised_while_another_is_down(fleet: Fleet) -> None:
    async with fleet.client() as client:
        fleet[A].refuse, fleet[B].refuse = [REFUSED] * 3, [TlsError("pin_mismatch")] * 100
        await fleet[A].lose()
        assert await client.call("echo", x=1) == {"x": 1}
        assert where(client) == A


@scripted
async def test_wrong_certificates_of_all_servers_are_raised(fleet: Fleet) -> None:
    async with fleet.client() as client:
        fleet[A].refuse, fleet[B].refuse = ([TlsError("pin_mismatch")] * 2 for _ in range(2))
        await fleet[A].lose()
        with pytest.raises(TlsError):
            await client.call("echo")
        assert await client.call("echo", x=1) == {"x": 1}  # the next call tries again


# --- calls -------------------------------------------------------------------------------------------


@scripted
async def test_call_without_a_key_is_not_sent_to_another_server() -> None:
    fleet = Fleet()
    async with fleet.client() as client:
        fleet[A].script("echo", cut)
        with pytest.raises(ConnectionClosed):
            await client.call("echo")
        assert fleet.calls() == 1


@pytest.mark.parametrize(("end", "key"), [(cut, "k-1"), (goodbye, "k-1"), (goodbye, None)])
@scripted
async def test_call_with_a_key_or_certainly_not_run_is_sent_to_another_server(
    end: Any, key: str | None
) -> None:
    fleet = Fleet()
    async with fleet.client() as client:
        fleet[A].script("echo", end)
        start = now()
        assert await client.call("echo", x=1, idempotency_key=key) == {"x": 1}
        assert now() - start < 0.1
        assert [[call.meta.idempotency_key for call in fleet[name].calls()] for name in (A, B)] == [[key]] * 2


@scripted
async def test_lost_refresh_is_repeated_once_at_another_server() -> None:
    fleet = Fleet()
    for server in fleet.servers.values():
        server.session = refreshable()
    async with fleet.client() as client:
        fleet[A].script("session.refresh", cut)
        fleet[A].script("echo", fail(Code.TOKEN_EXPIRED))
        results = await asyncio.gather(*(client.call("echo", x=x) for x in range(5)))
        assert results == [{"x": x} for x in range(5)]
        [first], [second] = (fleet[name].calls("session.refresh") for name in (A, B))
        assert first.params["refresh_token"] == second.params["refresh_token"]


# --- extra connections -----------------------------------------------------------------------------


@scripted
async def test_calls_beyond_max_streams_wait_without_extra_connections() -> None:
    fleet = Fleet(A, max_streams=2)
    async with fleet.client() as client:
        calls = [await fleet[A].hold_call(client) for _ in range(3)]
        assert fleet.calls() == 2
        assert fleet.dialled == {A: 1}
        for call in calls:
            call.cancel()


@scripted
async def test_extra_connection_is_made_when_max_streams_are_in_flight() -> None:
    fleet = Fleet(A, B, max_streams=2)
    async with fleet.client(max_connections=3) as client:
        fleet[A].script("echo", *[silence] * 5)
        calls = [asyncio.create_task(client.call("echo", x=x)) for x in range(8)]
        await asyncio.sleep(1)
        assert fleet.dialled == {A: 3}
        assert [len([r for r in link.requests if r.method == "echo"]) for link in fleet[A].links] == [2, 2, 4]
        for request in fleet[A].calls():
            request.respond(request.params)
        assert await asyncio.gather(*calls) == [{"x": x} for x in range(8)]


@scripted
async def test_extra_connections_are_made_while_calls_wait() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(user=None, max_connections=3) as client:
        fleet[A].storing = 0.1
        calls = [asyncio.create_task(client.call("echo")) for _ in range(3)]
        fleet[A].script("echo", silence, silence, silence)
        await asyncio.sleep(1)
        assert fleet.dialled == {A: 3}
        for call in calls:
            call.cancel()


@scripted
async def test_server_that_reads_slowly_gets_no_extra_connection() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        fleet[A].link.pause()
        call = asyncio.create_task(client.call("echo", x=1))
        await asyncio.sleep(1)
        assert fleet.dialled == {A: 1}
        fleet[A].link.resume()
        assert await call == {"x": 1}


@scripted
async def test_waiting_calls_are_served_by_whichever_connection_has_room() -> None:
    fleet = Fleet(A, max_streams=2)
    async with fleet.client(max_connections=2) as client:
        fleet[A].script("echo", *[silence] * 100)
        calls = [asyncio.create_task(client.call("echo", x=x)) for x in range(20)]
        for _ in range(20):
            await turns()
            pending = fleet[A].calls()
            assert 1 <= len(pending) <= 4
            pending[-1].respond(pending[-1].params)
            fleet[A].requests.remove(pending[-1])
        assert await asyncio.gather(*calls) == [{"x": x} for x in range(20)]


@scripted
async def test_extra_connection_shows_the_session_and_is_closed_when_idle() -> None:
    fleet = Fleet(A, max_streams=2)
    async with fleet.client(max_connections=3) as client:
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(3)]
        main, extra = fleet[A].links  # no more than the calls need
        assert [request.method for request in extra.requests] == ["session.info", "echo"]
        assert extra.requests[0].token == main.requests[-1].token
        await asyncio.sleep(100)
        assert not extra.ended
        for request in fleet[A].calls():
            request.respond(None)
        await asyncio.gather(*held)
        await asyncio.sleep(21)  # checked every 30 s
        assert extra.ended == "closed"
        assert not main.ended


@scripted
async def test_failed_extra_connection_fails_no_call_and_is_tried_again_later() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2, random=numbers(0.999_999)) as client:
        fleet[A].refuse = [REFUSED]
        first = await fleet[A].hold_call(client)
        second = await fleet[A].hold_call(client)
        third = await fleet[A].hold_call(client)
        assert len(fleet[A].dialled) == 2
        await asyncio.sleep(0.2)
        fourth = asyncio.create_task(client.call("echo"))
        await turns()
        assert len(fleet[A].dialled) == 3
        for _ in range(4):
            await turns()
            for request in fleet[A].calls():
                request.respond(None)
        await asyncio.gather(first, second, third, fourth)


@scripted
async def test_extra_connection_takes_calls_once_the_session_was_accepted_there() -> None:
    fleet = Fleet(A, max_streams=2)
    async with fleet.client(max_connections=2) as client:
        shown: list[ReceivedRequest] = []
        fleet[A].script("session.info", shown.append)
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(2)]
        call = asyncio.create_task(client.call("echo", x=1))
        await asyncio.sleep(1)
        extra = fleet[A].links[1]
        assert [request.method for request in extra.requests] == ["session.info"]
        shown[0].respond()
        assert await call == {"x": 1}
        assert fleet[A].calls()[-1].link is extra
        for each in held:
            each.cancel()


@scripted
async def test_session_requests_take_the_first_room_on_any_connection() -> None:
    fleet = Fleet(A, max_streams=1)
    fleet[A].session = refreshable()
    async with fleet.client(max_connections=2) as client:
        held = [await fleet[A].hold_call(client) for _ in range(2)]
        main, extra = fleet[A].links
        fleet[A].calls()[1].respond("done")
        assert await held[1] == "done"
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}
        async with client.session_for(user="bob", key="secret") as bob:
            assert await bob.call("echo", x=2) == {"x": 2}
        for method in ("session.refresh", "session.open"):
            assert fleet[A].calls(method)[-1].link is extra
        assert fleet[A].calls("echo")[-1].token != token_of(client)
        assert not main.ended
        held[0].cancel()


@scripted
async def test_extra_connection_is_opened_again_after_the_time_that_goaway_asks_for() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2, random=numbers(0.0)) as client:
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(2)]
        fleet[A].link.go_away("draining", 5_000)
        for seconds, dialled in ((4.0, 2), (2.0, 3)):
            await asyncio.sleep(seconds)
            held.append(await fleet[A].hold_call(client, timeout=None))
            assert len(fleet[A].dialled) == dialled
        for call in held:
            call.cancel()


@scripted
async def test_lost_extra_connection_fails_only_its_own_calls() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        first, second = await fleet[A].hold_call(client), await fleet[A].hold_call(client)
        extra = fleet[A].links[1]
        extra.cut()
        with pytest.raises(ConnectionClosed):
            await second
        fleet[A].calls()[0].respond("done")
        assert await first == "done"
        assert len(fleet[A].dialled) == 2


@scripted
async def test_loss_of_the_main_connection_wakes_the_calls_that_wait_for_room() -> None:
    fleet = Fleet(A, B, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        held = [await fleet[A].hold_call(client) for _ in range(2)]
        waiting = asyncio.create_task(client.call("echo", x=1))
        await turns()
        fleet[A].links[0].cut()
        assert await waiting == {"x": 1}
        assert where(client) == B
        for call in held:
            call.cancel()


@scripted
async def test_events_of_a_session_come_once() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        held = [await fleet[A].hold_call(client) for _ in range(2)]
        session = token_of(client)
        for link in fleet[A].links:
            link.event("session.expiring", {"expires_at": 1}, session)
            link.event("pins.next", {"pins": []}, bytes(32))
            link.event("news", link.salt, session)
        await turns()
        for call in held:
            call.cancel()
    names = [event.name async for event in client.events]
    assert sorted(names) == ["news", "news", "pins.next", "session.expiring"]


@scripted
async def test_refreshed_token_is_shown_on_extra_connections() -> None:
    fleet = Fleet(A, max_streams=2, calls={"max": 32})
    fleet[A].session = refreshable()
    async with fleet.client(max_connections=2) as client:
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(3)]
        extra = fleet[A].links[1]
        fleet[A].link.protocol.conversation.session_ended(token_of(client))
        expire_token(client)
        fleet[A].calls()[0].respond(None)
        await turns()
        await client.call("echo")
        assert [request.method for request in extra.requests].count("session.info") == 2
        for call in held:
            call.cancel()


@scripted
async def test_refreshed_token_is_shown_at_once_on_full_and_draining_connections() -> None:
    fleet = Fleet(A, max_streams=2, calls={"max": 32})
    fleet[A].session = refreshable()
    client = fleet.client(max_connections=2)
    client.handler("ask")(lambda: 1)
    async with client:
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(4)]
        draining, full = fleet[A].links
        draining.go_away()
        await asyncio.sleep(1)
        main = fleet[A].links[2]
        expire_token(client)
        await client.call("echo")
        refresh, *_ = fleet[A].calls("session.refresh")
        for link in (draining, full):
            last = link.requests[-1]
            assert (last.method, last.token) == ("session.info", token_of(client))
            last.fail(Code.UNAVAILABLE if link is draining else Code.RESOURCE_EXHAUSTED)
        assert refresh.link is main
        await client.call("echo")
        assert not draining.ended
        for call in held:
            call.cancel()


@scripted
async def test_handlers_are_registered_on_each_connection_before_other_requests() -> None:
    fleet = Fleet(A, max_streams=2, calls={"max": 32})
    fleet[A].session = refreshable()
    client = fleet.client(max_connections=3)

    @client.handler("ask")
    async def ask(x: int = 0) -> int:
        return x + 1

    async with client:
        held = [await fleet[A].hold_call(client, timeout=None) for _ in range(5)]
        main, *others = fleet[A].links
        assert [link.requests[0].method for link in others] == ["session.handle", "session.handle"]
        first = token_of(client)
        for link in fleet[A].links:
            link.call(1, "ask", {"x": 1}, token=first)
        await turns()
        assert [link.answers for link in fleet[A].links] == [[(1, 2)]] * 3
        for request in fleet[A].calls()[:4]:
            request.respond(None)
        await turns()
        expire_token(client)
        await client.call("echo")
        newest = token_of(client)
        assert newest != first
        for link in others:
            shown = [request for request in link.requests if request.token == newest]
            assert shown[0].method == "session.handle"
        for link in fleet[A].links:
            link.call(2, "ask", {"x": 2}, token=newest)
        await turns()
        assert [link.answers[1:] for link in fleet[A].links] == [[(2, 3)]] * 3
        assert main.answers[-1] == (2, 3)
        for call in held:
            call.cancel()


@scripted
async def test_handlers_are_registered_first_after_a_reconnect() -> None:
    fleet = Fleet(A, calls={"max": 32})
    client = fleet.client()
    client.handler("ask")(lambda: 1)
    async with client:
        calls = [asyncio.create_task(client.call("echo", idempotency_key=str(n))) for n in range(3)]
        fleet[A].script("echo", silence, silence, silence)
        await turns()
        await fleet[A].lose()
        await asyncio.gather(*calls)
        assert fleet[A].link.requests[0].method == "session.handle"


@scripted
async def test_call_that_waits_for_room_can_be_cancelled() -> None:
    fleet = Fleet(A, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        held = [await fleet[A].hold_call(client) for _ in range(2)]
        waiting = [asyncio.create_task(client.call("echo", x=x)) for x in range(3)]
        await turns()
        waiting[0].cancel()
        fleet[A].calls()[0].respond(None)
        await held[0]
        assert await asyncio.gather(*waiting[1:]) == [{"x": 1}, {"x": 2}]
        held[1].cancel()


@scripted
async def test_closing_a_client_ends_its_extra_connections() -> None:
    fleet = Fleet(A, max_streams=1)
    client = await fleet.client(max_connections=2)
    held = [await fleet[A].hold_call(client) for _ in range(3)]
    await client.close()
    assert all(link.ended for link in fleet[A].links)
    results = await asyncio.gather(*held, return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionClosed] * 3


# --- a silent server ---------------------------------------------------------------------------------

SILENT_AT = PING_AFTER + ANSWER_WITHIN


def freeze(server: ScriptedServer) -> None:
    """Let a server answer nothing any more, as after SIGSTOP. Its connections stay open."""
    server.answers_pings = False
    server.act = silence  # type: ignore[method-assign,assignment]


@scripted
async def test_idempotent_call_moves_to_another_address_when_its_server_freezes(fleet: Fleet) -> None:
    async with fleet.client() as client:
        await client.call("echo")
        freeze(fleet[A])
        start = now()
        assert await client.call("echo", x=1, idempotency_key="once") == {"x": 1}
        assert where(client) == B
        assert SILENT_AT <= now() - start < SILENT_AT + 0.5
        (ping,) = fleet[A].link.pings
        assert ping - start == pytest.approx(PING_AFTER, abs=0.2)
        assert fleet[A].link.ended == "aborted"
        shown = fleet[B].requests[0]
        assert (shown.method, shown.token) == ("session.info", fleet[A].calls()[0].token)
    assert fleet.dialled == {A: 1, B: 1}


@scripted
async def test_silence_before_a_call_counts(fleet: Fleet) -> None:
    async with fleet.client() as client:
        heard_at = now()
        freeze(fleet[A])
        await asyncio.sleep(3)
        assert await client.call("echo", x=1, idempotency_key="once") == {"x": 1}
        assert now() - heard_at == pytest.approx(SILENT_AT, abs=0.5)


@scripted
async def test_other_call_of_a_frozen_server_is_lost(fleet: Fleet) -> None:
    async with fleet.client() as client:
        freeze(fleet[A])
        with pytest.raises(ConnectionClosed, match="another address took over") as caught:
            await client.call("echo")
        assert not caught.value.clean
        assert await client.call("echo", x=1) == {"x": 1}
    assert fleet.calls() == 2


@scripted
async def test_timeout_of_a_call_finds_out_about_a_frozen_server_earlier(fleet: Fleet) -> None:
    async with fleet.client() as client:
        freeze(fleet[A])
        start = now()
        call = asyncio.create_task(client.call("echo", x=1, idempotency_key="once"))
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=1.5)
        assert await call == {"x": 1}
        assert now() - start == pytest.approx(1.5 + ANSWER_WITHIN, abs=0.5)


@scripted
async def test_client_with_one_address_waits_for_a_frozen_server() -> None:
    fleet = Fleet(A)
    async with fleet.client() as client:
        freeze(fleet[A])
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=60)
        assert fleet[A].link.pings == []
        assert fleet.dialled == {A: 1}


@scripted
async def test_slow_server_that_answers_pings_keeps_its_clients(fleet: Fleet) -> None:
    async with fleet.client() as client:
        fleet[A].script("echo", silence)
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=60)
        assert len(fleet[A].link.pings) == pytest.approx(12, abs=1)
        assert fleet.dialled == {A: 1}


@pytest.mark.parametrize("is_accepted_late", [True, False])
@scripted
async def test_server_that_answers_first_keeps_its_client(fleet: Fleet, is_accepted_late: bool) -> None:
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[B].script("session.info", silence)
        call = asyncio.create_task(client.call("echo"))
        await asyncio.sleep(SILENT_AT + 1)
        assert [link.ended for link in fleet[B].links] == [""]
        fleet[A].calls()[0].respond("late")
        assert await call == "late"
        if is_accepted_late:
            fleet[B].requests[0].respond()
        slow = asyncio.create_task(client.call("echo"))
        await asyncio.sleep(3)  # the silent connection is checked again
        assert where(client) == A
        assert [link.ended for link in fleet[B].links] == ["closed"]
        slow.cancel()


@pytest.mark.parametrize(
    ("refusal", "stays"),
    [
        (fail(Code.UNAVAILABLE, retry_after_ms=1_000), True),
        (fail(Code.UNAUTHENTICATED, reason="unknown_token"), True),
        (fail(Code.TOKEN_REVOKED), True),
        (cut, True),
        (goodbye, True),
        (fail(Code.TOKEN_EXPIRED), False),
    ],
    ids=["unavailable", "unknown-token", "revoked", "lost", "goaway", "expired"],
)
@scripted
async def test_client_moves_only_to_a_server_that_knows_its_session(refusal: Any, stays: bool) -> None:
    fleet = Fleet(A, B)
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[B].script("session.info", refusal)
        call = asyncio.create_task(client.call("echo", idempotency_key="once"))
        await asyncio.sleep(SILENT_AT + 0.4)
        assert (where(client) == A) is stays
        await call  # after the next attempt
        assert where(client) == B


@scripted
async def test_attempts_beside_a_silent_server_are_repeated_with_backoff(fleet: Fleet) -> None:
    async with fleet.client(random=numbers(0.999)) as client:
        freeze(fleet[A])
        fleet[B].refuse = [REFUSED] * 100
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=300)
        assert 8 <= len(fleet[B].dialled) <= 20
        assert fleet[A].dialled == fleet[A].dialled[:1]
        fleet[B].refuse = []


@scripted
async def test_client_moves_while_its_session_is_opened(fleet: Fleet) -> None:
    freeze(fleet[A])
    start = now()
    async with fleet.client() as client:
        assert where(client) == B
        assert now() - start == pytest.approx(SILENT_AT, abs=0.5)
    assert fleet[B].methods == ["session.open", "session.close"]


@scripted
async def test_client_moves_while_its_session_is_refreshed(fleet: Fleet) -> None:
    fleet[A].session = refreshable()
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[A].link.event("session.expiring", {"expires_at": 1}, token_of(client))
        await asyncio.sleep(SILENT_AT + 1)
        assert where(client) == B
        # The refreshed token is not shown, and the refresh token may be spent: its grace is over.
        assert fleet[B].methods == ["session.open"]


@scripted
async def test_loss_of_a_silent_connection_ends_the_attempt_beside_it(fleet: Fleet) -> None:
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[B].delay = 5.0
        call = asyncio.create_task(client.call("echo", x=1, idempotency_key="once"))
        await asyncio.sleep(SILENT_AT + 1)
        assert len(fleet[B].dialled) == 1
        fleet[B].delay = 0.0
        fleet[A].link.cut()
        assert await call == {"x": 1}
        assert where(client) == B
    assert len(fleet[B].links) == 1


@scripted
async def test_client_is_closed_during_an_attempt_beside_a_silent_server(fleet: Fleet) -> None:
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[B].delay = 5.0
        call = asyncio.create_task(client.call("echo"))
        await asyncio.sleep(SILENT_AT + 1)
        assert len(fleet[B].dialled) == 1
    with pytest.raises(ConnectionClosed):
        await call
    await asyncio.sleep(10)
    assert fleet[B].links == []


@scripted
async def test_stream_of_a_frozen_server_is_lost_and_can_be_opened_again() -> None:
    fleet = Fleet(A, B, **STREAMS)
    async with fleet.client() as client:
        freeze(fleet[A])
        fleet[B].script("watch", silence)
        async with client.stream("watch", reopen=lambda _: {}) as stream:
            taking = asyncio.create_task(stream.receive())
            await asyncio.sleep(SILENT_AT + 1)
            assert where(client) == B
            fleet[B].link.item(fleet[B].calls("watch")[0].stream, "first")
            assert await taking == "first"


@scripted
async def test_extra_connections_of_a_frozen_server_are_lost_with_the_first() -> None:
    fleet = Fleet(A, B, max_streams=1)
    async with fleet.client(max_connections=3) as client:
        freeze(fleet[A])
        calls = [asyncio.create_task(client.call("echo", x=x, idempotency_key=f"{x}")) for x in range(3)]
        await asyncio.sleep(1)
        assert len(fleet[A].links) == 3
        assert await asyncio.gather(*calls) == [{"x": x} for x in range(3)]
        assert {link.ended for link in fleet[A].links} == {"aborted"}
        assert where(client) == B


@scripted
async def test_idle_main_connection_is_probed_when_an_extra_one_is_silent() -> None:
    fleet = Fleet(A, B, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        first = await fleet[A].hold_call(client)
        fleet[A].script("echo", silence)
        second = asyncio.create_task(client.call("echo", x=2, idempotency_key="once"))
        await asyncio.sleep(1)
        fleet[A].calls()[0].respond("done")
        assert await first == "done"
        freeze(fleet[A])
        start = now()
        assert await second == {"x": 2}
        assert where(client) == B
        assert now() - start < SILENT_AT + ANSWER_WITHIN + 1


@scripted
async def test_extra_connection_to_a_frozen_process_is_lost_alone() -> None:
    fleet = Fleet(A, B, max_streams=1)
    async with fleet.client(max_connections=2) as client:
        first = await fleet[A].hold_call(client, x="first")
        second = asyncio.create_task(client.call("echo", x="second", idempotency_key="once"))
        fleet[A].script("echo", silence)
        await asyncio.sleep(1)
        main, extra = fleet[A].links
        extra.answers_pings = False
        first_request = fleet[A].calls()[0]
        first_request.respond("done")
        assert await first == "done"
        assert await second == {"x": "second"}
        assert extra.ended == "aborted"
        assert not main.ended
        assert where(client) == A
    assert fleet[B].dialled == []
