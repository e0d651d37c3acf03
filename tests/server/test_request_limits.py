"""Limits of what one user and one address may request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.server.protocol_harness import Harness, Peer
from zcproto.app.context import Context
from zcproto.common.deadlines import TICKS_PER_SECOND
from zcproto.common.rates import BURST_S
from zcproto.connection.settings import StreamLimits
from zcproto.errors import Code, ResourceExhausted
from zcproto.server.dispatch import FRAMES_PER_TURN
from zcproto.server.idempotency import IdempotencyCache
from zcproto.server.protocol import MAX_WASTED, SLOW_DOWN_S
from zcproto.server.request_limits import RequestLimits, RequestSettings
from zcproto.wire.frame import CANCEL, CREDIT, END, PING, PONG, Kind
from zcproto.wire.message import encode_body

RATE = 4
BURST = int(RATE * BURST_S)
"""Requests that a full bucket admits at once."""


# --- all limits --------------------------------------------------------------------------------------------


def check(limits: RequestLimits, user: str | None, peer: str = "192.0.2.1") -> ResourceExhausted | None:
    return limits.check(user, peer, 100.0)


def test_each_limit_refuses_with_its_message_and_a_delay() -> None:
    for name, settings, user in (
        ("requests_per_user", RequestSettings(per_user=1), "ada"),
        ("requests_per_address", RequestSettings(per_address=1), "ada"),
        ("requests_per_address", RequestSettings(per_address=1), None),
        ("public_requests_per_address", RequestSettings(public_per_address=1), None),
    ):
        limits = RequestLimits(settings)
        assert [check(limits, user) for _ in range(2)] == [None, None]
        error = check(limits, user)
        assert error.details == {"retry_after_ms": 1_000}
        assert limits.refused == {name: 1}


def test_addresses_of_one_ipv6_site_share_a_bucket() -> None:
    limits = RequestLimits(RequestSettings(public_per_address=1))
    assert check(limits, None, "2001:db8::1") is None
    assert check(limits, None, "2001:db8::2") is None
    assert check(limits, None, "2001:db8::3") is not None
    assert check(limits, None, "2001:db8:0:1::1") is None


def test_requests_in_progress_are_limited_until_they_end() -> None:
    for settings, name in (
        (RequestSettings(running_per_user=2), "running_per_user"),
        (RequestSettings(running_per_address=2), "running_per_address"),
    ):
        limits = RequestLimits(settings)
        assert limits.counts_running
        for _ in range(2):
            assert check(limits, "ada") is None
            limits.begin("ada", "192.0.2.1")
        assert (limits.most_running_per_user, limits.most_running_per_address) == (2, 2)
        error = check(limits, "ada")
        assert error.details == {"retry_after_ms": 250}
        assert limits.refused == {name: 1}
        limits.end("ada", "192.0.2.1")
        assert check(limits, "ada") is None
        limits.end("ada", "192.0.2.1")
        assert (limits.most_running_per_user, limits.most_running_per_address) == (0, 0)


# --- over connections ----------------------------------------------------------------------------------------


def codes(peer: Peer, method: str, count: int) -> list[int]:
    """Send requests in one read; return the codes of their answers, 0 for a result."""
    peer.send(*(peer.request(stream, method) for stream in range(1, count + 1)))
    return [answer.error.code if answer.kind is Kind.ERROR else 0 for answer in peer.answers()]


def test_noisy_user_is_refused_and_others_are_served(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(per_user=RATE))
    noisy, again, other = harness.connect("ada"), harness.connect("ada"), harness.connect("bob")
    harness.advance(BURST_S)
    assert codes(noisy, "context.join", BURST) == BURST * [0]
    assert codes(again, "context.join", 2) == 2 * [Code.RESOURCE_EXHAUSTED]
    assert codes(other, "context.join", 2) == [0, 0]
    assert harness.state.request_limits.refused == {"requests_per_user": 2}
    assert harness.state.counters.errors[Code.RESOURCE_EXHAUSTED] == 2
    harness.advance(1 / RATE)
    assert codes(again, "context.join", 2) == [0, Code.RESOURCE_EXHAUSTED]


def test_peer_over_a_limit_is_not_read_from_for_a_time_for_each_refused_request(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(per_user=RATE))
    noisy = harness.connect("ada")
    harness.advance(BURST_S)
    assert codes(noisy, "context.join", BURST + 50).count(Code.RESOURCE_EXHAUSTED) == 50
    assert not noisy.transport.is_reading()
    harness.advance(49 * SLOW_DOWN_S)
    assert not noisy.transport.is_reading()
    harness.advance(SLOW_DOWN_S + 1 / TICKS_PER_SECOND)
    assert noisy.transport.is_reading()


@pytest.mark.parametrize("kind", [PING, PONG, CANCEL, CREDIT, END])
def test_frames_without_effect_in_one_read_are_processed_in_slow_turns(harness: Harness, kind: int) -> None:
    harness.state.settings = replace(harness.state.settings, streams=StreamLimits())
    for peer in (harness.connect(), harness.connect("ada")):  # without a session and with one
        body = encode_body([1, 1]) if kind == CREDIT else b""
        frames = [
            peer.frame(kind, 0 if kind in (PING, PONG) else 1, body) for _ in range(2 * FRAMES_PER_TURN)
        ]
        peer.answers()
        peer.send(*frames, peer.request(1, "unknown"))
        for number in range(2):
            harness.turn()
            pongs = FRAMES_PER_TURN if kind == PING else 0
            assert [answer.kind for answer in peer.answers()] == pongs * [Kind.PONG], number
            assert not peer.transport.is_reading()
            harness.advance(FRAMES_PER_TURN * SLOW_DOWN_S - 0.05)
            assert not peer.answers()
            harness.advance(0.1)
        assert [answer.kind for answer in peer.answers()] == [Kind.ERROR]
        assert peer.transport.is_reading()


def test_peer_with_frames_that_become_no_requests_is_slowed_down(harness: Harness) -> None:
    peer = harness.connect("ada")
    peer.token = bytes(31) + b"?"
    peer.send(*(peer.request(stream, "context.join") for stream in range(1, 51)))
    assert {answer.error.code for answer in peer.answers()} == {Code.UNAUTHENTICATED}
    assert not peer.transport.is_reading()
    harness.advance(49 * SLOW_DOWN_S)
    assert not peer.transport.is_reading()
    harness.advance(SLOW_DOWN_S + 1 / TICKS_PER_SECOND)
    assert peer.transport.is_reading()
    assert not harness.contexts


def test_peer_that_sends_pings_flat_out_is_slowed_down(harness: Harness) -> None:
    peer = harness.connect("ada")
    peer.send(*(peer.frame(PING) for _ in range(MAX_WASTED - 1)))
    assert peer.transport.is_reading()
    peer.send(peer.frame(PING))
    assert not peer.transport.is_reading()
    assert [answer.kind for answer in peer.answers()] == MAX_WASTED * [Kind.PONG]


def test_connection_of_several_users_is_not_slowed_down(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(per_user=RATE))
    shared = harness.connect("ada")
    shared.login("bob")
    harness.advance(BURST_S)
    assert codes(shared, "context.join", BURST + MAX_WASTED).count(Code.RESOURCE_EXHAUSTED) == MAX_WASTED
    assert shared.transport.is_reading()


def test_user_with_too_many_keyed_requests_is_slowed_down(harness: Harness) -> None:
    harness.state.idempotency = IdempotencyCache(
        harness.state.tasks, harness.clock, harness.state.wheel, max_running=1
    )
    keyed = harness.connect("ada")
    for stream in range(1, MAX_WASTED + 2):  # the first one runs
        assert keyed.transport.is_reading()
        keyed.send(keyed.request(stream, "wait", None, idempotency_key=f"key {stream}"))
    assert [answer.error.code for answer in keyed.answers()] == MAX_WASTED * [Code.RESOURCE_EXHAUSTED]
    assert not keyed.transport.is_reading()
    keyed.lose()
    harness.futures[0].set_result("done")
    harness.turn()
    assert len(harness.state.wheel) == 0


def test_peer_that_a_method_refuses_again_and_again_is_slowed_down(harness: Harness) -> None:
    def refuse() -> None:
        raise ResourceExhausted("no more of these today")

    harness.add_method(refuse)
    peer = harness.connect("ada")
    assert codes(peer, "refuse", MAX_WASTED - 1) == (MAX_WASTED - 1) * [Code.RESOURCE_EXHAUSTED]
    assert peer.transport.is_reading()
    assert codes(peer, "refuse", 1) == [Code.RESOURCE_EXHAUSTED]
    assert not peer.transport.is_reading()


def test_method_that_ends_its_connection_and_refuses_is_not_slowed_down(harness: Harness) -> None:
    def refuse(context: Context) -> None:
        context.caller.close("by a method")
        raise ResourceExhausted("no more of these today")

    harness.add_method(refuse)
    peer = harness.connect("ada")
    peer.send(peer.request(1, "refuse", None, idempotency_key="key"))
    assert peer.transport.is_closing()
    peer.lose()
    assert len(harness.state.wheel) == 0


def test_requests_without_a_session_are_limited_per_address(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(public_per_address=RATE))
    harness.add_method(lambda: "hello", "hello", public=True)
    known = harness.connect("ada")
    assert codes(harness.connect(), "hello", BURST) == BURST * [0]
    assert codes(harness.connect(), "hello", 1) == [Code.RESOURCE_EXHAUSTED]
    assert codes(harness.connect(), "unknown", 1) == [Code.RESOURCE_EXHAUSTED]
    assert codes(known, "hello", 5) == 5 * [0]


def test_logins_and_refreshes_are_not_limited_here(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(1, 1, 1, 1, 1))
    known = harness.connect("ada")
    for method in ("session.open", "session.refresh"):  # the harness has neither
        assert codes(harness.connect(), method, 100) == 100 * [Code.UNAUTHENTICATED]
        assert codes(known, method, 100) == 100 * [Code.UNIMPLEMENTED]


def test_requests_that_wait_are_limited_per_user_until_they_end(harness: Harness) -> None:
    harness.state.request_limits.reconfigure(RequestSettings(running_per_user=2))
    first, second = harness.connect("ada"), harness.connect("ada")
    assert codes(first, "wait", 1) == []
    assert codes(second, "wait", 2) == [Code.RESOURCE_EXHAUSTED]
    assert codes(harness.connect("bob"), "wait", 2) == []
    harness.futures[0].set_result("done")
    harness.turn()
    assert [answer.value for answer in first.answers()] == ["done"]
    second.lose()
    harness.turn()
    assert harness.state.request_limits.most_running_per_user == 2  # bob's
    assert codes(first, "wait", 3) == [Code.RESOURCE_EXHAUSTED]
