"""A refresh elsewhere: a connection with the old token, maybe a stolen one, gets no calls, events and items."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import Answer
from tests.server.protocol_harness import Harness, Peer, nothing_left
from zcproto.app.context import ConnectedClient
from zcproto.connection.events import GoAwayReason
from zcproto.connection.server import ROTATION_GRACE_S
from zcproto.connection.settings import StreamLimits
from zcproto.errors import Code, ConnectionClosed
from zcproto.server.state import LISTED_CONNECTIONS
from zcproto.sessions import EndReason, SessionSettings
from zcproto.sessions.record import SessionRecord
from zcproto.wire.frame import CALL, EVENT, WITHDRAW

LIMITS = StreamLimits(max_open=4, max_item=1_000)


@pytest.fixture
def harness(harness: Harness) -> Harness:
    harness.allow_streams(LIMITS)
    harness.allow_calls()
    return harness


def begin_session(harness: Harness, lifetime_ms: int = 3_600_000) -> Peer:
    """Return a client with a session that never becomes idle, and a registration."""
    settings = harness.registry.settings
    limits = {name: getattr(settings, name) for name in ("max_sessions", "dead_limit", "grace_limit")}
    harness.registry.reconfigure(SessionSettings(**limits, lifetime_ms=lifetime_ms, idle_timeout_ms=None))
    owner = harness.connect("ada")
    owner.handle("approve")
    return owner


def steal(owner: Peer) -> Peer:
    """Return a thief's connection with a client's token: a stream, a registration, a waiting method."""
    thief = owner.harness.connect()
    thief.opened, thief.token = owner.opened, owner.token
    thief.handle("approve")
    thief.send(thief.open("ticks"))
    thief.send(thief.request(2, "wait"))
    thief.turn()
    return thief


def refresh(owner: Peer) -> None:
    """Refresh the session on this connection; `show` shows the new token on another one."""
    params = {"refresh_token": bytes(owner.opened.refresh_token)}
    token, owner.token = owner.token, bytes(32)
    owner.send(owner.request(91, "session.refresh", params))
    owner.token = token
    answers = {answer.stream: answer for answer in owner.turn()}
    owner.token = answers[91].value["token"]
    owner.opened.refresh_token = answers[91].value["refresh_token"]


def show(peer: Peer, token: bytes) -> list[Answer]:
    peer.token = token
    peer.send(peer.request(92, "session.info"))
    return peer.turn()


def client_at(peer: Peer) -> ConnectedClient:
    return ConnectedClient(peer.protocol, peer.opened.session.id, "ada")


@pytest.fixture
def owner(harness: Harness) -> Peer:
    return begin_session(harness)


@pytest.fixture
def thief(owner: Peer) -> Peer:
    return steal(owner)


def items(harness: Harness, peer: Peer) -> int:
    """Let the peer's stream produce an item, if it runs; return how many items arrive."""
    for future in harness.futures:
        if not future.done() and future is not harness.futures[1]:  # that of `wait`
            future.set_result(None)
    return sum(answer.kind.name == "ITEM" for answer in peer.turn())


def cut_reasons(peer: Peer) -> list[Any]:
    answers = [answer for answer in peer.turn() if answer.kind.name == "ERROR"]
    assert all(answer.code == Code.CANCELLED for answer in answers)
    return [answer.error.details["reason"] for answer in answers]


# --- calls ---------------------------------------------------------------------------------------------


def test_stolen_token_answers_no_call_after_a_refresh_elsewhere(
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    pending = owner.call(client_at(thief))
    (call,) = thief.answers()
    assert call.raw[1] == CALL
    refresh(owner)
    assert [answer.raw[1] for answer in thief.turn()] == [WITHDRAW]
    assert isinstance(pending.exception(), ConnectionClosed)
    dropped = harness.state.counters.dropped_answers
    thief.send(thief.result(call.stream, "yes"))
    assert harness.state.counters.dropped_answers == dropped + 1
    task = owner.call(client_at(thief))  # of a method that the thief has called
    (call,) = owner.answers()
    assert (call.raw[1], call.token) == (CALL, owner.token)
    owner.send(owner.result(call.stream, "no"))
    harness.turn()
    assert task.result() == "no"
    assert thief.turn() == []


def test_refresh_does_not_withdraw_calls_of_its_own_connection(owner: Peer, harness: Harness) -> None:
    task = owner.call(client_at(owner))
    (call,) = owner.answers()
    token = owner.token
    refresh(owner)
    assert owner.token != token
    owner.token = token  # of the CALL
    owner.send(owner.result(call.stream, "yes"))
    harness.turn()
    assert task.result() == "yes"


def test_registration_holds_again_when_the_newest_token_is_shown(
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    second = thief  # now it is the owner's second connection
    refresh(owner)
    show(second, owner.token)
    task = owner.call(client_at(second))
    (call,) = second.answers()
    assert (call.raw[1], call.token) == (CALL, owner.token)
    task.cancel()
    harness.turn()


def test_request_refused_by_draining_shows_the_newest_token(
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    thief.protocol.go_away(GoAwayReason.DRAINING)
    thief.answers()
    refresh(owner)
    assert [answer.code for answer in show(thief, owner.token)] == [Code.UNAVAILABLE]
    harness.advance(ROTATION_GRACE_S + 1)
    assert items(harness, thief) == 1


def test_registration_whose_request_waited_during_a_refresh_is_suspended(
    owner: Peer, harness: Harness
) -> None:
    thief = harness.connect()
    thief.token = owner.token
    show(thief, thief.token)
    session = harness.registry.check(thief.token, harness.clock.wall())
    refresh(owner)
    harness.in_loop(lambda: thief.protocol.register(session, frozenset({"approve"}), 8))
    assert [each._connection for each in harness.state.clients.find()] == [
        owner.protocol
    ]  # who would be called


# --- events --------------------------------------------------------------------------------------------


def test_stolen_token_gets_no_event_after_a_refresh_elsewhere(
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    (context,) = harness.contexts
    send = context.send_event
    assert harness.in_loop(lambda: send("news", 1))
    assert [answer.raw[1] for answer in thief.turn()] == [EVENT]
    refresh(owner)
    assert not harness.in_loop(lambda: send("news", 2))
    assert thief.turn() == []
    show(thief, owner.token)
    assert harness.in_loop(lambda: send("news", 3))


def test_stolen_refresh_token_of_a_bound_session_gets_no_event(harness: Harness) -> None:
    """An expired session can be refreshed without its key, which session.attach proves afterwards."""
    begin_session(harness)
    thief = harness.connect()
    opened = harness.registry.open(
        "ada", client="", address="", wall=harness.clock.wall(), key="device:laptop"
    )
    harness.clock.advance(3_600)
    thief.opened, thief.token = opened, bytes(32)
    refresh(thief)
    assert thief.protocol.session_used_since(opened.session.id) is None
    assert not thief.protocol.send_event(opened.session.id, "news", 1)
    assert show(thief, thief.token)[0].error.details == {"attach": True}


# --- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ended", "after_s"), [("revoked", 10), ("refreshed", 70)])
def test_request_with_a_stolen_token_is_not_answered_for_long(
    owner: Peer, harness: Harness, ended: str, after_s: int
) -> None:
    thief = harness.connect("mallory")
    own = thief.request(6, "wait")
    thief.token = owner.token
    thief.send(own, thief.request(5, "wait"), thief.request(7, "wait", deadline_ms=90_000))
    assert thief.turn() == []
    if ended == "refreshed":
        refresh(owner)
    else:
        revoke = harness.registry.revoke
        harness.in_loop(lambda: revoke(owner.opened.session.id, user="ada", reason=EndReason.BY_USER))
    harness.advance(after_s - 1)
    assert {answer.stream for answer in thief.turn()} <= {0}
    harness.advance(1)
    answers = {answer.stream: answer for answer in thief.turn()}
    assert {stream: answer.code for stream, answer in answers.items()} == {
        5: Code.CANCELLED,
        7: Code.CANCELLED,
    }
    first = harness.futures[0]
    harness.in_loop(lambda: first.set_result("his own"))
    assert [(answer.stream, answer.value) for answer in thief.turn()] == [(6, "his own")]


# --- streams -------------------------------------------------------------------------------------------


def test_stream_with_an_old_token_is_cut_after_a_minute(owner: Peer, thief: Peer, harness: Harness) -> None:
    refresh(owner)
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
    owner = begin_session(harness, lifetime_ms=40_000)
    thief = steal(owner)
    harness.advance(10)
    refresh(owner)
    harness.advance(29.5)
    thief.answers()  # session.expiring is not sent
    assert items(harness, thief) == 1
    harness.advance(0.5)
    assert cut_reasons(thief) == ["token_rotated"]


def test_second_refresh_does_not_prolong_a_stream_with_an_old_token(
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    refresh(owner)
    harness.advance(ROTATION_GRACE_S / 2)
    refresh(owner)
    harness.advance(ROTATION_GRACE_S / 2)
    assert cut_reasons(thief) == ["token_rotated"]


def test_stream_goes_on_if_the_newest_token_is_shown(owner: Peer, thief: Peer, harness: Harness) -> None:
    token = thief.token
    refresh(owner)
    harness.advance(ROTATION_GRACE_S / 2)
    show(thief, owner.token)
    harness.advance(ROTATION_GRACE_S)
    assert items(harness, thief) == 1
    thief.token = token
    thief.send(thief.credit(1_001, 1_000_001))  # carries the token of OPEN
    assert items(harness, thief) == 1


def test_old_token_does_not_end_the_suspension(owner: Peer, thief: Peer, harness: Harness) -> None:
    refresh(owner)
    assert [answer.code for answer in show(thief, thief.token)] == [Code.TOKEN_REVOKED]
    thief.token = thief.opened.token
    thief.send(thief.credit(1_001, 1_000_001))
    harness.advance(ROTATION_GRACE_S)
    assert cut_reasons(thief) == ["token_rotated"]


def test_streams_of_another_session_go_on(owner: Peer, thief: Peer, harness: Harness) -> None:
    thief.login("eve")
    thief.send(thief.open("ticks", stream=5))
    refresh(owner)
    harness.advance(ROTATION_GRACE_S)
    assert cut_reasons(thief) == ["token_rotated"]
    assert items(harness, thief) == 1


# --- expiry --------------------------------------------------------------------------------------------


def test_stream_ends_when_its_token_expires_and_not_when_that_is_noticed(harness: Harness) -> None:
    thief = steal(begin_session(harness, lifetime_ms=40_000))
    harness.advance(39.9)
    thief.answers()
    assert items(harness, thief) == 1
    harness.advance(0.1)
    assert cut_reasons(thief) == ["token_expired"]
    assert harness.state.clients.find() == []
    assert harness.registry.lapsed == 1


def test_expired_token_of_a_session_unknown_here_ends_its_streams(harness: Harness) -> None:
    owner = begin_session(harness, lifetime_ms=40_000)
    thief = steal(owner)
    harness.registry.forget(owner.opened.session.raw_id)  # as if the table had been full
    harness.advance(40)
    assert cut_reasons(thief) == ["token_expired"]
    assert harness.state.clients.find() == []
    assert len(harness.state.session_connections) == 0


def test_refresh_of_an_expired_session_elsewhere_revives_no_registration(harness: Harness) -> None:
    owner = begin_session(harness, lifetime_ms=40_000)
    thief = steal(owner)
    harness.advance(40)
    thief.answers()
    refresh(owner)
    assert len(harness.state.clients) == 1
    task = owner.call(client_at(thief))
    assert [answer.raw[1] for answer in owner.answers()] == [CALL]
    assert not any(answer.raw[1] == CALL for answer in thief.turn())
    task.cancel()
    harness.turn()


def test_rotation_of_an_expired_session_cuts_its_streams_at_once(harness: Harness) -> None:
    """Another process has refreshed the session before this one has noticed that its token had expired."""
    owner = begin_session(harness, lifetime_ms=40_000)
    thief = steal(owner)
    harness.clock.advance(40)  # without its timers
    rotate_elsewhere(owner, harness)
    assert harness.state.clients.find() == []
    harness.turn()
    harness.timers.advance(40.1)
    assert cut_reasons(thief) == ["token_rotated"]


# --- other processes -----------------------------------------------------------------------------------


def rotate_elsewhere(owner: Peer, harness: Harness) -> SessionRecord:
    """Read a session from the store that another process has refreshed. Return its record before."""
    before = harness.registry.record(owner.opened.session.raw_id)
    wall = harness.clock.wall()
    after = before._replace(token_digest=b"n" * 32, last_used_at=wall, expires_at=wall + 3_600_000)
    assert harness.in_loop(lambda: harness.registry.restore(after, make_room=True))
    return before


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_refresh_in_another_process_suspends_all_connections_here(
    owner: Peer, thief: Peer, harness: Harness, is_forgotten: bool
) -> None:
    pending = owner.call(client_at(thief))
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
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    before = rotate_elsewhere(owner, harness)
    harness.registry.forget(before.id)
    harness.registry.restore(before, make_room=True)
    assert harness.state.clients.find() == []
    show(owner, owner.token)
    (found,) = harness.state.clients.find()
    assert found._connection is owner.protocol  # who would be called


# --- the refresh itself --------------------------------------------------------------------------------


def test_refresh_that_waits_for_the_store_does_not_suspend_its_own_connection(
    owner: Peer, harness: Harness
) -> None:
    """The store's task has applied the rotation some turns before the request goes on."""
    task = owner.call(client_at(owner))
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
    owner: Peer, thief: Peer, harness: Harness
) -> None:
    with harness.state.refreshing(thief.protocol, thief.opened.session.raw_id):
        refresh(owner)
        assert len(harness.state.clients) == 2
    assert len(harness.state.clients) == 1


# --- the list of sessions ------------------------------------------------------------------------------


def listed(peer: Peer, method: str = "session.list") -> list[dict[str, Any]]:
    """Return the connections of the peer's session."""
    peer.send(peer.request(93, method))
    (answer,) = peer.turn()
    (session,) = answer.value if method == "session.list" else [answer.value]
    connections: list[dict[str, Any]] = session["connections"]
    return connections


@pytest.mark.parametrize("method", ["session.list", "session.info"])
def test_list_of_sessions_shows_the_connections_that_use_them(
    owner: Peer, harness: Harness, method: str
) -> None:
    began = harness.clock.wall()
    assert listed(owner, method) == [{"address": "192.0.2.7", "since": began}]
    harness.advance(5)
    thief = steal(owner)
    thief.protocol.peer = "198.51.100.9"
    for refreshed in (False, True):
        assert listed(owner, method) == [
            {"address": "198.51.100.9", "since": began + 5_000},
            {"address": "192.0.2.7", "since": began},
        ]
        if not refreshed:
            refresh(owner)
    harness.advance(ROTATION_GRACE_S)
    thief.turn()
    assert listed(owner, method) == [{"address": "192.0.2.7", "since": began}]


def test_list_of_sessions_has_the_newest_connections(owner: Peer, harness: Harness) -> None:
    began = harness.clock.wall()
    for _ in range(LISTED_CONNECTIONS):
        harness.advance(1)
        peer = harness.connect()
        show(peer, owner.token)
    sinces = [each["since"] - began for each in listed(owner)]
    assert sinces == [1_000 * number for number in range(LISTED_CONNECTIONS, 0, -1)]


def test_suspended_sessions_leave_nothing_behind(owner: Peer, thief: Peer, harness: Harness) -> None:
    refresh(owner)
    harness.advance(ROTATION_GRACE_S)
    for peer in (owner, thief):
        peer.lose()
    nothing_left(harness)
    assert len(harness.state.clients) == 0
