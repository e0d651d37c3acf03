"""A refresh elsewhere: a connection with the old token, maybe a stolen one, gets no calls, events and items."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import Harness, Peer, harness, nothing_left
from zcproto.app.context import ConnectedClient
from zcproto.connection.events import GoAwayReason
from zcproto.connection.server import ROTATION_GRACE_S
from zcproto.connection.settings import StreamLimits
from zcproto.errors import Code, ConnectionClosed
from zcproto.server.protocol_methods import session_methods
from zcproto.server.state import LISTED_CONNECTIONS
from zcproto.sessions import SessionSettings
from zcproto.sessions.record import SessionRecord
from zcproto.wire.frame import (
    CALL,
    CREDIT,
    EVENT,
    OPEN,
    RESULT,
    WITHDRAW,
    Side,
    accepted_with_calls,
    accepted_with_streams,
)
from zcproto.wire.message import encode_body, encode_request

__all__ = ["harness"]

LIMITS = StreamLimits(max_open=4, max_item=1_000)
CREDITS = (1_000, 1_000_000)


class RotatingPeer(Peer):
    """A client with streams and handlers."""

    def __init__(self, harness: Harness) -> None:
        state = harness.state
        if "ticks" not in state.methods:
            state.settings = replace(state.settings, max_calls=8, streams=LIMITS)
            self._add_methods(harness)
        super().__init__(harness)
        accepted = accepted_with_streams(Side.CLIENT, LIMITS.max_item)
        self._decoder.accepted = accepted_with_calls(Side.CLIENT, accepted)

    def _add_methods(self, harness: Harness) -> None:
        @harness.app.method("ticks")
        async def ticks() -> AsyncIterator[int]:
            for number in range(100):
                future = harness.loop.create_future()
                harness.futures.append(future)
                await future
                yield number

        unused: Any = None
        harness.state.add_methods(harness.app)
        harness.state.add_methods(session_methods(harness.state, unused))

    def begin_session(self, lifetime_ms: int = 3_600_000) -> RotatingPeer:
        registry = self.harness.registry
        settings = registry.settings
        registry.reconfigure(
            SessionSettings(
                max_sessions=settings.max_sessions,
                dead_limit=settings.dead_limit,
                grace_limit=settings.grace_limit,
                lifetime_ms=lifetime_ms,
                idle_timeout_ms=None,
            )
        )
        self.opened = self.login()
        self.handle()
        return self

    def steal(self) -> RotatingPeer:
        """Return a thief's connection with this client's token: a stream, a registration, a waiting method."""
        thief = RotatingPeer(self.harness)
        thief.opened, thief.token = self.opened, self.token
        thief.handle()
        thief.send(thief.frame(OPEN, 1, encode_request("ticks", {}, {"credit": CREDITS})))
        thief.send(thief.request(2, "wait"))
        thief.turn()
        return thief

    def handle(self) -> None:
        self.send(self.request(90, "session.handle", {"methods": ["approve"], "max": 8}))
        assert self.answers()[0].value == {}

    def refresh(self) -> None:
        """Refresh the session on this connection, and show the new token elsewhere only by `show`."""
        params = {"refresh_token": bytes(self.opened.refresh_token or b"")}
        token, self.token = self.token, bytes(32)
        self.send(self.request(91, "session.refresh", params))
        self.token = token
        answers = {answer.stream: answer for answer in self.turn()}
        self.token = answers[91].value["token"]
        self.opened.refresh_token = answers[91].value["refresh_token"]

    def show(self, token: bytes) -> list[Answer]:
        self.token = token
        self.send(self.request(92, "session.info"))
        return self.turn()

    def turn(self) -> list[Answer]:
        self.harness.turn()
        return self.answers()

    def call(self, client: ConnectedClient) -> asyncio.Task[Any]:
        task = self.harness.loop.create_task(client.call("approve"))
        self.harness.turn()
        return task

    @property
    def client(self) -> ConnectedClient:
        return ConnectedClient(self.protocol, self.opened.session.id, "ada")


@pytest.fixture
def owner(harness: Harness) -> RotatingPeer:
    return RotatingPeer(harness).begin_session()


@pytest.fixture
def thief(owner: RotatingPeer) -> RotatingPeer:
    return owner.steal()


def items(harness: Harness, peer: RotatingPeer) -> int:
    """Let the peer's stream produce an item, if it runs; return how many items arrive."""
    for future in harness.futures:
        if not future.done() and future is not harness.futures[1]:  # that of `wait`
            future.set_result(None)
    return sum(answer.kind.name == "ITEM" for answer in peer.turn())


def cut_reasons(peer: RotatingPeer) -> list[Any]:
    answers = [answer for answer in peer.turn() if answer.kind.name == "ERROR"]
    assert all(answer.code == Code.CANCELLED for answer in answers)
    return [answer.error.details["reason"] for answer in answers]


# --- calls ---------------------------------------------------------------------------------------------


def test_stolen_token_answers_no_call_after_a_refresh_elsewhere(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    pending = owner.call(thief.client)
    (call,) = thief.answers()
    assert call.raw[1] == CALL
    owner.refresh()
    assert [answer.raw[1] for answer in thief.turn()] == [WITHDRAW]
    assert isinstance(pending.exception(), ConnectionClosed)
    dropped = harness.state.counters.dropped_answers
    thief.send(thief.frame(RESULT, call.stream, encode_body("yes")))
    assert harness.state.counters.dropped_answers == dropped + 1
    task = owner.call(thief.client)  # of a method that the thief has called
    (call,) = owner.answers()
    assert (call.raw[1], call.token) == (CALL, owner.token)
    owner.send(owner.frame(RESULT, call.stream, encode_body("no")))
    harness.turn()
    assert task.result() == "no"
    assert thief.turn() == []


def test_refresh_does_not_withdraw_calls_of_its_own_connection(owner: RotatingPeer, harness: Harness) -> None:
    task = owner.call(owner.client)
    (call,) = owner.answers()
    token = owner.token
    owner.refresh()
    assert owner.token != token
    owner.token = token  # of the CALL
    owner.send(owner.frame(RESULT, call.stream, encode_body("yes")))
    harness.turn()
    assert task.result() == "yes"


def test_registration_holds_again_when_the_newest_token_is_shown(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    second = thief  # now it is the owner's second connection
    owner.refresh()
    second.show(owner.token)
    task = owner.call(second.client)
    (call,) = second.answers()
    assert (call.raw[1], call.token) == (CALL, owner.token)
    task.cancel()
    harness.turn()


def test_request_refused_by_draining_shows_the_newest_token(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    thief.protocol.go_away(GoAwayReason.DRAINING)
    thief.answers()
    owner.refresh()
    assert [answer.code for answer in thief.show(owner.token)] == [Code.UNAVAILABLE]
    harness.advance(ROTATION_GRACE_S + 1)
    assert items(harness, thief) == 1


def test_registration_whose_request_waited_during_a_refresh_is_suspended(
    owner: RotatingPeer, harness: Harness
) -> None:
    thief = RotatingPeer(harness)
    thief.token = owner.token
    thief.show(thief.token)
    session = harness.registry.check(thief.token, harness.clock.wall())
    owner.refresh()
    harness.in_loop(lambda: thief.protocol.register(session, frozenset({"approve"}), 8))
    assert [each._connection for each in harness.state.clients.find()] == [
        owner.protocol
    ]  # who would be called


# --- events --------------------------------------------------------------------------------------------


def test_stolen_token_gets_no_event_after_a_refresh_elsewhere(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    (context,) = harness.contexts
    send = context.send_event
    assert harness.in_loop(lambda: send("news", 1))
    assert [answer.raw[1] for answer in thief.turn()] == [EVENT]
    owner.refresh()
    assert not harness.in_loop(lambda: send("news", 2))
    assert thief.turn() == []
    thief.show(owner.token)
    assert harness.in_loop(lambda: send("news", 3))


# --- streams -------------------------------------------------------------------------------------------


def test_stream_with_an_old_token_is_cut_after_a_minute(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    owner.refresh()
    harness.advance(ROTATION_GRACE_S - 0.5)
    assert items(harness, thief) == 1
    harness.advance(0.5)
    assert cut_reasons(thief) == ["token_rotated"]
    assert harness.state.counters.streams_cut == {"token_rotated": 1}
    assert items(harness, thief) == 0
    assert harness.state.session_connections.of(owner.opened.session.id) == (owner.protocol,)
    harness.advance(11)
    assert harness.state.counters.connections_ended["no_session"] == 1


def test_stream_with_an_old_token_is_cut_when_that_would_have_expired(harness: Harness) -> None:
    owner = RotatingPeer(harness).begin_session(lifetime_ms=40_000)
    thief = owner.steal()
    harness.advance(10)
    owner.refresh()
    harness.advance(29.5)
    thief.answers()  # session.expiring is not sent
    assert items(harness, thief) == 1
    harness.advance(0.5)
    assert cut_reasons(thief) == ["token_rotated"]


def test_second_refresh_does_not_prolong_a_stream_with_an_old_token(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    owner.refresh()
    harness.advance(ROTATION_GRACE_S / 2)
    owner.refresh()
    harness.advance(ROTATION_GRACE_S / 2)
    assert cut_reasons(thief) == ["token_rotated"]


def test_stream_goes_on_if_the_newest_token_is_shown(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    token = thief.token
    owner.refresh()
    harness.advance(ROTATION_GRACE_S / 2)
    thief.show(owner.token)
    harness.advance(ROTATION_GRACE_S)
    assert items(harness, thief) == 1
    thief.token = token
    thief.send(thief.frame(CREDIT, 1, encode_body([1_001, 1_000_001])))  # carries the token of OPEN
    assert items(harness, thief) == 1


def test_old_token_does_not_end_the_suspension(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    owner.refresh()
    assert [answer.code for answer in thief.show(thief.token)] == [Code.TOKEN_REVOKED]
    thief.token = thief.opened.token
    thief.send(thief.frame(CREDIT, 1, encode_body([1_001, 1_000_001])))
    harness.advance(ROTATION_GRACE_S)
    assert cut_reasons(thief) == ["token_rotated"]


def test_streams_of_another_session_go_on(owner: RotatingPeer, thief: RotatingPeer, harness: Harness) -> None:
    thief.login("eve")
    thief.send(thief.frame(OPEN, 5, encode_request("ticks", {}, {"credit": CREDITS})))
    owner.refresh()
    harness.advance(ROTATION_GRACE_S)
    assert cut_reasons(thief) == ["token_rotated"]
    assert items(harness, thief) == 1


# --- expiry --------------------------------------------------------------------------------------------


def test_stream_ends_when_its_token_expires_and_not_when_that_is_noticed(harness: Harness) -> None:
    thief = RotatingPeer(harness).begin_session(lifetime_ms=40_000).steal()
    harness.advance(39.9)
    thief.answers()
    assert items(harness, thief) == 1
    harness.advance(0.1)
    assert cut_reasons(thief) == ["token_expired"]
    assert harness.state.clients.find() == []
    assert harness.registry.lapsed == 1


def test_expired_token_of_a_session_unknown_here_ends_its_streams(harness: Harness) -> None:
    owner = RotatingPeer(harness).begin_session(lifetime_ms=40_000)
    thief = owner.steal()
    harness.registry.forget(owner.opened.session.raw_id)  # as if the table had been full
    harness.advance(40)
    assert cut_reasons(thief) == ["token_expired"]
    assert harness.state.clients.find() == []
    assert len(harness.state.session_connections) == 0


def test_refresh_of_an_expired_session_elsewhere_revives_no_registration(harness: Harness) -> None:
    owner = RotatingPeer(harness).begin_session(lifetime_ms=40_000)
    thief = owner.steal()
    harness.advance(40)
    thief.answers()
    owner.refresh()
    assert len(harness.state.clients) == 1
    task = owner.call(thief.client)
    assert [answer.raw[1] for answer in owner.answers()] == [CALL]
    assert not any(answer.raw[1] == CALL for answer in thief.turn())
    task.cancel()
    harness.turn()


def test_rotation_of_an_expired_session_cuts_its_streams_at_once(harness: Harness) -> None:
    """Another process has refreshed the session before this one has noticed that its token had expired."""
    owner = RotatingPeer(harness).begin_session(lifetime_ms=40_000)
    thief = owner.steal()
    harness.clock.advance(40)  # without its timers
    rotate_elsewhere(owner, harness)
    assert harness.state.clients.find() == []
    harness.turn()
    harness.timers.advance(40.1)
    assert cut_reasons(thief) == ["token_rotated"]


# --- other processes -----------------------------------------------------------------------------------


def rotate_elsewhere(owner: RotatingPeer, harness: Harness) -> SessionRecord:
    """Read a session from the store that another process has refreshed. Return its record before."""
    before = harness.registry.record(owner.opened.session.raw_id)
    wall = harness.clock.wall()
    after = before._replace(token_digest=b"n" * 32, last_used_at=wall, expires_at=wall + 3_600_000)
    assert harness.in_loop(lambda: harness.registry.restore(after, make_room=True))
    return before


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_refresh_in_another_process_suspends_all_connections_here(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness, is_forgotten: bool
) -> None:
    pending = owner.call(thief.client)
    if is_forgotten:
        record = harness.registry.record(owner.opened.session.raw_id)
        harness.registry.forget(record.id)
        wall = harness.clock.wall()
        harness.registry.restore(record._replace(token_digest=b"n" * 32, last_used_at=wall), make_room=True)
        harness.turn()
    else:
        rotate_elsewhere(owner, harness)
    harness.turn()
    assert isinstance(pending.exception(), ConnectionClosed)
    assert harness.state.clients.find() == []
    harness.advance(ROTATION_GRACE_S)
    assert "token_rotated" in cut_reasons(thief)


def test_token_that_a_failover_brings_back_is_accepted_again(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    before = rotate_elsewhere(owner, harness)
    harness.registry.forget(before.id)
    harness.registry.restore(before, make_room=True)
    assert harness.state.clients.find() == []
    owner.show(owner.token)
    (found,) = harness.state.clients.find()
    assert found._connection is owner.protocol  # who would be called


# --- the refresh itself --------------------------------------------------------------------------------


def test_refresh_that_waits_for_the_store_does_not_suspend_its_own_connection(
    owner: RotatingPeer, harness: Harness
) -> None:
    """The store's task has applied the rotation some turns before the request goes on."""
    task = owner.call(owner.client)
    owner.answers()
    sessions, gate = harness.state.sessions, harness.loop.create_future()
    refresh = sessions.refresh

    async def slow(*arguments: Any, **named: Any) -> Any:
        opened = await refresh(*arguments, **named)
        await gate
        return opened

    harness.state.sessions.refresh = slow  # a store that answers later
    params = {"refresh_token": bytes(owner.opened.refresh_token or b"")}
    owner.token = bytes(32)
    owner.send(owner.request(91, "session.refresh", params))
    harness.turn()
    assert not task.done()
    gate.set_result(None)
    harness.turn()
    assert not task.done()
    assert len(harness.state.clients.find()) == 1
    task.cancel()
    harness.turn()


def test_connection_whose_refresh_failed_after_another_one_is_suspended(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    with harness.state.refreshing(thief.protocol, thief.opened.session.raw_id):
        owner.refresh()
        assert len(harness.state.clients) == 2
    assert len(harness.state.clients) == 1


# --- the list of sessions ------------------------------------------------------------------------------


def listed(peer: RotatingPeer, method: str = "session.list") -> list[dict[str, Any]]:
    """Return the connections of the peer's session."""
    peer.send(peer.request(93, method))
    (answer,) = peer.turn()
    (session,) = answer.value if method == "session.list" else [answer.value]
    connections: list[dict[str, Any]] = session["connections"]
    return connections


@pytest.mark.parametrize("method", ["session.list", "session.info"])
def test_list_of_sessions_shows_the_connections_that_use_them(
    owner: RotatingPeer, harness: Harness, method: str
) -> None:
    began = harness.clock.wall()
    assert listed(owner, method) == [{"address": "192.0.2.7", "since": began}]
    harness.advance(5)
    thief = owner.steal()
    thief.protocol.peer = "198.51.100.9"
    for refreshed in (False, True):
        assert listed(owner, method) == [
            {"address": "198.51.100.9", "since": began + 5_000},
            {"address": "192.0.2.7", "since": began},
        ]
        if not refreshed:
            owner.refresh()
    harness.advance(ROTATION_GRACE_S)
    thief.turn()
    assert listed(owner, method) == [{"address": "192.0.2.7", "since": began}]


def test_list_of_sessions_has_the_newest_connections(owner: RotatingPeer, harness: Harness) -> None:
    began = harness.clock.wall()
    for _ in range(LISTED_CONNECTIONS):
        harness.advance(1)
        peer = RotatingPeer(harness)
        peer.show(owner.token)
    sinces = [each["since"] - began for each in listed(owner)]
    assert sinces == [1_000 * number for number in range(LISTED_CONNECTIONS, 0, -1)]


def test_suspended_sessions_leave_nothing_behind(
    owner: RotatingPeer, thief: RotatingPeer, harness: Harness
) -> None:
    owner.refresh()
    harness.advance(ROTATION_GRACE_S)
    for peer in (owner, thief):
        peer.lose()
    nothing_left(harness)
    assert len(harness.state.clients) == 0
