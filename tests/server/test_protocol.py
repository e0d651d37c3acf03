"""Tests of ServerProtocol: announcements, deadlines, and the release of all references at the end."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.server.protocol_harness import IDLE, Harness, Peer, ended, nothing_left
from zcproto.config.model import LogConfig
from zcproto.errors import Code, ResourceExhausted, TlsError
from zcproto.observe.events import LIMITS
from zcproto.observe.log import configure_logging
from zcproto.server.protocol import ServerProtocol
from zcproto.server.state import CONNECTIONS_PER_TURN
from zcproto.sessions import Session, SessionSettings
from zcproto.wire.frame import NO_TOKEN, PING, REQUEST, Kind
from zcproto.wire.message import encode_body

# --- what the server says of itself ----------------------------------------------------------------------

BODY = encode_body(["pins.next", {"pins": ["sha256/x"], "from": 1}])


def announce(harness: Harness, body: bytes | None) -> None:
    harness.loop.run_until_complete(harness.state.announce(body))
    harness.turn()


def test_announcement_reaches_present_and_future_connections(harness: Harness, peer: Peer) -> None:
    without_session = harness.connect()
    announce(harness, BODY)
    late = harness.connect()
    for received in (peer.answers(), without_session.answers(), late.greeted):
        assert [(answer.kind, answer.token, answer.body) for answer in received] == [
            (Kind.EVENT, NO_TOKEN, BODY)
        ]


def test_repeated_announcement_is_sent_once(harness: Harness, peer: Peer) -> None:
    announce(harness, BODY)
    announce(harness, BODY)
    assert len(peer.answers()) == 1


def test_withdrawn_announcement_is_not_sent(harness: Harness, peer: Peer) -> None:
    announce(harness, BODY)
    peer.answers()
    announce(harness, None)
    assert peer.answers() == []
    assert harness.connect().greeted == []


def test_announcement_to_thousands_takes_several_turns_and_sends_the_newest(harness: Harness) -> None:
    peers = [harness.connect() for _ in range(CONNECTIONS_PER_TURN + 1)]
    newer = encode_body(["pins.next", {"pins": ["sha256/y"], "from": 2}])

    async def both() -> None:
        await asyncio.gather(harness.state.announce(BODY), harness.state.announce(newer))

    harness.loop.run_until_complete(both())
    harness.turn()
    received = [[answer.body for answer in peer.answers()] for peer in peers]
    assert received.count([BODY, newer]) == CONNECTIONS_PER_TURN
    assert received.count([newer]) == 1


def test_closed_connection_gets_no_announcement(harness: Harness, peer: Peer) -> None:
    peer.protocol.close("by a test")
    peer.protocol.announce(BODY)
    harness.turn()
    assert peer.answers() == []


# --- time --------------------------------------------------------------------------------------------------


def test_idle_connection_is_closed(harness: Harness, peer: Peer) -> None:
    harness.advance(IDLE + 2)
    assert [answer.kind for answer in peer.answers()] == [Kind.GOAWAY]
    assert peer.transport.is_closing()
    assert ended(harness) == {"idle": 1}
    nothing_left(harness)


def test_active_connection_is_kept(harness: Harness, peer: Peer) -> None:
    for _ in range(4):
        harness.advance(IDLE - 10)
        peer.send(peer.frame(PING))
    assert not peer.transport.is_closing()
    assert {answer.kind for answer in peer.answers()} == {Kind.PONG}


def test_answered_request_is_not_in_flight(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"))
    assert peer.protocol.in_flight == 1
    harness.futures[0].set_result("done")
    harness.turn()
    assert [answer.stream for answer in peer.answers()] == [1]
    assert peer.protocol.in_flight == 0


def test_idle_time_counts_after_a_long_request(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"))
    harness.advance(5 * IDLE)
    assert not peer.transport.is_closing()
    harness.in_loop(lambda: harness.futures[0].set_result(1))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == [1]
    harness.advance(2 * IDLE + 2)
    assert peer.transport.is_closing()
    assert ended(harness) == {"idle": 1}


def test_connection_without_session_is_closed_soon(harness: Harness) -> None:
    peer = harness.connect()
    harness.advance(12)
    assert peer.transport.is_closing()
    assert ended(harness) == {"no_session": 1}
    nothing_left(harness)


def test_session_that_joins_late_gets_its_expiring_event_in_time(harness: Harness) -> None:
    peer = harness.connect()
    tenth = SessionSettings().lifetime_ms // 10
    wall = harness.clock.wall()
    opened = harness.registry.open("ada", client="", address="", wall=wall - 9 * tenth + 5_000)
    peer.protocol.join(opened.session, opened.token)
    peer.send(peer.frame(PING))
    harness.advance(4)
    assert [answer.kind for answer in peer.answers()] == [Kind.PONG]
    harness.advance(3)
    assert [answer.kind for answer in peer.answers()] == [Kind.EVENT]


@pytest.fixture
def looking_up(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Peer]:
    """Return a function that connects a client with an unknown token, which the server looks up by a function."""

    def connect(look_up: Callable[..., Any]) -> Peer:
        monkeypatch.setattr(harness.state.sessions, "look_up", look_up)
        harness.state.settings = replace(harness.state.settings, looks_up=True)
        peer = harness.connect()
        peer.token = bytes(32 * [7])
        return peer

    return connect


def test_lookup_that_ends_at_once_delays_no_request(looking_up: Callable[..., Peer]) -> None:
    found: list[Any] = []

    async def look_up(*arguments: Any) -> None:
        found.append(arguments)

    peer = looking_up(look_up)
    peer.send(peer.request(1, "big", {"n": 1}), peer.frame(PING))
    refused, pong = peer.answers()
    assert found == [(peer.token, peer.protocol.peer, Code.UNAUTHENTICATED)]
    assert (refused.error.code, pong.kind) == (Code.UNAUTHENTICATED, Kind.PONG)
    assert peer.transport.is_reading()


def test_refused_lookup_is_the_answer_to_the_request(looking_up: Callable[..., Peer]) -> None:
    async def look_up(*arguments: Any) -> None:
        raise ResourceExhausted("too many tokens to look up", {"retry_after_ms": 100})

    peer = looking_up(look_up)
    peer.send(peer.request(1, "big", {"n": 1}))
    (refused,) = peer.answers()
    assert (refused.code, refused.error.message) == (Code.RESOURCE_EXHAUSTED, "too many tokens to look up")
    assert refused.error.details == {"retry_after_ms": 100}


def test_proof_after_the_end_does_nothing(peer: Peer) -> None:
    peer.lose()
    peer.protocol.prove("device:phone")
    peer.protocol.disprove("device:phone")
    assert not peer.protocol.has_proved("device:phone")


def test_late_deadline_callback_does_nothing(harness: Harness, peer: Peer) -> None:
    peer.lose()
    peer.protocol.handle_deadline(harness.clock.now())
    assert ended(harness) == {"closed_by_peer": 1}


# --- the end -----------------------------------------------------------------------------------------------


def test_fatal_error_is_sent_and_counted(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"), peer.frame(REQUEST, 0), peer.request(2, "big", {"n": 2}))
    (error,) = peer.answers()
    assert (error.stream, error.code) == (0, Code.PROTOCOL_ERROR)
    assert peer.transport.is_closing()
    assert ended(harness) == {"protocol_error": 1}
    assert harness.state.counters.errors == {Code.PROTOCOL_ERROR: 1}
    assert harness.ran == []
    nothing_left(harness)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "closed_by_peer"), (TlsError("truncated"), "truncated"), (OSError(), "closed_by_peer")],
)
def test_lost_connection_is_counted_by_cause(
    harness: Harness, peer: Peer, error: Exception | None, reason: str
) -> None:
    peer.send(peer.request(1, "wait"))
    peer.lose(error)
    assert ended(harness) == {reason: 1}
    nothing_left(harness)
    assert harness.contexts[0].cancelled


def test_close_notify_then_eof_is_one_end(harness: Harness, peer: Peer) -> None:
    peer.protocol.eof_received()
    peer.lose()
    assert ended(harness) == {"closed_by_peer": 1}


def test_ended_connection_does_nothing(harness: Harness, peer: Peer) -> None:
    opened = peer.login("eve")
    peer.send(peer.request(1, "context.join"))
    context = harness.contexts[0]
    peer.answers()
    peer.protocol.close("test")
    peer.protocol.close("test")
    peer.protocol.data_received(b"anything")
    peer.protocol.go_away("test")
    peer.protocol.cancel_all()
    peer.protocol.abort("test")
    context.caller.join(opened.session, opened.token)
    assert context.send_event("news", 1) is False
    assert context.cancelled
    harness.registry.revoke_user("eve", "test")
    assert peer.answers() == []
    peer.lose()
    peer.protocol.close("test")
    peer.protocol.abort("test")
    assert ended(harness) == {"test": 1}
    nothing_left(harness)


def test_planned_event_is_not_sent_after_the_end(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "context.join"))
    peer.answers()
    assert harness.contexts[0].send_event("news", 1) is True
    peer.lose()
    nothing_left(harness)
    assert peer.answers() == []


def test_ended_session_sends_no_further_event(harness: Harness, peer: Peer) -> None:
    peer.protocol.session_ended("no such session", Code.TOKEN_REVOKED, "test")
    harness.turn()
    assert peer.answers() == []
    assert not peer.transport.is_closing()
    peer.lose()
    peer.protocol.session_ended("no such session", Code.TOKEN_REVOKED, "test")


def test_revocation_between_reads_is_sent_in_one_write(harness: Harness, peer: Peer) -> None:
    harness.registry.revoke_user("ada", "test")
    assert peer.answers() == []
    harness.turn()
    (event,) = peer.answers()
    assert event.event == ("session.revoked", {"reason": "test"})
    assert harness.registry.revoked == 1
    assert harness.state.counters.sessions_ended == {"test": 1}
    # Without a session it is closed after the open timeout.
    harness.advance(12)
    assert peer.transport.is_closing()
    assert ended(harness) == {"no_session": 1}


def test_expired_session_sends_no_event(harness: Harness, peer: Peer) -> None:
    wall = harness.clock.wall() + 30 * 24 * 3_600_000
    harness.registry.clean(wall, 1_000)
    harness.turn()
    assert peer.answers() == []
    harness.advance(12)
    assert ended(harness) == {"no_session": 1}


def test_revocation_reaches_all_connections_of_a_session(harness: Harness, peer: Peer) -> None:
    others = [harness.connect() for _ in range(3)]
    for other in others:
        other.token = peer.token
        other.send(other.request(1, "big", {"n": 1}))
        other.answers()
        other.send(other.request(2, "big", {"n": 1}))
        other.answers()
    others.pop().lose()
    harness.registry.revoke_user("ada", "test")
    harness.turn()
    for each in (peer, *others):
        assert [answer.kind for answer in each.answers()] == [Kind.EVENT]
        each.lose()
    nothing_left(harness)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_session_is_in_use_until_its_last_connection_ends(
    harness: Harness, peer: Peer, order: tuple[int, ...]
) -> None:
    connections = harness.state.session_connections
    session = harness.state.registry.check(peer.token, harness.clock.wall())
    assert isinstance(session, Session)
    changed: list[str] = []
    connections.on_changed = changed.append
    peers = [peer, harness.connect(), harness.connect()]
    for other in peers[1:]:
        other.token = peer.token
        other.send(other.request(1, "big", {"n": 1}))
    for index in order:
        assert connections.has_connection(session.id)
        peers[index].lose()
    assert not connections.has_connection(session.id)
    assert changed == [session.id]
    nothing_left(harness)


def test_method_closing_its_connection_and_waiting_is_cancelled(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "close.and.wait"))
    nothing_left(harness)
    assert harness.futures[0].cancelled()
    assert ended(harness) == {"by a method": 1}


@pytest.mark.parametrize("size", [0, 10_000])
def test_method_closing_its_connection_gets_no_answer_sent(harness: Harness, peer: Peer, size: int) -> None:
    peer.send(peer.request(1, "close.and.answer", {"size": size}), peer.request(2, "big", {"n": 2}))
    assert peer.answers() == []
    assert harness.ran == []
    nothing_left(harness)


def test_system_exit_of_a_method_propagates(peer: Peer) -> None:
    with pytest.raises(SystemExit):
        peer.protocol.data_received(peer.request(1, "exit"))
    peer.lose()


def test_drain_sends_goaway_and_waits_for_answers(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"))
    idle = harness.connect()
    harness.state.draining = True
    for each in (peer, idle):
        each.protocol.go_away("draining")
        assert [answer.kind for answer in each.answers()] == [Kind.GOAWAY]
    assert idle.transport.is_closing()
    assert not peer.transport.is_closing()
    late = harness.connect()
    assert [answer.value["retry_after_ms"] for answer in late.greeted] == [1_000]
    assert late.transport.is_closing()
    harness.in_loop(lambda: harness.futures[0].set_result(1))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == [1]
    assert peer.transport.is_closing()
    nothing_left(harness)


def alive() -> int:
    """Return the connections in memory, including unreachable cycles."""
    return sum(isinstance(each, ServerProtocol) for each in gc.get_objects())


@pytest.mark.parametrize("ending", ["close", "abort", "lose", "fatal", "timeout"])
def test_ended_connection_is_garbage_collected(harness: Harness, ending: str) -> None:
    gc.collect()
    gc.disable()
    try:
        peer = harness.connect("ada")
        peer.send(peer.request(1, "wait"), peer.request(2, "wait"))
        assert alive() == 1
        if ending == "close":
            peer.protocol.close("test")
        elif ending == "abort":
            peer.protocol.abort("test")
        elif ending == "fatal":
            peer.send(peer.request(1, "wait"))
        elif ending == "timeout":
            harness.registry.revoke_user("ada", "test")
            harness.advance(12)
        peer.lose()
        harness.turn()
        harness.futures.clear()
        harness.contexts.clear()
        del peer
        assert alive() == 0
    finally:
        gc.enable()


# --- what connections share ----------------------------------------------------------------------------------


def test_leaving_an_unknown_session_does_nothing(harness: Harness, peer: Peer) -> None:
    harness.state.session_connections.leave("no such session", peer.protocol)


def test_log_lines_per_peer_are_limited_and_counted(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogConfig(level="info"), clock=harness.clock)

    def fault(count: int) -> list[str]:
        for _ in range(count):
            peer = harness.connect()
            peer.send(peer.frame(REQUEST, 0))
        return capsys.readouterr().err.splitlines()

    capsys.readouterr()
    limit = LIMITS["per address"]
    assert len(fault(limit.lines + 7)) == limit.lines
    assert fault(5) == []
    harness.advance(61)
    (line,) = fault(1)
    logged = json.loads(line)
    assert (logged["event"], logged["code"], logged["suppressed"]) == (
        "connection.refused",
        "PROTOCOL_ERROR",
        12,
    )
