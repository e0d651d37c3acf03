"""A server whose session store fails, over real TLS: known sessions go on and revocations apply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.runtime.helpers import Servers, end, refresh_params
from tests.server.helpers import EVENT, NO_TOKEN, AnsweredError, Client, ServerThread, eventually
from tests.stores.faulty import FAILS, FAILS_AFTER, HANGS, READ_ONLY, WORKS, FaultyStore
from zcproto.common.clock import system_entropy
from zcproto.errors import Code, NotFound
from zcproto.runtime import build as build_module
from zcproto.server.protocol import ServerProtocol
from zcproto.sessions import SessionSettings, health
from zcproto.sessions.health import FAILURES
from zcproto.sessions.token import digest_of, id_from_text
from zcproto.stores import operations, revoker

SOON = 0.25
"""The timeout of operations of a store that hangs."""

slow = partial(pytest.param, marks=pytest.mark.slow)
"""Faults that tests/stores/service has with each operation. The one left needs a timeout."""

PROBES = frozenset({"open", "ping"})


class Site(Servers):
    """Servers that share one store."""

    def __init__(self, folder: Path, certs: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, certs, stack)
        self._monkeypatch = monkeypatch
        self.store = self.new_store()

    def new_store(self, *, shared: bool = False) -> FaultyStore:
        return FaultyStore(SessionSettings(per_user=100_000), system_entropy, shared=shared)

    def serve(self, store: FaultyStore | None = None, home: str = "home", **settings: Any) -> ServerThread:
        store = self.store if store is None else store
        self._monkeypatch.setattr(build_module, "build_store", lambda *_: store)
        return self.start(home, **settings)

    def operations(self) -> list[str]:
        """Return the names of the operations that the store was asked for."""
        return [name for name in self.store.calls if name not in PROBES]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timeouts end operations that hang, not those of a busy machine, as in tests/stores/service."""
    monkeypatch.setattr(operations, "_TURNS", 50)
    monkeypatch.setattr(revoker, "MIN_DISK_S", TIMEOUT)
    monkeypatch.setattr(health, "WINDOW_S", TIMEOUT)


@pytest.fixture
def site(tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, certs, stack, monkeypatch)


def set_timeout(server: ServerThread, seconds: float) -> None:
    """Set the time that operations of the store may take."""
    breaker = server.server.state.sessions.sync.breaker  # type: ignore[attr-defined]
    server.in_loop(lambda: setattr(breaker, "timeout", seconds))


def until_recovered(server: ServerThread) -> None:
    eventually(lambda: server.stats["store"]["state"] == "healthy")


def opens(client: Client, user: str) -> dict[str, Any]:
    """Open a session like a client, retrying after `retry_after_ms`."""
    while True:
        try:
            return client.open_session(user)
        except AnsweredError as answered:
            if answered.code != Code.UNAVAILABLE:
                raise
            time.sleep(answered.details["retry_after_ms"] / 1000)


# --- an outage ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("recovery")
@pytest.mark.parametrize("mode", [HANGS, *map(slow, (FAILS, FAILS_AFTER, READ_ONLY))])
def test_store_outage_does_not_delay_known_sessions(site: Site, mode: str) -> None:
    server = site.serve()
    clients = [site.client(server, f"user{number}") for number in range(5)]
    newcomer = site.client(server)
    set_timeout(server, SOON)
    site.store.mode = mode
    asked = len(site.operations())
    for _ in range(5):
        with pytest.raises(AnsweredError) as refused:
            newcomer.open_session("new")
        assert refused.value.code == Code.UNAVAILABLE
        assert refused.value.details["retry_after_ms"] >= 100
        for client in clients:
            client.echo()
            with pytest.raises(AnsweredError) as refused:
                client.call("session.refresh", refresh_params(client), token=NO_TOKEN)
            assert refused.value.code == Code.UNAVAILABLE
    assert len(site.operations()) - asked <= FAILURES  # of 30 that would wait for it
    assert server.stats["store"]["state"] in ("degraded", "recovering")
    site.store.mode = WORKS
    opens(newcomer, "new")
    newcomer.echo()
    for client in clients:
        client.echo()
        assert client.events == []


@pytest.mark.requirement("recovery")
@pytest.mark.parametrize("mode", [HANGS, *map(slow, (FAILS, READ_ONLY))])
def test_revocations_during_outage_apply(site: Site, mode: str) -> None:
    server = site.serve()
    mine, other, bob = (site.client(server, user) for user in ("ada", "ada", "bob"))
    set_timeout(server, SOON)
    site.store.mode = mode
    assert mine.call("session.revoke", {"id": other.opened["id"]}) == {"revoked": 1}
    assert other.event().value == ["session.revoked", {"reason": "revoked by its user"}]
    assert other.refused("echo").code == Code.TOKEN_REVOKED
    assert bob.call("session.close") == {}
    assert bob.refused("echo").code == Code.TOKEN_REVOKED
    assert server.stats["store"]["pending_revocations"] == 2
    mine.echo()
    site.store.mode = WORKS
    until_recovered(server)
    assert server.stats["store"]["pending_revocations"] == 0
    assert other.refused("echo").code == Code.TOKEN_REVOKED
    mine.echo()
    end(server, mine, other, bob)
    assert [record.user for record in site.store.registry.records(None, 9)] == ["ada"]
    again = site.serve()
    for gone in (other, bob):
        client = site.client(again)
        client.token = gone.token
        assert client.refused("echo").code in (Code.TOKEN_REVOKED, Code.UNAUTHENTICATED)
    client = site.client(again)
    client.token = mine.token
    client.echo()


def test_tokens_are_refused_after_the_grace_until_recovery(site: Site) -> None:
    server = site.serve(store__grace="24h")
    client = site.client(server, "ada")
    site.store.mode = FAILS
    store_health = server.server.state.sessions.sync.health  # type: ignore[attr-defined]
    server.in_loop(lambda: store_health.begin_outage(server.clock.now()))
    client.echo()
    server.in_loop(lambda: setattr(store_health, "since", store_health.since - 86_400.0))
    server.until(lambda: server.server.state.registry.closed)
    refused = client.refused("echo")
    assert (refused.code, refused.details) == (Code.UNAVAILABLE, {"retry_after_ms": 1_000})
    assert client.refused("echo", token=b"x" * 32).code == Code.UNAVAILABLE
    assert client.is_open()
    assert client.call("server.info", token=NO_TOKEN)["versions"] == [1]
    site.store.mode = WORKS
    until_recovered(server)
    client.echo()
    assert client.events == []


# --- a store that others use, too -----------------------------------------------------------------------------


def test_session_is_valid_on_another_server(site: Site) -> None:
    store = site.new_store(shared=True)
    one, other = site.serve(store), site.serve(store, "other")
    first = site.client(one, "ada")
    second = site.client(other)
    second.token = first.token
    second.send(*(second.request("echo", {"n": number}) for number in range(20)))
    answers = second.answers(20)
    assert [answers[stream].value for stream in sorted(answers)] == [{"n": number} for number in range(20)]
    assert other.stats["store"]["lookups"] == 1
    assert second.call("session.info")["id"] == first.opened["id"]
    assert len(second.call("session.list")) == 1


def test_revocation_reaches_another_server_within_a_second(site: Site) -> None:
    store = site.new_store(shared=True)
    view = site.new_store(shared=True)
    view.use_data_of(store)
    one, other = site.serve(store), site.serve(view, "other")
    first, second = site.client(one, "ada"), site.client(other)
    second.token = first.token
    second.echo()
    assert first.call("session.close") == {}
    session_id = id_from_text(first.opened["id"])
    assert session_id is not None
    other.in_loop(lambda: view.report_change(session_id))
    event = second.event()
    assert event.value == ["session.revoked", {"reason": "revoked"}]
    assert second.refused("echo").code == Code.TOKEN_REVOKED
    third = site.client(other)
    assert third.refused("echo", token=first.token).code == Code.TOKEN_REVOKED


def test_unknown_token_is_refused_and_later_frames_are_served(site: Site) -> None:
    store = site.new_store(shared=True)
    server = site.serve(store)
    client = site.client(server, "ada")
    frames = []
    for number in range(30):
        token = b"%032d" % number if number % 3 == 0 else client.token
        frames.append(client.request("echo", {"n": number}, token=token))
    first = client.stream - 29
    client.send(*frames)
    answers = client.answers(30)
    for number in range(30):
        answer = answers[first + number]
        if number % 3 == 0:
            assert answer.code == Code.UNAUTHENTICATED
        else:
            assert answer.value == {"n": number}


# --- frames that wait for a token -----------------------------------------------------------------------------


class PausedLookups:
    """Finishes look-ups of tokens when the test says so."""

    is_shared = True

    def __init__(self, server: ServerThread) -> None:
        self.inner = server.server.state.sessions
        self.asked: list[bytes] = []
        self.answer: asyncio.Future[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def look_up(self, token: bytes, address: str, code: Code) -> None:
        self.asked.append(token)
        self.answer = asyncio.get_running_loop().create_future()
        await self.answer


@pytest.fixture
def paused_server(site: Site) -> tuple[ServerThread, PausedLookups]:
    server = site.serve(site.new_store(shared=True))
    lookups = PausedLookups(server)
    server.server.state.sessions = lookups  # type: ignore[assignment]
    return server, lookups


ServerWithLookups = tuple[ServerThread, PausedLookups]


def settle(server: ServerThread, lookups: PausedLookups, error: Exception | None = None) -> None:
    def answer() -> None:
        assert lookups.answer is not None
        if error is None:
            lookups.answer.set_result(None)
        else:
            lookups.answer.set_exception(error)

    server.in_loop(answer)


def test_token_lookup_delays_only_its_connection(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client, other = site.client(server, "ada"), site.client(server, "bob")
    client.send(
        client.request("echo", {"n": 1}),
        client.request("echo", token=b"x" * 32),
        client.request("echo", {"n": 3}),
    )
    assert client.answer(client.stream - 2).value == {"n": 1}
    server.until(lambda: lookups.answer)
    client.send(client.request("echo", {"n": 4}))
    other.echo()
    client.tls.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.receive()
    client.tls.settimeout(TIMEOUT)
    settle(server, lookups)
    assert client.answer(client.stream - 2).code == Code.UNAUTHENTICATED
    assert client.answer(client.stream - 1).value == {"n": 3}
    assert client.answer(client.stream).value == {"n": 4}
    assert lookups.asked == [b"x" * 32]


def test_internal_error_in_token_lookup_has_an_incident(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client = site.client(server, "ada")
    client.send(client.request("echo", token=b"x" * 32))
    server.until(lambda: lookups.answer)
    settle(server, lookups, ValueError("a bug"))
    answer = client.answer(client.stream)
    assert answer.code == Code.INTERNAL
    assert "incident" in answer.details
    client.echo()
    client.send(client.request("echo", token=b"y" * 32))
    server.until(lambda: lookups.answer and not lookups.answer.done())
    settle(server, lookups, NotFound("no such thing"))
    assert client.answer(client.stream).code == Code.NOT_FOUND


def test_disconnect_during_token_lookup_leaves_nothing(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    with server.client("ada") as client:
        client.send(client.request("echo", token=b"x" * 32))
        server.until(lambda: lookups.answer)
        client.fin()
    # The connection is not read, so its end is detected by a write or a deadline.
    protocol = server.in_loop(lambda: next(iter(server.server.state.connections)))
    server.in_loop(lambda: protocol.abort("write_timeout"))
    server.until_left(
        wheel=3
    )  # of the store: its leases, the watch for stalls, revocations that are repeated
    assert lookups.answer is not None
    assert lookups.answer.cancelled()


def test_drain_during_token_lookup_ends(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client = site.client(server, "ada")
    client.send(client.request("echo", token=b"x" * 32))
    server.until(lambda: lookups.answer)
    end(server, client)


def pause_during_lookup(
    server: ServerThread, lookups: PausedLookups, client: Client
) -> tuple[ServerProtocol, int]:
    """Pause the writing of a connection with two requests, the first of which waits for its token's lookup.

    Return the connection, and the number of requests served so far.
    """
    client.send(client.request("echo", token=b"x" * 32), client.request("echo", {"n": 2}))
    server.until(lambda: lookups.answer)
    (protocol,) = server.in_loop(lambda: [*server.server.state.connections])
    server.in_loop(protocol.pause_writing)
    return protocol, server.server.state.counters.requests


def test_slow_reader_is_not_served_after_token_lookup(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client = site.client(server, "ada")
    protocol, requests = pause_during_lookup(server, lookups, client)
    settle(server, lookups)
    for _ in range(5):  # the turns in which the lookup ends
        assert server.in_loop(lambda: server.server.state.counters.requests) == requests
    server.in_loop(protocol.resume_writing)
    assert client.answer(client.stream - 1).code == Code.UNAUTHENTICATED
    assert client.answer(client.stream).value == {"n": 2}


def test_resumed_reader_still_waits_for_token_lookup(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client = site.client(server, "ada")
    protocol, requests = pause_during_lookup(server, lookups, client)
    server.in_loop(protocol.resume_writing)
    assert server.in_loop(lambda: server.server.state.counters.requests) == requests
    settle(server, lookups)
    assert client.answer(client.stream - 1).code == Code.UNAUTHENTICATED
    assert client.answer(client.stream).value == {"n": 2}


def test_events_are_sent_during_token_lookup(paused_server: ServerWithLookups, site: Site) -> None:
    server, lookups = paused_server
    client, other = site.client(server, "ada"), site.client(server, "ada")
    client.send(client.request("echo", token=b"x" * 32))
    server.until(lambda: lookups.answer)
    other.call("session.revoke", {"id": client.opened["id"]})
    assert client.receive().kind == EVENT
    settle(server, lookups)
    assert client.answer(client.stream).code == Code.UNAUTHENTICATED


def test_store_receives_only_the_token_digest(site: Site) -> None:
    store = site.new_store(shared=True)
    server = site.serve(store)
    client = site.client(server, "ada")
    record = store.registry.record_of(digest_of(client.token))
    assert record is not None
    assert client.token not in repr(record).encode()


# --- callers that go ------------------------------------------------------------------------------------------


def test_disconnect_while_opening_leaves_no_session(site: Site) -> None:
    server = site.serve()
    set_timeout(server, TIMEOUT)
    gate = server.in_loop(asyncio.Event)
    site.store.gate = gate
    with server.client() as client:
        params = {"scheme": "api_key", "user": "ada", "key": "the right key", "client": "test/1"}
        client.send(client.request("session.open", params))
        server.until(lambda: "create" in site.store.calls)
        client.cancel(client.stream)
        assert client.answer(client.stream).code == Code.CANCELLED
    server.in_loop(gate.set)
    server.until(lambda: "end" in site.store.calls and not site.store.registry.kept)
    server.until(lambda: not server.server.state.registry.kept)


def test_session_closed_without_waiting_ends_in_the_store(site: Site) -> None:
    server = site.serve()
    set_timeout(server, TIMEOUT)
    gate = server.in_loop(asyncio.Event)
    with server.client("ada") as client:
        site.store.gate = gate
        client.send(client.request("session.close"))
        server.until(lambda: "end" in site.store.calls)
    server.in_loop(gate.set)
    server.until(lambda: not site.store.registry.kept)
