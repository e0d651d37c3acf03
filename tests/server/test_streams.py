"""Tests of streams at the server's edge: generators, credit, room, cuts."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.helpers import MockTransport
from tests.server.protocol_harness import (
    LIMITS,
    PLENTY,
    WRITE_TIMEOUT,
    Harness,
    Peer,
    cut,
    ended,
    items,
    kinds,
    nothing_left,
)
from zcproto.app.context import Context
from zcproto.config.model import LogConfig
from zcproto.connection.events import GoAwayReason
from zcproto.connection.server_streams import StreamTotals
from zcproto.errors import Code
from zcproto.observe.log import configure_logging
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import cut_afterwards
from zcproto.server.request_limits import RequestSettings
from zcproto.server.streams import STREAM_TURN_BYTES
from zcproto.sessions import EndReason
from zcproto.wire.frame import ALLOWED, CANCEL, NO_TOKEN, OPEN, PING, REQUEST, Kind, Side
from zcproto.wire.message import encode_request


@pytest.fixture
def client(harness: Harness) -> Peer:
    harness.allow_streams()
    return harness.connect("ada")


def test_stream_sends_its_items_and_then_its_result(client: Peer) -> None:
    client.send(client.open("count", {"n": 3}))
    *sent, response = client.turn()
    assert items(sent) == [0, 1, 2]
    assert response.kind is Kind.RESPONSE
    assert response.value == {"sent": 3}
    assert client.harness.closed == ["count"]


def test_stream_without_credit_starts_and_waits(client: Peer) -> None:
    client.send(client.frame(OPEN, 1, encode_request("count", {"n": 2})))
    assert client.turn() == []
    client.send(client.credit(1))
    assert items(client.turn()) == [0]
    client.send(client.credit(1))
    assert client.turn() == []
    client.send(client.credit(2))
    assert kinds(client.turn()) == [Kind.ITEM, Kind.RESPONSE]


def test_method_waits_at_its_yield_for_credit(client: Peer) -> None:
    client.send(client.open("count", {"n": 10}, credit=(3, 100_000)))
    assert items(client.turn()) == [0, 1, 2]
    client.send(client.credit(5))
    assert items(client.turn()) == [3, 4]


def test_one_byte_of_credit_allows_one_item(client: Peer) -> None:
    client.send(client.open("count", {"n": 10, "size": 900}, credit=(10, 1)))
    assert len(items(client.turn())) == 1


@pytest.mark.parametrize("credit", [(0, 100), (100, 0)])
def test_credit_of_zero_items_or_bytes_allows_nothing(client: Peer, credit: tuple[int, int]) -> None:
    client.send(client.open("count", {"n": 10}, credit=credit))
    assert client.turn() == []


def test_request_of_streaming_method_is_refused_with_its_shape(client: Peer) -> None:
    client.send(client.request(1, "count", {"n": 1}))
    (answer,) = client.answers()
    assert (answer.code, answer.error.details) == (Code.FAILED_PRECONDITION, {"shape": "server"})
    assert client.harness.closed == []


def test_open_of_unary_method_is_refused_with_its_shape(client: Peer) -> None:
    client.send(client.open("wait"))
    (answer,) = client.answers()
    assert (answer.code, answer.error.details) == (Code.FAILED_PRECONDITION, {"shape": "unary"})
    assert client.harness.futures == []
    assert client.protocol._connection is not None
    assert client.protocol._connection.streams(0).in_flight == 0


def test_unknown_method_and_wrong_params_of_open_are_refused(client: Peer) -> None:
    client.send(client.open("missing"), client.open("count", {"m": 1}, stream=2))
    assert [answer.code for answer in client.answers()] == [Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT]


def test_open_without_token_is_unauthenticated(client: Peer) -> None:
    client.token = NO_TOKEN
    client.send(client.open("server.info"))
    assert [answer.code for answer in client.answers()] == [Code.UNAUTHENTICATED]


def test_streams_beyond_max_open_are_refused_and_requests_go_on(client: Peer) -> None:
    client.send(*(client.open("ticks", stream=number) for number in range(1, 6)))
    (answer,) = client.answers()
    assert (answer.stream, answer.code, answer.error.details) == (5, Code.RESOURCE_EXHAUSTED, {"limit": 4})
    client.send(client.request(9, "big", {"n": 1, "size": 1}))
    assert kinds(client.answers()) == [Kind.RESPONSE]


def test_open_beyond_max_streams_gets_its_answer(client: Peer) -> None:
    client.send(*(client.request(number, "wait") for number in range(1, 17)))
    client.send(client.open("ticks", stream=20))
    (answer,) = client.answers()
    assert answer.error.details == {"retry_after_ms": 100}


def test_cancel_while_method_waits_for_credit_closes_generator(client: Peer) -> None:
    client.send(client.open("count", {"n": 10}, credit=(1, 100)))
    client.send(client.frame(CANCEL, 1))
    answers = client.answers()
    assert cut(answers, "caller")
    assert client.turn() == []
    assert client.harness.closed == ["count"]


def test_cancel_while_method_awaits_cancels_it(client: Peer) -> None:
    client.send(client.open("ticks"))
    client.send(client.frame(CANCEL, 1))
    assert cut(client.turn(), "caller")
    assert client.harness.closed == ["ticks"]


def test_method_that_ignores_cancellation_keeps_its_place(client: Peer) -> None:
    client.send(*(client.open("stubborn", stream=number) for number in range(1, 5)))
    client.send(*(client.frame(CANCEL, number) for number in range(1, 5)))
    assert len(client.turn()) == 4
    client.send(client.open("count", {"n": 1}))
    assert client.turn()[-1].code == Code.RESOURCE_EXHAUSTED
    for future in client.harness.futures[4:]:
        future.set_result(None)
    client.turn()
    client.send(client.open("count", {"n": 1}))
    assert kinds(client.turn()) == [Kind.ITEM, Kind.RESPONSE]


def test_rapid_open_and_cancel_in_one_read_runs_at_most_max_open_methods(client: Peer) -> None:
    pairs = [(client.open("ticks", stream=n), client.frame(CANCEL, n)) for n in range(1, 101)]
    client.send(*(frame for pair in pairs for frame in pair))
    assert client.harness.state.tasks.running == LIMITS.max_open
    client.harness.advance(1)  # the CANCELs of refused OPENs have no effect
    codes = [answer.code for answer in client.answers()]
    assert (codes.count(Code.CANCELLED), codes.count(Code.RESOURCE_EXHAUSTED)) == (LIMITS.max_open, 96)
    assert client.harness.state.tasks.running == LIMITS.max_open
    client.turn()
    assert client.harness.state.tasks.running == 0


def test_deadline_between_two_items_cuts_the_stream(client: Peer) -> None:
    client.send(client.open("ticks", deadline_ms=5_000))
    client.harness.futures.pop().set_result(None)
    assert items(client.turn()) == [0]
    client.harness.advance(5)
    (answer,) = client.turn()
    assert answer.code == Code.DEADLINE_EXCEEDED
    assert client.harness.closed == ["ticks"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("not_found", Code.NOT_FOUND),
        ("key", Code.INTERNAL),
        ("object", Code.INTERNAL),
        ("large", Code.INTERNAL),
    ],
)
def test_failing_method_sends_items_then_its_error(client: Peer, kind: str, code: Code) -> None:
    client.send(client.open("fail", {"kind": kind}))
    answers = client.turn()
    assert items(answers) == [0, 1, 2]
    assert answers[-1].code == code


def test_session_revoked_in_mid_stream_cuts_it_after_the_event(client: Peer) -> None:
    client.login()
    client.send(client.open("ticks"))
    state = client.harness.state
    client.end_session(Code.TOKEN_REVOKED, EndReason.BY_OPERATOR)
    event, error = client.turn()
    assert event.event[0] == "session.revoked"
    assert error.error.details == {"reason": "token_revoked"}
    assert client.harness.closed == ["ticks"]
    assert state.counters.errors[Code.CANCELLED] == 1


def test_expired_session_cuts_its_streams_only(client: Peer) -> None:
    first = client.login("ada")
    client.send(client.open("ticks", stream=1))
    client.login("bob")
    client.send(client.open("ticks", stream=2))
    client.end_session(Code.TOKEN_EXPIRED, EndReason.EXPIRED, first)
    answers = client.turn()
    assert [answer.stream for answer in answers] == [1]
    assert cut(answers, "token_expired")
    client.harness.futures[-1].set_result(None)
    assert [answer.stream for answer in client.turn()] == [2]


def test_closing_ones_own_session_is_answered_before_its_streams_are_cut(client: Peer) -> None:
    state, harness = client.harness.state, client.harness

    async def close_own(context: Context) -> None:
        assert context.session is not None
        with cut_afterwards(context) as quiet:
            await state.sessions.revoke(
                context.session.id, user=None, reason=EndReason.CLOSED, suppress_event=quiet
            )
            await harness.loop.create_task(asyncio.sleep(0))  # the store

    harness.add_method(close_own, "close.own")
    client.send(client.open("ticks"), client.request(2, "close.own"))
    answers = client.turn()
    assert [(answer.kind, answer.stream) for answer in answers] == [(Kind.RESPONSE, 2), (Kind.ERROR, 1)]
    assert cut(answers, "token_revoked")
    client.turn()
    assert client.harness.closed == ["ticks"]


def test_evicted_session_cuts_its_streams(client: Peer) -> None:
    client.login()
    client.send(client.open("ticks"))
    client.end_session(Code.SESSION_REPLACED, EndReason.REPLACED)
    answers = client.turn()
    assert kinds(answers) == [Kind.EVENT, Kind.ERROR]
    assert cut(answers, "session_replaced")


def test_refreshed_session_keeps_its_streams_and_the_token_of_their_frames(client: Peer) -> None:
    harness, registry = client.harness, client.harness.registry
    opened = client.login()
    client.send(client.open("count", {"n": 3}, credit=(1, 1_000)))
    client.turn()
    refreshed = registry.refresh(opened.refresh_token, client="", address="", wall=harness.clock.wall())
    client.protocol.join(refreshed.session, refreshed.token)
    client.send(client.credit(2))
    assert items(client.turn()) == [1]
    client.token = refreshed.token
    client.send(client.credit(3))
    assert client.turn() == [], "CREDIT with another token"
    client.token = opened.token
    harness.in_loop(
        lambda: client.protocol.session_ended(refreshed.session.id, Code.TOKEN_EXPIRED, EndReason.EXPIRED)
    )
    assert cut(client.turn(), "token_expired")


def test_streams_go_on_while_tokens_cannot_be_checked(client: Peer) -> None:
    client.send(client.open("ticks"))
    client.harness.registry.distrust()
    client.harness.futures.pop().set_result(None)
    assert items(client.turn()) == [0]
    client.harness.advance(60)
    client.send(client.open("ticks", stream=2))
    (answer,) = client.turn()
    assert answer.code == Code.UNAVAILABLE
    client.harness.futures.pop().set_result(None)
    assert items(client.turn()) == [1]


def test_client_that_uses_no_stream_gets_no_new_kind(harness: Harness) -> None:
    harness.allow_streams()
    peer = harness.connect()
    assert "streams" in peer.welcome.value
    peer.accept(ALLOWED[Side.CLIENT])
    peer.login()
    peer.send(peer.request(1, "big", {"n": 1}), peer.request(2, "wait"), peer.frame(PING))
    peer.send(peer.frame(CANCEL, 2), peer.request(3, "count", {"n": 1}))
    harness.advance(60)
    peer.protocol.go_away(GoAwayReason.DRAINING)
    assert set(kinds(peer.turn())) == {Kind.RESPONSE, Kind.ERROR, Kind.PONG, Kind.GOAWAY}


def test_client_that_reads_its_items_too_slowly_is_reset(client: Peer) -> None:
    client.transport.stuck = True
    client.send(client.open("count", {"n": 1_000, "size": 900}))
    client.turn()
    client.harness.advance(WRITE_TIMEOUT - 1)
    assert not client.transport.aborted
    client.transport.unsent -= 20  # a byte a second
    client.harness.advance(1)
    assert client.transport.aborted
    assert ended(client.harness) == {"write_timeout": 1}
    client.turn()
    assert client.harness.closed == ["count"]


def test_item_that_waits_for_credit_too_long_cuts_the_stream(client: Peer) -> None:
    client.send(client.open("count", {"n": 2}, credit=(1, 100)))
    client.turn()
    client.harness.advance(LIMITS.stall_timeout_s - 150)
    client.send(client.frame(PING))
    client.harness.advance(149)
    assert kinds(client.turn()) == [Kind.PONG]
    client.harness.advance(1)
    assert cut(client.turn(), "slow")
    assert client.harness.closed == ["count"]


def test_wait_for_credit_has_a_deadline_before_any_other(harness: Harness) -> None:
    harness.allow_streams(replace(LIMITS, stall_timeout_s=30))
    client = harness.connect("ada")
    client.send(client.open("count", {"n": 2}, credit=(1, 100)))
    client.turn()
    harness.advance(30)
    assert cut(client.turn(), "slow")


def test_silent_client_with_a_stream_is_pinged_and_then_left(client: Peer) -> None:
    client.send(client.open("ticks"))
    client.harness.advance(300)
    assert kinds(client.turn()) == [Kind.PING]
    client.harness.advance(9)
    assert not client.transport.is_closing()
    client.harness.advance(1)
    assert client.transport.is_closing()
    assert ended(client.harness) == {"peer_silent": 1}
    client.turn()
    assert client.harness.closed == ["ticks"]


def test_client_that_answers_the_ping_keeps_its_stream(client: Peer) -> None:
    client.send(client.open("ticks"))
    client.harness.advance(300)
    client.send(client.frame(PING))
    client.harness.advance(299)
    assert not client.transport.is_closing()


def test_stream_counts_as_use_of_its_session(client: Peer) -> None:
    client.send(client.open("ticks"))
    state = client.harness.state
    checked: list[bytes] = []
    check = state.registry.check
    state.registry.check = lambda token, wall: checked.append(token) or check(token, wall)
    client.harness.advance(60)
    assert checked == [client.token, client.token]


def test_goaway_refuses_open_and_lets_streams_end(client: Peer) -> None:
    client.send(client.open("until.stopping"))
    state = client.harness.state
    state.draining = True
    client.protocol.go_away(GoAwayReason.DRAINING)
    client.send(client.open("count", {"n": 1}, stream=2))
    assert [answer.stream for answer in client.answers()] == [1, 0, 2]
    assert not client.transport.is_closing()
    client.harness.in_loop(state.stopping.set)
    assert kinds(client.turn()) == [Kind.RESPONSE]
    assert client.transport.is_closing()


def test_drain_timeout_cuts_streams(client: Peer) -> None:
    client.send(client.open("ticks"))
    client.protocol.cancel_all()
    (answer,) = client.turn()
    assert answer.error.details == {"reason": "draining", "retry_after_ms": 1_000}


def test_end_of_connection_cancels_its_streams(client: Peer) -> None:
    client.send(client.open("ticks"), client.open("count", {"n": 10}, stream=2, credit=(1, 1)))
    client.lose()
    nothing_left(client.harness)
    assert sorted(client.harness.closed) == ["count", "ticks"]


def test_streams_are_counted_also_after_their_connection(client: Peer) -> None:
    counters = client.harness.state.counters
    client.send(client.open("count", {"n": 3}), client.open("ticks", stream=2))
    client.turn()
    assert client.protocol.streams_open == 1
    assert +counters.streams_open == {"ticks": 1}
    totals = StreamTotals(opened=2, items_sent=3, bytes_sent=3 * 65)
    assert counters.streams == totals
    client.lose()
    assert client.protocol.streams_open == 0
    assert +counters.streams_open == {}
    assert counters.streams == totals


def test_cuts_are_counted_and_those_of_slow_clients_are_logged(
    client: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogConfig(level="info"), clock=client.harness.clock)
    client.send(client.open("ticks"), client.open("count", {"n": 2}, stream=2, credit=(1, 100)))
    client.turn()
    client.send(client.frame(CANCEL, 1))
    client.harness.advance(LIMITS.stall_timeout_s)
    client.turn()
    assert client.harness.state.counters.streams_cut == {"caller": 1, "slow": 1}
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["event"], line["what"], line["reason"]) == ("stream.cut", "count", "slow")


@pytest.mark.parametrize("how", ["cancelled", "lost"])
def test_generator_that_ignores_its_cancellation_is_closed_at_its_next_item(
    client: Peer, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(LogConfig(level="info"), clock=client.harness.clock)
    client.send(client.open("endless"))
    client.turn()
    if how == "lost":
        client.lose()
    else:
        client.send(client.frame(CANCEL, 1))
    client.harness.turn()
    assert client.harness.state.tasks.running == 0
    assert "request.failed" not in capsys.readouterr().err


def test_stream_is_a_request_in_progress_until_it_ends(client: Peer) -> None:
    limits = client.harness.state.request_limits
    limits.reconfigure(RequestSettings(running_per_user=1))
    client.send(client.open("ticks"))
    client.turn()
    assert limits.most_running_per_user == 1
    client.send(client.open("ticks", stream=2))
    assert client.turn()[-1].code == Code.RESOURCE_EXHAUSTED
    client.send(client.frame(CANCEL, 1))
    client.turn()
    assert limits.most_running_per_user == 0


# --- room -------------------------------------------------------------------------------------------------


def test_item_is_sent_once_the_client_reads(client: Peer) -> None:
    client.send(client.open("ticks", credit=PLENTY))
    client.turn()
    client.protocol.pause_writing()
    client.harness.in_loop(lambda: client.harness.futures[0].set_result(None))
    client.harness.turn()
    assert client.turn() == []
    client.protocol.resume_writing()
    assert kinds(client.turn()) == [Kind.ITEM]


def test_items_for_a_client_that_does_not_read_are_bounded(client: Peer) -> None:
    client.send(client.open("count", {"n": 1_000_000, "size": 900}, credit=(1, 1_000)))
    client.turn()
    client.transport.stuck = True
    client.transport.unsent = STREAM_TURN_BYTES - 1_500
    client.send(client.credit(2))
    client.turn()
    assert not client.transport.paused
    client.send(client.credit(2**53 - 1, 2**53 - 1))
    for _ in range(20):
        client.harness.turn()
    assert client.transport.unsent <= 2 * STREAM_TURN_BYTES + LIMITS.max_item
    assert client.transport.paused
    client.answers()
    client.transport.drain()
    client.harness.turn()
    assert client.answers()
    assert client.transport.unsent <= LIMITS.write_bytes + STREAM_TURN_BYTES + LIMITS.max_item


def test_methods_wait_while_a_part_waits_for_the_client(client: Peer) -> None:
    client.send(client.open("count", {"n": 1_000, "size": 900}, credit=(1, 1_000)))
    client.turn()
    client.transport.stuck = True
    client.transport.unsent = STREAM_TURN_BYTES - 500
    client.send(client.credit(2))
    client.turn()
    assert client.transport.paused
    client.send(client.credit(1_000))
    assert client.turn() == []


def test_client_that_does_not_read_its_items_is_still_read(harness: Harness) -> None:
    harness.allow_streams(replace(LIMITS, write_bytes=5_000))
    client = harness.connect("ada")
    client.transport.stuck = True
    client.send(client.open("count", {"n": 1_000, "size": 900}))
    client.turn()
    assert (client.transport.paused, client.transport.is_reading()) == (True, True)
    client.send(client.frame(PING), client.frame(CANCEL, 1))
    assert kinds(client.turn()) == [Kind.PONG, Kind.ERROR]
    assert client.harness.closed == ["count"]


def test_client_that_does_not_read_its_answers_is_held_up_until_it_reads(harness: Harness) -> None:
    harness.allow_streams(replace(LIMITS, write_bytes=5_000))
    client = harness.connect("ada")
    client.transport.stuck = True
    client.send(client.open("count", {"n": 100, "size": 900}))
    harness.turn()
    client.send(*(client.request(number, "big", {"n": number}) for number in range(2, 6)))
    assert not client.transport.is_reading()
    assert harness.ran == [2, 3]
    client.read_all()
    for _ in range(20):
        harness.turn()
    assert client.transport.is_reading()
    assert harness.ran == [2, 3, 4, 5]
    assert items(client.answers()) == [bytes(900)] * 100


def test_large_credit_does_not_keep_other_streams_waiting(client: Peer) -> None:
    client.send(
        client.open("count", {"n": 10_000}), client.open("count", {"n": 3}, stream=2), client.frame(PING)
    )
    answers = client.answers()
    for _ in range(8):
        answers += client.turn()
    done = [(answer.kind, answer.stream) for answer in answers if answer.kind is not Kind.ITEM]
    assert (Kind.RESPONSE, 2) in done
    assert (Kind.RESPONSE, 1) not in done


@pytest.mark.parametrize(("more", "sending"), [(0, {1, 2}), (1, {1, 2, 3})])
def test_turn_ends_when_the_room_of_a_connection_is_assigned(
    harness: Harness, more: int, sending: set[int]
) -> None:
    harness.allow_streams(replace(LIMITS, write_bytes=2 * STREAM_TURN_BYTES + more))
    client = harness.connect("ada")
    client.send(*(client.open("count", {"n": 1, "size": 900}, stream=stream) for stream in (1, 2, 3)))
    for _ in range(4):
        harness.loop.run_until_complete(asyncio.sleep(0))
    harness.timers.turn()
    assert {answer.stream for answer in client.answers() if answer.kind is Kind.ITEM} == sending


def test_all_items_arrive_in_order_over_many_turns(client: Peer) -> None:
    client.send(client.open("count", {"n": 1_000}))
    answers = client.answers()
    for _ in range(100):
        answers += client.turn()
    assert items(answers) == [*range(1_000)]
    assert answers[-1].value == {"sent": 1_000}


def test_unread_stream_does_not_slow_others(client: Peer) -> None:
    client.send(client.open("count", {"n": 10}, credit=(0, 0)))
    client.send(
        client.open("count", {"n": 3}, stream=2), client.frame(REQUEST, 3, encode_request("big", {"n": 1}))
    )
    assert [answer.stream for answer in client.turn()] == [3, 2, 2, 2, 2]


def memory_of(work: Callable[[], object]) -> int:
    """Return the bytes that work leaves allocated."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.no_cover  # coverage would be measured, too
@pytest.mark.parametrize("method", ["ticks", "news"])
def test_open_stream_that_waits_takes_little_memory(harness: Harness, method: str) -> None:
    harness.app.topic("news")
    harness.state.add_methods(harness.app)
    harness.allow_streams(replace(LIMITS, max_open=1_000))
    peer = harness.connect("ada")
    count = 500
    frames = [peer.open(method, stream=number) for number in range(1, count + 1)]
    harness.futures = []

    def open_streams() -> None:
        for frame in frames:
            peer.send(frame)
        harness.turn()

    used = memory_of(open_streams)
    assert harness.state.tasks.running == count
    assert used / count < 2.5 * 1024


@pytest.mark.no_cover  # coverage would be measured, too
def test_first_stream_of_a_connection_takes_little_memory(harness: Harness) -> None:
    harness.allow_streams()
    first = harness.connect("ada")
    peers = [harness.connect() for _ in range(300)]
    for peer in peers:
        peer.use(first.opened)
    frames = [peer.open("ticks") for peer in peers]

    def open_streams() -> None:
        for peer, frame in zip(peers, frames, strict=True):
            peer.send(frame)
        harness.turn()

    used = memory_of(open_streams)
    assert harness.state.tasks.running == len(peers)
    assert used / len(peers) < 2.5 * 1024


@pytest.mark.no_cover  # coverage would be measured, too
def test_connection_without_streams_takes_little_memory(harness: Harness) -> None:
    harness.state.settings = replace(harness.state.settings, streams=LIMITS)
    transports = [MockTransport(harness.timers) for _ in range(1_000)]

    def connect() -> None:
        for transport in transports:
            transport.connect(ServerProtocol(harness.state))
            transport.sent = None

    used = memory_of(connect) / len(transports)
    assert used < 1_200, "bytes of a connection without TLS and without a session"
